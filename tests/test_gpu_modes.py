"""On a GPU: forwards captured in a CUDA graph and replayed are the forwards, in every mode."""

from __future__ import annotations

import pytest
import torch
from support import gpu
from support.counted import UNIT
from support.methods import METHODS, options_of
from support.models import IDS, TARGET, Words

from pgap_kernels.optim import CapturedClosure

pytestmark = gpu.marks
MODES = ("inplace", "two_pass", "scratch", "folded", "window")
RUNS = [pytest.param(row, m, id=f"{row.id}-{m}") for row in METHODS for m in row.modes if m in MODES]


def losses_of(row, mode, dtype, captured: bool):
    """Losses of the forwards of some steps across a refresh, the weights afterwards, the number of graphs, and of kinds
    of forwards that came in several steps."""
    model = Words().to(gpu.DEVICE, dtype)
    ids, target = IDS.to(gpu.DEVICE), TARGET.to(gpu.DEVICE)
    opt = row.make(model, **{**row.options, "lr": 0.02, **options_of(mode)})
    seen, kinds = [], {}
    own = CapturedClosure(opt, lambda: (model(ids).float() * target).mean())

    def closure():
        if not opt.perturbation.watched:
            kinds.setdefault(opt.perturbation.graph_key, set()).add(opt.steps)
        value = own() if captured else own.closure()
        seen.append(value.item())
        return value

    for _ in range(2 * row.period + 2):
        opt.step(closure)
    opt.merge()
    returning = sum(len(steps) > 1 for steps in kinds.values())
    return torch.tensor(seen), [p.detach().cpu() for p in model.parameters()], len(own.graphs), returning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row, mode", RUNS)
def test_replays_are_the_forwards(row, mode, dtype):
    """The same kernels on the same memory: the same bits."""
    seen, weights, graphs, returning = losses_of(row, mode, dtype, captured=True)
    plain, same, _, _ = losses_of(row, mode, dtype, captured=False)
    assert torch.equal(seen, plain)
    assert all(torch.equal(w, v) for w, v in zip(weights, same, strict=True))
    assert min(1, returning) <= graphs <= min(6, returning)  # other layers in each step (LeZO): hardly any returns
    assert (plain[::2] - plain[1::2]).abs().max() > 100 * UNIT
