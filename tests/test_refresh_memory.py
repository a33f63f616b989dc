"""P-GAP's refresh takes one scratch of the largest matrix, its bases, and little else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step.memory import TensorBytes
from pgap_kernels.optim import PGAP

SHAPES = [(300, 200), (200, 300), (256, 256), (64, 320)]
# In skinny factors of r + 8 columns, both sides of a matrix: the test matrix, Q and a QR's two while U and V are made,
# and U and V of both signs before they replace those of the last refresh.
SKINNY = 4


def peaks(mode: str, rank: int, dtypes: list[torch.dtype]) -> tuple[list[int], PGAP]:
    """Bytes beyond the weights at the peak of a step with the first refresh, and of one with the second."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(n, m, bias=False) for m, n in SHAPES)
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    inputs = [torch.randn(2, layer.in_features, dtype=layer.weight.dtype) for layer in layers]

    def closure() -> torch.Tensor:
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        return torch.stack([y.float().square().mean() for y in outputs]).mean()

    count = TensorBytes(layers.parameters())
    weights, found = count.alive, []
    with count:
        optimizer = PGAP(layers, lr=1e-6, rank=rank, window=1, probes=3, mode=mode)
        for _ in range(2):
            count.peak = count.alive
            optimizer.step(closure)
            found.append(count.peak - weights)
    return found, optimizer


def bound(optimizer: PGAP, rank: int) -> int:
    """The scratch, U, S and V of all matrices with Z and C where a mode keeps them, and the skinny factors of one."""
    scratch = max(4 * m * n for m, n in SHAPES)
    return scratch + optimizer.cost().state_bytes + SKINNY * max(4 * (m + n) * (rank + 8) for m, n in SHAPES)


@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
@pytest.mark.parametrize("rank", [4, 16])
def test_one_scratch_and_the_bases(mode, rank):
    found, optimizer = peaks(mode, rank, [torch.float32] * len(SHAPES))
    assert max(found) <= bound(optimizer, rank)
    largest = max(4 * m * n for m, n in SHAPES)
    assert min(found) > largest  # counted at all
    assert largest <= optimizer.cost().scratch_bytes < 1.01 * largest


@pytest.mark.filterwarnings("ignore:16-bit weights are perturbed in place")
def test_weights_of_two_types_share_the_scratch():
    found, optimizer = peaks("inplace", 16, [torch.float32, torch.bfloat16] * 2)
    assert max(found) <= bound(optimizer, 16)


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_16_bit_weights_have_their_buffer_beside_it(mode):
    found, optimizer = peaks(mode, 16, [torch.bfloat16] * len(SHAPES))
    assert max(found) <= bound(optimizer, 16) + optimizer.perturbation.scratch_bytes


def test_a_count_follows_storages():
    weight = torch.nn.Parameter(torch.zeros(1000))
    count = TensorBytes([weight])
    with torch.no_grad(), count:
        part = torch.empty(100)[50:]
        assert count.alive == 4400
        part.add_(1)
        del part
        assert (count.alive, count.peak) == (4000, 4400)
        weight.data = weight.data + 1  # new memory for the weight: the old is freed
        assert (count.alive, count.peak) == (4000, 8000)
        torch.linalg.qr(torch.empty(20, 10).fill_(1))
        assert (count.alive, count.peak) == (4000, 8000)
