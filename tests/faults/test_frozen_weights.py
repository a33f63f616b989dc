"""Weights that are frozen and thawed between steps: as torch.optim does, and as a new optimizer would."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import EVERY, EVERY_MODE, Net, changed, loss_of, make, refused, seeded, take_steps
from support.selection import cycled
from torch import nn

pytestmark = pytest.mark.filterwarnings("error")


def fresh_run(case: str, steps: int, freeze, more: int, loss=loss_of) -> nn.Module:
    """As the run should have been: a new optimizer for the frozen model takes the state over."""
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model, steps, loss)
    state, copy = optimizer.state_dict(), seeded(Net)
    copy.load_state_dict(model.state_dict())
    freeze(copy)
    other = make(case, copy)
    other.load_state_dict(state)
    take_steps(other, copy, more, loss)
    other.merge()
    return copy


@pytest.mark.parametrize("case", EVERY)
def test_freezing_a_layer_of_a_copy(case):
    """Before the copy's first call, too, which then finds another model than the one that was copied."""

    def freeze(model):
        model.first.requires_grad_(False)

    expected = snapshot(fresh_run(case, 4, freeze, 5))
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model, 4)
    model, optimizer = copy.deepcopy((model, optimizer))
    freeze(model)
    take_steps(optimizer, model, 5)
    optimizer.merge()
    assert_same_weights(model, expected)


# Whatever is called in between, the base class looks at the weights first: two calls for each recipe and mode.
BETWEEN = ["nothing", "load", "load_and_read", "read", "cost", "mode"]


@pytest.mark.parametrize("case, between", cycled(EVERY, BETWEEN, each=2))
def test_freezing_a_layer_between_steps(case, between):
    def freeze(model):
        model.first.requires_grad_(False)
        model.last.weight.requires_grad_(False)

    expected = snapshot(fresh_run(case, 4, freeze, 5))
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model, 4)
    state = optimizer.state_dict()
    freeze(model)
    before = snapshot(model)
    if between.startswith("load"):
        optimizer.load_state_dict(state)
    if between.endswith("read"):
        optimizer.weights()
        optimizer.state_dict()
    if between == "cost":
        optimizer.cost()
    if between == "mode":
        optimizer.mode = optimizer.mode
    take_steps(optimizer, model, 5)
    optimizer.merge()
    assert {*changed(model, before)} == {"middle.weight", "middle.bias", "norm.weight", "norm.bias", "last.bias"}
    assert_same_weights(model, expected)


@pytest.mark.parametrize("case", EVERY)
def test_unfreezing_a_layer_between_steps(case):
    model = seeded(Net)
    model.first.requires_grad_(False)
    model.last.requires_grad_(False)
    optimizer = make(case, list(model.named_parameters()), model=model)
    take_steps(optimizer, model, 2)
    state = optimizer.state_dict()
    model.requires_grad_(True)
    before = snapshot(model)
    take_steps(optimizer, model, 3)
    with torch.no_grad():  # evaluates what the parameters are, whichever layer runs first
        evaluated = loss_of(model)
        optimizer.merge()
        assert loss_of(model).item() == pytest.approx(evaluated.item(), abs=1e-6)
    assert len(changed(model, before)) == len(before)
    optimizer.load_state_dict(state)  # made when they were frozen
    take_steps(optimizer, model, 2)


@pytest.mark.parametrize("case", EVERY_MODE)
def test_freezing_everything(case):
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model)
    model.requires_grad_(False)
    refused(ValueError, r"^params: got no trainable parameter", lambda: take_steps(optimizer, model))
    model.requires_grad_(True)
    take_steps(optimizer, model)
