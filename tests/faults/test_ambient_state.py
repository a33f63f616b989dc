"""Ambient state of torch has no effect on the optimizer's own tensors, nor on what a step does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import EVERY, INPUTS, LABELS, Net, make, seeded, setting, take_steps
from support.selection import cycled
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("error")


AMBIENT = {
    "inference_mode": torch.inference_mode,
    "grad_mode": torch.enable_grad,
    "device_context": lambda: torch.device("meta"),
    "default_device": lambda: setting(torch.set_default_device, "meta", None),
    "default_dtype_bf16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default_dtype_f64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


def run_of_all_calls(case: str, context, where: str):
    """Every public call in a run, some of them under an ambient state, and steps outside of it at the end."""

    def under(call: str):
        return context() if call in where else contextlib.nullcontext()

    model = seeded(Net)
    for last in (False, True):
        named = list(model.named_parameters())
        with under("make"):
            optimizer = make(case, named[:-2], model=model)
            optimizer.add_param_group({"params": named[-2:]})
            optimizer.mode = optimizer.mode
        if last:
            with under("read"):
                optimizer.load_state_dict(state)  # noqa: F821
        for _ in range(4):
            with under("step"):
                take_steps(optimizer, model)
        with under("read"):
            optimizer.cost()
            model.state_dict()
            state = optimizer.state_dict()  # noqa: F841
    take_steps(optimizer, model)
    return optimizer, model


# Each state with each recipe and mode, as both make tensors. Where it begins is a matter of the calls alone, each of
# which puts the state aside by itself: the two halves of the calls take turns.
RUNS = cycled([(case, ambient) for case in (*EVERY, "zo-muon-folded") for ambient in AMBIENT], ["step", "make read"])


@pytest.mark.parametrize("case, ambient, where", RUNS)
def test_optimizing_under_an_ambient_state_of_torch(case, ambient, where):
    expected = snapshot(run_of_all_calls(case, contextlib.nullcontext, "")[1])
    optimizer, model = run_of_all_calls(case, AMBIENT[ambient], where)
    assert_same_weights(model, expected)
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert not any(t.is_inference() or t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors)


def test_a_closure_sees_the_callers_default_device_and_dtype():
    model = seeded(Net)
    optimizer = make("mezo-inplace", model)
    seen = []

    def closure():
        seen.append((torch.zeros(1).device.type, torch.zeros(1, device="cpu").dtype))
        return F.cross_entropy(model(INPUTS), LABELS)

    with AMBIENT["default_device"](), AMBIENT["default_dtype_f64"]():
        optimizer.step(closure)
        assert torch.zeros(1).device.type == "meta"
    assert set(seen) == {("meta", torch.float64)}
