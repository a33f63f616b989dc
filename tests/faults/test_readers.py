"""Whoever reads or writes the parameters between steps has the model that was trained."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.models import snapshot
from support.recipes import (
    DEFERRED,
    EVERY,
    EVERY_MODE,
    SIXTEEN_BIT_IN_PLACE,
    Net,
    adapted,
    distance,
    loss_of,
    make,
    refused,
    seeded,
    take_steps,
)
from support.selection import cycled
from torch import nn
from torch.optim.swa_utils import AveragedModel

pytestmark = pytest.mark.filterwarnings("error")


IMMEDIATE = [case for case in EVERY if case not in DEFERRED]


def as_vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).split([p.numel() for p in model.parameters()])


READERS = {
    "named_parameters": lambda m: [p for _, p in m.named_parameters()],
    "parameters_to_vector": as_vector,
    "deepcopy": lambda m: list(copy.deepcopy(m).parameters()),
    "state_dict": lambda m: list(m.state_dict().values()),
    "averaged_model": lambda m: list(AveragedModel(m).parameters()),
}


# That the parameters are the model is a fact of each recipe and mode (test_modes.py); how they are read is not.
@pytest.mark.parametrize("reader, case", cycled([*READERS], IMMEDIATE))
def test_reading_the_parameters_between_steps(reader, case):
    """The parameters, put into another model, are what the optimizer's own forward computes with."""
    model = seeded(Net)
    optimizer = make(case, model, lr=5e-2)
    for _ in range(5):
        take_steps(optimizer, model)
        other = Net()
        with torch.no_grad():
            for p, value in zip(other.parameters(), READERS[reader](model), strict=True):
                p.copy_(value.view_as(p))
            assert loss_of(other).item() == loss_of(model).item()


# A mode may find the parameters written, or other memory in them; the recipe asks for neither.
WRITES = ["copy_", "data", "load_state_dict", "vector_to_parameters"]


@pytest.mark.parametrize("case, write", cycled([*EVERY_MODE, "dizo-scratch"], WRITES, each=3))
def test_writing_the_parameters_between_steps(case, write):
    """Going back to the best weights: the next step goes on from them. DiZO's third begins a projection of two."""
    model = seeded(Net)
    optimizer = make(case, model, lr=5e-2)
    best = snapshot(model)
    start = loss_of(model).item()
    take_steps(optimizer, model, 3 if case == "dizo-scratch" else 5)
    optimizer.merge()  # nothing to do by default
    with torch.no_grad():
        if write == "copy_":
            for name, p in model.named_parameters():
                p.copy_(best[name])
        elif write == "data":
            for name, p in model.named_parameters():
                p.data = best[name].clone()
        elif write == "load_state_dict":
            model.load_state_dict(best)
        else:
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(best.values()), model.parameters())
    assert loss_of(model).item() == start
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, model)
    if case == "dizo-scratch":  # which moves the weights away from W0, where they are
        assert optimizer.last.loss == pytest.approx(start, rel=1e-6)
    optimizer.merge()
    assert distance(model, best) < 1e-6


@pytest.mark.parametrize("case, dtype", cycled(IMMEDIATE, [torch.float32, torch.bfloat16]))
def test_merging_an_adapter_between_steps(case, dtype):
    model = seeded(adapted).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SIXTEEN_BIT_IN_PLACE)
        optimizer = make(case, model, lr=5e-2)
    take_steps(optimizer, model, 5)
    with torch.no_grad():
        trained = loss_of(model).item()
        model.first, model.middle = model.first.merged(), model.middle.merged()
        assert loss_of(model).item() == pytest.approx(trained, abs={torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype])
    refused(RuntimeError, r"^model: .* is not one of its parameters any more", lambda: take_steps(optimizer, model))
