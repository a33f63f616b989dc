"""P-GAP's aligned core, made inside the low-rank pass: its numbers laid bare, and the accuracy of the pass."""

import math

import pytest
import torch
from agreement import assert_all_same
from helpers import assert_same_bits, weights
from lowrank_calls import CORE, IDS, LEFT, RIGHT, SIGN, STOCHASTIC, at_most_twice, perturbed

from pgap_kernels import ops

SIGNS = {
    "fixed": {},
    "per matrix": {"sign_key": SIGN},
    "global": {"sign_key": SIGN, "sign_ids": [0, 0]},
    "of ids": {"sign_key": torch.tensor([SIGN - (SIGN >> 63 << 64)]), "sign_ids": [5, 6]},
}


def exact_core(s: torch.Tensor, ident: int, delta: float, xi: float) -> torch.Tensor:
    """Z in float64, from its definition."""
    z, s = ops.draw((len(s), len(s)), CORE, ident, backend="reference").double(), s.double()
    alpha = (s @ z.diagonal() - xi * math.sqrt(torch.tensor(delta).item()) * s.norm()) / s.norm() ** 2
    return z - alpha * s.diag()


def sign(signs: str, index: int) -> float:
    options = SIGNS[signs]
    if not options:
        return 1.0
    ident = options.get("sign_ids", IDS)[index]
    return ops.draw(1, SIGN, ident, distribution="rademacher", backend="reference").item()


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize(("rank", "delta"), [(1, 0.7), (3, 0.0), (8, 0.7), (12, 4.0), (20, 0.0), (33, 0.7)])
def test_core_laid_bare(rank, delta, signs):
    """Between identities the result is the core: normals beside the diagonal, float64 rounded once on it."""
    values = [torch.linspace(3, 0.01, rank), torch.linspace(0.5, 2, rank)]
    zeros, eyes = [torch.zeros(rank, rank) for _ in values], [torch.eye(rank) for _ in values]
    core = ops.AlignedCore(CORE, values, delta, **SIGNS[signs])
    got = perturbed(zeros, eyes, eyes, core=core, coefficient=1.0)
    for i, (z, s) in enumerate(zip(got, values, strict=True)):
        want = exact_core(s, IDS[i], delta, sign(signs, i))
        beside = ~torch.eye(rank, dtype=torch.bool)
        assert_same_bits(z[beside], want.float()[beside])
        # Sums of float64 in another order, then the rounding to float32.
        error = 2.0**-24 * want.abs() + 1e-12 * (s.double().max() * want.abs().max() + 1)
        assert ((z.double() - want).abs() <= error).all()


def test_nothing_to_align():
    """Without singular values the core is what was drawn."""
    zeros, eye = [torch.zeros(5, 5)], [torch.eye(5)]
    core = ops.AlignedCore(CORE, [torch.zeros(5)], 0.7)
    want = ops.draw((5, 5), CORE, IDS[0], backend="reference")
    assert_same_bits(perturbed(zeros, eye, eye, core=core, coefficient=1.0)[0], want)


@pytest.mark.parametrize("factors", ["stored", "regenerated"])
@pytest.mark.parametrize(
    ("dtype", "rank", "signs"),
    [
        (torch.float32, 8, "fixed"),
        (torch.bfloat16, 12, "per matrix"),
        (torch.bfloat16, 20, "global"),
        (torch.float16, 16, "fixed"),
        (torch.float32, 33, "of ids"),
        (torch.bfloat16, 33, "per matrix"),
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_pytorch(dtype, rank, signs, factors):
    shapes = [(35, 70), (66, 36)]
    w = weights(shapes, dtype)
    left = [ops.draw((m, rank), LEFT, i, backend="reference") for (m, _), i in zip(shapes, IDS, strict=False)]
    right = [ops.draw((n, rank), RIGHT, i, backend="reference") for (_, n), i in zip(shapes, IDS, strict=False)]
    values = [torch.linspace(3, 0.01, rank), torch.linspace(0.5, 2, rank)]
    core = ops.AlignedCore(CORE, values, torch.tensor([0.7]), **SIGNS[signs])
    given = (LEFT, RIGHT) if factors == "regenerated" else (left, right)
    got = perturbed(w, *given, core=core, rank=rank, coefficient=0.3125, decay=0.125)
    cores = [exact_core(s, IDS[i], 0.7, sign(signs, i)) for i, s in enumerate(values)]
    at_most_twice(dtype, got, w, left, right, cores, 0.3125, 0.125)


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 3), (torch.bfloat16, 12), (torch.bfloat16, 16)], ids=str)
def test_lists_do_not_matter(dtype, rank):
    shapes = [(20, 40), (33, 18), (17, 65)]
    w, values = weights(shapes, dtype), [torch.linspace(3, 0.01, rank) * (i + 1) for i in range(3)]

    def run(order):
        core = ops.AlignedCore(CORE, [values[i] for i in order], 0.7, SIGN)
        ids = [IDS[i] for i in order]
        options = {"coefficient": 0.3, "rank": rank, "tensor_ids": ids, **STOCHASTIC}
        return perturbed([w[i] for i in order], LEFT, RIGHT, core=core, **options)

    want = run([0, 1, 2])
    for order in ([1], [2, 0]):
        assert_all_same(run(order), [want[i] for i in order])


@pytest.mark.parametrize("signs", SIGNS)
def test_aligned_core_has_the_bits_of_the_reference(signs):
    values = [torch.linspace(3, 0.01, rank) for rank in (1, 7)]
    got, want = (
        ops.aligned_core(values, CORE, tensor_ids=IDS[:2], delta=0.7, backend=b, **SIGNS[signs])
        for b in ("triton", "reference")
    )
    assert_all_same(got, want)
