"""A step takes one scratch of the largest layer beyond what the method declares to keep, and little else."""

from __future__ import annotations

import pytest
import torch
from support.methods import METHODS, Row, is_exact, options_of

from benchmarks.step.memory import TensorBytes
from pgap_kernels.optim import PGAP, SVD0, SparseMeZO, ZOOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:16-bit weights")
SHAPES = [(300, 200), (200, 300), (256, 256), (64, 320)]
LARGEST = 4 * 256 * 256
OPTIONS = {"rank": 8, "probes": 3, "select": ["1.*", "2.*"], "exclude": [], "lr": 1e-6, "eps": 1e-3}
# Skinny factors that are made before they replace others: U and V, or u, v and N, of all matrices and up to twice for
# their sum; of one matrix in a refresh the test matrix, Q and a QR's two, and U and V of both signs, of r + 8 columns.
FACTORS, SVD = 2, 4
SMALL = 16 * 1024  # outputs and losses, coefficients, keys and cores
MODES = [pytest.param(r, m, id=f"{r.id}-{m}") for r in METHODS for m in r.modes if not m.endswith("-stacked")]


def held_and_peak(row: Row, mode: str, dtypes: list[torch.dtype]) -> tuple[int, int, ZOOptimizer]:
    """Bytes beyond the weights: the most after a step and the most at all, over two periods."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(n, m, bias=False) for m, n in SHAPES)
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    inputs = [torch.randn(2, layer.in_features, dtype=layer.weight.dtype) for layer in layers]

    def closure() -> torch.Tensor:
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        return torch.stack([y.float().square().mean() for y in outputs]).mean()

    count = TensorBytes(layers.parameters())
    weights, held = count.alive, 0
    with count:
        given = {name: value for name, value in row.options.items() if name not in OPTIONS}
        given |= {name: value for name, value in OPTIONS.items() if name in row.options}
        optimizer = row.make(layers, **given, **options_of(mode))
        for _ in range(2 * row.period):
            optimizer.step(closure)
            held = max(held, count.alive - weights)
    return held, count.peak - weights, optimizer


def transient(optimizer: ZOOptimizer) -> int:
    """Beyond what is declared: skinny factors of low-rank methods, and the small."""
    rank, both = OPTIONS["rank"], [m + n for m, n in SHAPES]
    lowrank = optimizer.lowrank_indices() is not None
    # Sparse-MeZO's: 16 bytes an element to sort magnitudes, 17 to pack bits; and the bits before they are kept.
    sort = (17 * LARGEST // 4 + sum(m * n // 8 for m, n in SHAPES)) if isinstance(optimizer, SparseMeZO) else 0
    return SMALL + sort + lowrank * 4 * (FACTORS * rank * sum(both) + SVD * (rank + 8) * max(both))


DTYPES = [(*run.values, torch.float32) for run in MODES]
DTYPES += [(*run.values, torch.bfloat16) for run in MODES if run.values[1] in ("scratch", "folded")]


@pytest.mark.parametrize("row, mode, dtype", [pytest.param(*d, id=f"{d[0].id}-{d[1]}-{d[2]}") for d in DTYPES])
def test_one_scratch_and_the_state(row, mode, dtype):
    held, peak, optimizer = held_and_peak(row, mode, [dtype] * len(SHAPES))
    cost, buffer = optimizer.cost(), optimizer.perturbation.scratch_bytes
    assert cost.state_bytes <= held <= cost.state_bytes + buffer + SMALL
    assert peak <= cost.state_bytes + cost.scratch_bytes + transient(optimizer)
    assert buffer == (LARGEST * dtype.itemsize // 4 if is_exact(mode) else 0)
    # A gradient in float32 where subspaces are estimated, beside the buffer of the forwards if it does not fit in it.
    gradient = LARGEST if row.make in (PGAP, SVD0) else 0
    assert cost.scratch_bytes == (buffer if buffer >= gradient else buffer + gradient)
    assert not gradient or peak > LARGEST  # counted at all


@pytest.mark.parametrize("row, mode", [run for run in MODES if run.values[0].id in ("mezo-3", "pgap", "dizo")])
def test_weights_of_two_types(row, mode):
    """All but the last of several writes are copied, to undo a failure: as much as the buffer is large."""
    _, peak, optimizer = held_and_peak(row, mode, [torch.float32, torch.bfloat16] * 2)
    cost, copies = optimizer.cost(), optimizer.perturbation.scratch_bytes
    assert peak <= cost.state_bytes + cost.scratch_bytes + copies + transient(optimizer)


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
