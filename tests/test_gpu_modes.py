"""On a GPU: forwards captured in a CUDA graph and replayed are the forwards, in scratch and folded."""

from __future__ import annotations

import pytest
import torch
from support import gpu
from support.counted import UNIT
from support.methods import METHODS, options_of
from support.models import IDS, TARGET, Words

pytestmark = gpu.marks
RUNS = [pytest.param(r, m, id=f"{r.id}-{m}") for r in METHODS for m in r.modes if m in ("scratch", "folded", "window")]


def losses_of(row, mode, dtype, captured: bool):
    """Losses of the forwards of some steps across a refresh, the weights afterwards, the number of graphs."""
    model = Words().to(gpu.DEVICE, dtype)
    ids, target = IDS.to(gpu.DEVICE), TARGET.to(gpu.DEVICE)
    opt = row.make(model, **{**row.options, "lr": 0.02, **options_of(mode)})
    graphs, seen = {}, []

    def loss():
        return (model(ids).float() * target).mean()

    def closure():
        key = opt.perturbation.graph_key
        if not captured or not opt.steps:  # the first step tries the model out
            value = loss()
        else:
            if key not in graphs:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    loss()  # what is compiled or allocated at the first call
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    value = loss()
                graphs[key] = graph, value
            graph, value = graphs[key]
            graph.replay()
        seen.append(value.item())
        return value

    for _ in range(2 * row.period + 2):
        opt.step(closure)
    opt.merge()
    return torch.tensor(seen), [p.detach().cpu() for p in model.parameters()], len(graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row, mode", RUNS)
def test_replays_are_the_forwards(row, mode, dtype):
    """The same kernels on the same memory: the same bits."""
    seen, weights, graphs = losses_of(row, mode, dtype, captured=True)
    plain, same, _ = losses_of(row, mode, dtype, captured=False)
    assert torch.equal(seen, plain)
    assert all(torch.equal(w, v) for w, v in zip(weights, same, strict=True))
    assert 1 <= graphs <= 6 and len(seen) >= 2 * graphs
    assert (plain[::2] - plain[1::2]).abs().max() > 100 * UNIT
