"""Two optimizers on one model, and one that was detached."""

from __future__ import annotations

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import (
    DEFERRED,
    EVERY_MODE,
    INPUTS,
    LABELS,
    Net,
    distance,
    loss_of,
    make,
    refused,
    seeded,
    take_steps,
)
from support.selection import cycled
from torch import nn
from torch.nn import functional as F

from pgap_kernels.optim import LOZO, MeZO

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("newest, members", [("window", 1), ("biases", 1), ("biases", 2)])
def test_a_decayed_window_beside_an_optimizer_of_the_biases(newest, members):
    """Layers whose output such a window would scale have biases in it that the window does not know."""

    def halves(model):
        return F.cross_entropy(model(torch.cat([INPUTS] * 2)), torch.cat([LABELS] * 2), reduction="none")

    losses = []
    for merged in (False, True):
        model = seeded(Net)
        matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
        rest = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
        options = {"mode": "folded", "merge": "window", "window": 10, "weight_decay": 5.0, "lr": 1e-2}
        of_the_rest = {"mode": "scratch", "lr": 1e-2, "eps": 0.1, "members": members}
        if newest == "window":
            other = MeZO(rest, model=model, **of_the_rest)
        window = LOZO(matrices, model=model, **options)
        if newest == "biases":
            other = MeZO(rest, model=model, **of_the_rest)
        take_steps(window, model, 2)
        if merged:
            window.merge()
        take_steps(other, model, loss=loss_of if members == 1 else halves)
        losses.append(other.last.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] != pytest.approx(losses[0][1], rel=1e-3)


# What the older one leaves in the model and what the newer one looks for: hooks, whoever's they are.
PAIRS = cycled(EVERY_MODE, EVERY_MODE[1:] + EVERY_MODE[:1], each=3)


@pytest.mark.parametrize("older, newer", PAIRS)
def test_two_optimizers_with_disjoint_weights(older, newer):
    """As two that take turns at the model, each made anew for its step."""

    def halves(model):
        named = list(model.named_parameters())
        return named[:4], named[4:]

    model = seeded(Net)
    both = [make(c, part, model=model) for c, part in zip((older, newer), halves(model), strict=True)]
    for _ in range(4):
        for optimizer in both:
            take_steps(optimizer, model)
    for optimizer in both:
        optimizer.merge()
    turns, states = seeded(Net), {}
    for step in range(4):
        for which, (c, part) in enumerate(zip((older, newer), halves(turns), strict=True)):
            optimizer = make(c, part, model=turns)
            if step:
                optimizer.load_state_dict(states[which])
            take_steps(optimizer, turns)
            states[which] = optimizer.state_dict()
            optimizer.detach()
    # Those are merged less often: their losses differ by a rounding, which a step multiplies by lr |z| / (2 eps).
    deferred = {older, newer} & {*DEFERRED}
    assert distance(model, snapshot(turns)) <= (1e-4 if deferred else 0.0)


@pytest.mark.parametrize("older, newer", PAIRS)
def test_two_optimizers_that_share_a_weight(older, newer):
    model = seeded(Net)
    named = list(model.named_parameters())
    first = make(older, named[:4], model=model)
    take_steps(first, model, 2)
    with torch.no_grad():
        evaluated = loss_of(model).item()
    second = make(newer, named[2:], model=model)
    with torch.no_grad():
        assert loss_of(model).item() == pytest.approx(evaluated, abs=1e-6)  # merged, nothing lost
    take_steps(second, model, 2)
    if older == "mezo-inplace":  # holds nothing in the model between its steps
        take_steps(first, model, 2)
    else:
        message = r"^step: a newer optimizer has taken over 'middle\.weight' and its model's hooks; make a new"
        refused(RuntimeError, message, lambda: take_steps(first, model))
        model.bfloat16().float()  # a change of the model does not bring it back
        refused(RuntimeError, message, lambda: take_steps(first, model))
    take_steps(second, model, 2)


@pytest.mark.parametrize("case", EVERY_MODE)
def test_stepping_after_detach(case):
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model, 2)
    state = optimizer.state_dict()
    optimizer.detach()
    optimizer.detach()
    before = snapshot(model)
    message = r"the optimizer was detached from its model; make a new optimizer to go on$"
    refused(RuntimeError, rf"^step: {message}", lambda: take_steps(optimizer, model))
    refused(RuntimeError, rf"^load_state_dict: {message}", lambda: optimizer.load_state_dict(state))
    refused(RuntimeError, rf"^mode: {message}", lambda: setattr(optimizer, "mode", optimizer.mode))
    extra = [("extra", nn.Parameter(torch.zeros(2)))]
    refused(RuntimeError, rf"^add_param_group: {message}", lambda: optimizer.add_param_group({"params": extra}))
    model.first.requires_grad_(False)
    refused(RuntimeError, rf"^step: {message}", lambda: take_steps(optimizer, model))
    optimizer.merge()
    assert optimizer.state_dict()["zo"]["steps"] == 2
    assert_same_weights(model, before)
    take_steps(make(case, model), model)
