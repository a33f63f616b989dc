"""What the tests of the low-rank kernels share: factors, shapes, calls, and what an error may be."""

from __future__ import annotations

import torch

from pgap_kernels import noise

from .helpers import assert_all_same, clones, integers, ops

LEFT, RIGHT, CORE = (noise.derive(4, 1, role) for role in (noise.Role.LEFT, noise.Role.RIGHT, noise.Role.CORE))
STOCHASTIC = {"rounding": "stochastic", "rounding_key": noise.derive(4, 1, noise.Role.ROUNDING)}
IDS = [noise.tensor_id(f"w{i}") for i in range(4)]
# Whole tiles of every configuration, and ragged ones. As shards of wide rows they may have any rank.
SHAPES = [(64, 128), (35, 70)]
WIDE = {"slices": [(0, 600)] * len(SHAPES)}


def stored(rank: int, core: str, shapes=SHAPES, draw=None):
    """A, B and C as the op takes them, of whole numbers or of what ``draw`` makes of shapes and a seed."""
    make = draw or (lambda sizes, seed: integers(sizes, 2 if seed == 3 else 4, seed))
    size = {"none": None, "diagonal": (rank,), "full": (rank, rank)}[core]
    left, right = make([(m, rank) for m, _ in shapes], 1), make([(n, rank) for _, n in shapes], 2)
    return left, right, size and make([size] * len(shapes), 3)


def perturbed(tensors, left, right, backend="triton", **options):
    """Copies of the tensors after the op."""
    tensors = clones(tensors)
    ops.lowrank_perturb_(tensors, left, right, backend=backend, **{"tensor_ids": IDS[: len(tensors)], **options})
    return tensors


def agreeing(tensors, left, right, **options):
    """The same, once both backends gave the same bits."""
    got, want = (perturbed(tensors, left, right, b, **options) for b in ("triton", "reference"))
    assert_all_same(got, want)
    return got


def at_most_twice(dtype, got, w, left, right, cores, coefficient: float, decay: float) -> None:
    """Largest and root mean square error against float64, of the result and of PyTorch's addmm in W's dtype, where P
    and B are rounded to it in both."""
    own, plain = [], []
    for g, x, a, b, c in zip(got, w, left, right, cores, strict=True):
        exact = (1 - decay) * x.double() + coefficient * (a.double() @ c.double() @ b.double().T)
        p = (a.float() @ c.float()).to(dtype)
        addmm = torch.addmm(x, p, b.to(dtype).T, beta=1 - decay, alpha=coefficient)
        own.append((g.double() - exact).flatten())
        plain.append((addmm.double() - exact).flatten())
    own, plain = torch.cat(own), torch.cat(plain)
    assert own.abs().max() <= 2 * plain.abs().max()
    assert own.square().mean().sqrt() <= 2 * plain.square().mean().sqrt()


def assert_quotient(got, w, a, b, c, v, *, e: float, coefficient: float) -> None:
    """A quotient, added to W, within what its roundings may move it by: P and B to W's dtype, sums of rank terms and a
    few operations in float32, and the result to W's dtype. Below, where B is squared, the root halves the error."""
    a, b, c, v = (t.double() for t in (a, b, c, v))
    unit, single = torch.finfo(w.dtype).eps / 2, 2.0**-24
    each = 2 * unit + (len(c) + 4) * single
    above, below = (a * c) @ b.T, (a * a * v) @ (b * b).T + e
    quotient = above / below.sqrt()
    lost = each * (a.abs() * c.abs()) @ b.abs().T / below.sqrt() + (each + unit + 4 * single) * quotient.abs()
    exact = w.double() + coefficient * quotient
    lost = 1.01 * abs(coefficient) * lost  # terms of second order
    ulp = torch.maximum(exact.abs() + lost, torch.tensor(torch.finfo(w.dtype).smallest_normal)) * unit
    assert ((got.double() - exact).abs() <= lost + ulp + single * w.double().abs()).all()
