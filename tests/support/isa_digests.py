"""Digests of a fixed set of draws and passes; run as a module, once per PGAP_ISA, it prints them as JSON."""

from __future__ import annotations

import hashlib
import json

import torch

from pgap_kernels import reference

from . import cases, sums
from .helpers import DTYPES, ops, poison, weights

SHAPES = [(0,), (), (31,), (1023,), (1025,), (4097,), (37, 129), (3, 5, 7, 2), (9001,)]
IDS = list(range(7, 7 + len(SHAPES)))
MATRICES = [(1, 1), (7, 5), (65, 129), (24, 64), (100, 67)]


def digest(tensors) -> str:
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def draw_digests(backend: str | None) -> dict[str, str]:
    result = {}
    for distribution in ("normal", "rademacher"):
        for offset in (0, 5, 2**33 + 17):
            drawn = ops.draw((70001,), 2**64 - 3, 99, distribution=distribution, offset=offset, backend=backend)
            result[f"draw {distribution} {offset}"] = digest([drawn])
    return result


def dense_digests(backend: str | None) -> dict[str, str]:
    result = {}
    for dtype in DTYPES:
        for distribution in ("normal", "rademacher"):
            for decay in (0.0, 0.01):
                for rounding in ("nearest", "stochastic"):
                    w = weights(SHAPES, dtype)
                    w[3][:4] = torch.tensor([1e-7, 60000.0, -0.0, 3e-41])
                    ops.dense_perturb_(
                        w,
                        [(11, 1e-3), (2**63 + 5, -0.37)],
                        tensor_ids=IDS,
                        decay=decay,
                        distribution=distribution,
                        rounding=rounding,
                        rounding_key=13,
                        backend=backend,
                    )
                    result[f"dense {dtype} {distribution} {decay} {rounding}"] = digest(w)
        w = weights([(4097,)], dtype, scale=2e4)  # beyond what float16 holds
        ops.dense_perturb_(w, [(11, 3e4)], tensor_ids=IDS[:1], rounding="stochastic", rounding_key=13, backend=backend)
        result[f"dense {dtype} overflowing"] = digest(w)
    return result


def case_digests(backend: str | None) -> dict[str, str]:
    """Of every call whose bits are those of the reference, and of sums, whose bits are those of the generic kernels."""
    return {name: digest(cases.run(case, backend)) for name, case in (cases.CASES | sums.REDUCED).items()}


def transform_digest() -> str:
    generator = torch.Generator().manual_seed(5)
    edges = torch.tensor([0, -1, 0x1FF, 0x200, 2**31 - 1, -(2**31)], dtype=torch.int32)
    a, b = (torch.cat([edges, torch.randint(-(2**31), 2**31, (9973,), generator=generator).int()]) for _ in range(2))
    even, odd = poison([torch.empty(len(a)), torch.empty(len(a))])
    torch.ops.pgap_kernels_cpu.box_muller(a, b.flip(0), even, odd)
    want = reference.box_muller(a.long() & 0xFFFFFFFF, b.flip(0).long() & 0xFFFFFFFF)
    assert torch.equal(even.view(torch.int32), want[0].view(torch.int32))
    assert torch.equal(odd.view(torch.int32), want[1].view(torch.int32))
    return digest([even, odd])


def lowrank_digests() -> dict[str, str]:
    result = {}
    for dtype in DTYPES:
        for rank in (1, 5, 16, 33):
            shapes = [shape for shape in MATRICES if min(shape) >= rank]
            for core in ("none", "full", "regenerated", "diagonal", "quotient"):
                for rounding in ("nearest", "stochastic"):
                    w = weights(shapes, dtype)
                    left = weights([(m, rank) for m, _ in shapes], seed=1)
                    cores = {
                        "none": None,
                        "regenerated": 17,
                        "full": weights([(rank, rank)] * len(w), seed=2),
                        "diagonal": weights([(rank,)] * len(w), seed=3),
                        "quotient": weights([(rank,)] * len(w), seed=3),
                    }[core]
                    divisor = {"below": [c.square() for c in cores], "e": 0.1} if core == "quotient" else {}
                    ops.lowrank_perturb_(
                        w,
                        left,
                        2**64 - 9,
                        core=cores,
                        coefficient=0.3,
                        decay=0.01,
                        tensor_ids=IDS[: len(w)],
                        rounding=rounding,
                        rounding_key=19,
                        **divisor,
                    )
                    result[f"lowrank {dtype} {rank} {core} {rounding}"] = digest(w)
    return result


def forward_digests() -> dict[str, str]:
    result = {}
    for dtype in DTYPES:
        for rank in (1, 5, 16, 33, 140):
            y, x, left, right, core = weights([(14, 37), (14, 300), (37, rank), (300, rank), (rank, rank)], dtype)
            left = left.float() / (10 * rank)
            for kind in ("", "stacked", "transposed"):
                factors = (right.float(), left) if kind == "transposed" else (left, right)
                cores = [core.float(), -core.float()] if kind == "stacked" else [core.float()]
                moved = y.clone()
                ops.lowrank_forward_(moved, x, *factors, cores, transposed=kind == "transposed")
                result[f"forward {dtype} {rank} {kind}"] = digest([moved])
    return result


if __name__ == "__main__":
    found = {"isa": torch.ops.pgap_kernels_cpu.isa().split(",")[0], "transform": transform_digest()}
    exact = {**draw_digests("cpu"), **dense_digests("cpu"), **case_digests("cpu")}
    print(json.dumps({**found, **exact, **lowrank_digests(), **forward_digests()}))
