"""What a closure is and may do: questions about weights, grad modes, calls of the optimizer."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import (
    CASES,
    EVERY_MODE,
    HOOKED,
    INPUTS,
    LABELS,
    Net,
    distance,
    in_place,
    loss_of,
    make,
    refused,
    seeded,
    take_steps,
)
from support.selection import cycled
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("error")


def test_stepping_without_a_closure():
    optimizer = make("mezo-inplace", seeded(Net))
    for call in (optimizer.step, lambda: optimizer.step(None), lambda: optimizer.step(0.5)):
        refused(TypeError, r"^closure: got .*; accepted: a function that returns the loss", call)
    assert optimizer.steps == 0


@pytest.mark.parametrize("case", HOOKED)
def test_asking_a_weight_about_itself_in_the_closure(case):
    """Is no use: its shape, dtype, device, flags, and functions that hand it through."""
    model = seeded(Net)
    optimizer = make(case, model)

    def closure():
        w = model.middle.weight
        assert w.shape == (12, 12) and w.dtype == torch.float32 and w.numel() == 144 and w.device.type == "cpu"
        assert w.dim() == 2 and w.is_contiguous() and w.requires_grad and len(w) == 12 and w.element_size() == 4
        model.to("cpu")
        model.requires_grad_(True)
        model.zero_grad()
        w.contiguous()
        return loss_of(model)

    for _ in range(3):
        optimizer.step(closure)


@pytest.mark.parametrize("case", EVERY_MODE)
def test_a_closure_that_returns_the_same_tensor_each_time(case):
    """As one that replays a CUDA graph does: the next forward overwrites the loss of the last."""
    model, plain = seeded(Net), seeded(Net)
    optimizer, expected = make(case, model), make(case, plain)
    kept: list[torch.Tensor] = []

    def closure():
        loss = loss_of(model).detach()
        kept[:] = kept or [loss.clone()]
        return kept[0].copy_(loss)

    for _ in range(4):
        optimizer.step(closure)
        take_steps(expected, plain)
    optimizer.merge()
    expected.merge()
    assert distance(model, snapshot(plain)) == 0


@pytest.mark.parametrize("case", EVERY_MODE)
@pytest.mark.parametrize("mode", ["grad", "inference"])
def test_grad_and_inference_mode_inside_the_closure(case, mode):
    contexts = {"grad": torch.enable_grad, "inference": torch.inference_mode}
    model, plain = seeded(Net), seeded(Net)
    optimizer, expected = make(case, model), make(case, plain)

    def closure():
        with contexts[mode]():
            return loss_of(model)

    for step in range(6):
        optimizer.step(closure if step % 2 == 0 else lambda: loss_of(model))
        take_steps(expected, plain)
        with contexts[mode]():
            loss_of(model)
        with torch.no_grad():
            loss_of(plain)
    optimizer.merge()
    expected.merge()
    # Folded by products that autograd knows, whose roundings a step multiplies by lr |z| / (2 eps).
    folded = mode == "grad" and CASES[case][1]["mode"] == "folded"
    assert distance(model, snapshot(plain)) <= folded * 1e-4
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", EVERY_MODE)
def test_inputs_made_in_inference_mode(case):
    with torch.inference_mode():
        inputs = INPUTS.clone()
    model, plain = seeded(Net), seeded(Net)
    optimizer, expected = make(case, model), make(case, plain)
    for _ in range(4):
        optimizer.step(lambda: F.cross_entropy(model(inputs), LABELS))
        take_steps(expected, plain)
    optimizer.merge()
    expected.merge()
    assert_same_weights(model, plain)


@pytest.mark.parametrize("case", HOOKED)
def test_differentiating_by_the_inputs_inside_the_closure(case):
    """Forces, gradient penalties: graphs keep what the layers ran on."""

    def forces(model):
        with torch.enable_grad():
            x = INPUTS.clone().requires_grad_()
            (force,) = torch.autograd.grad(model(x).sum(), x)
        return force.pow(2).mean()

    seen = []
    for options in ({}, in_place(case)):
        model, losses = seeded(Net), []
        optimizer = make(case, model, **options)
        for _ in range(4):
            optimizer.step(lambda model=model, losses=losses: losses.append(forces(model)) or losses[-1])
        seen.append([loss.item() for loss in losses])
    assert seen[0] == pytest.approx(seen[1], abs=1e-6) and len({*seen[0]}) == len(seen[0])


# Calls that read are harmless where nothing is pending; the others are refused whatever the mode. Nothing watches who
# reads a model that is written in place.
READING = itertools.product(EVERY_MODE, ["merge", "state_dict", "model.state_dict"])
CALLS = [run for run in READING if run != ("mezo-inplace", "model.state_dict")]
CALLS += cycled(EVERY_MODE, ["step", "detach", "mode", "load_state_dict"], each=2)


@pytest.mark.parametrize("case, call", CALLS)
def test_calling_the_optimizer_inside_its_closure(case, call):
    """The rest of the forward would run at another point than its beginning: refused, or without effect."""
    model, plain = seeded(Net), seeded(Net)
    optimizer, expected = make(case, model), make(case, plain)
    for o, m in ((optimizer, model), (expected, plain)):
        take_steps(o, m, 3)
        state = o.state_dict()
        take_steps(o, m)  # in a window of its own
    calls = {
        "step": lambda: take_steps(optimizer, model),
        "merge": optimizer.merge,
        "state_dict": optimizer.state_dict,
        "model.state_dict": model.state_dict,
        "detach": optimizer.detach,
        "mode": lambda: setattr(optimizer, "mode", "inplace"),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }

    def closure():
        calls[call]()
        return loss_of(model)

    clean = optimizer.mode != "inplace" and not optimizer.pending  # the parameters are the model
    harmless = clean and call in ("merge", "state_dict", "model.state_dict")
    if harmless:
        optimizer.step(closure)
        take_steps(expected, plain)
    else:
        message = r": called in the closure of a step, at perturbed weights"
        refused(RuntimeError, message, lambda: optimizer.step(closure))
        with torch.no_grad():
            assert loss_of(model).item() == pytest.approx(loss_of(plain).item(), abs=1e-6)
    for o, m in ((optimizer, model), (expected, plain)):
        take_steps(o, m, 2)
        o.merge()
    assert distance(model, snapshot(plain)) < 1e-4
