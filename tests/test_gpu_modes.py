"""On a GPU: forwards captured in a CUDA graph and replayed are the forwards, in scratch and folded."""

from __future__ import annotations

import gpu
import pytest
import torch
from optim_contract import UNIT
from test_modes import IDS, TARGET, Words
from torch import nn

from pgap_kernels import noise
from pgap_kernels.ops import draw
from pgap_kernels.optim import PGAP, MeZO

pytestmark = gpu.marks


def wide_words() -> nn.Module:
    """The same layers with sides above the ranks whose P = A C is made by a launch of its own."""
    model = nn.Sequential(nn.Embedding(11, 70), nn.Linear(70, 66), nn.LayerNorm(66), nn.Linear(66, 11))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.5 * draw(p.shape, 2, noise.tensor_id(name)))
    return model


def losses_of(method, mode, dtype, captured: bool, rank: int = 3):
    """Losses of some steps across a refresh, and the weights afterwards."""
    model = (Words() if rank == 3 else wide_words()).to(gpu.DEVICE, dtype)
    ids, target = IDS.to(gpu.DEVICE), TARGET.to(gpu.DEVICE)
    options = {"probes": 2} if method is MeZO else {"rank": rank, "window": 3, "probes": 2, "weight_decay": 0.5}
    opt = method(model, lr=0.02, eps=0.02, seed=3, mode=mode, **options)
    graphs, seen = {}, []

    def loss():
        return (model(ids).float() * target).mean()

    def closure():
        key = opt.perturbation.graph_key
        if not captured:
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

    for _ in range(7):
        opt.step(closure)
    opt.merge()
    if captured:
        assert 1 <= len(graphs) <= 4 and len(seen) >= 3 * len(graphs)
    return torch.tensor(seen), [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "mode", "rank"),
    [(MeZO, "scratch", 3), *((PGAP, mode, rank) for mode in ("scratch", "folded") for rank in (3, 16, 64))],
)
def test_replays_are_the_forwards(method, mode, rank, dtype):
    """The same kernels on the same memory: the same bits."""
    (seen, weights), (plain, same) = (losses_of(method, mode, dtype, captured, rank) for captured in (True, False))
    assert torch.equal(seen, plain)
    assert all(torch.equal(w, v) for w, v in zip(weights, same, strict=True))
    assert (plain[::2] - plain[1::2]).abs().max() > 100 * UNIT
