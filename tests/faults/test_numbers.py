"""Hyper-parameters of other types of number, what schedulers make of them, and what is no number."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import EVERY, EVERY_MODE, PGAP_OPTIONS, Net, make, refused, seeded, take_steps
from support.selection import cycled

from pgap_kernels.optim import PGAP

pytestmark = pytest.mark.filterwarnings("error")


NUMBERS = {
    "int": 1,
    "np_float32": np.float32(1e-3),
    "np_float64": np.float64(1e-3),
    "np_int64": np.int64(1),
    "np_array": np.array(1e-3),
    "0_dim_tensor": torch.tensor(1e-3),
    "one_element": torch.tensor([1e-3]),
    "bf16_tensor": torch.tensor(1e-3, dtype=torch.bfloat16),
    "int_tensor": torch.tensor(1),
}


def as_python(value):
    return value.item() if hasattr(value, "item") else value


# One function converts the numbers of all names (options.number): each name is given to it, and each type.
NAMES = ["lr", "eps", "weight_decay", "delta", "lr_dense", "eps_dense", "eps_probe"]


@pytest.mark.parametrize("name, number", cycled(NAMES, [*NUMBERS], each=2))
def test_giving_a_hyper_parameter_as_another_type_of_number(name, number):
    given, models = NUMBERS[number], [seeded(Net) for _ in range(2)]
    for model, value in zip(models, (given, as_python(given)), strict=True):
        optimizer = PGAP(model, mode="inplace", **{"lr": 1e-3, **PGAP_OPTIONS, name: value})
        take_steps(optimizer, model, 2)
        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        stream.seek(0)
        if number != "np_array":  # an array stays what it is, as a tensor does
            optimizer.load_state_dict(torch.load(stream, weights_only=True))
        take_steps(optimizer, model, 2)
    assert_same_weights(*models)


INTEGERS = [np.int64(2), np.int8(2), torch.tensor(2), np.array(2)]  # converted by options.at_least_one
COUNTS = [("pgap-folded", "rank"), ("pgap-scratch", "window"), ("mezo-inplace", "probes")]


@pytest.mark.parametrize("number, case, name", cycled(INTEGERS, COUNTS))
def test_giving_a_count_as_another_type_of_number(number, case, name):
    models = [seeded(Net) for _ in range(2)]
    for model, value in zip(models, (number, 2), strict=True):
        take_steps(make(case, model, **{name: value}), model, 3)
    assert_same_weights(*models)


MOMENTS = {"beta1": np.float32(0.5), "beta2": torch.tensor(0.5), "gamma": np.float32(2), "floor": torch.tensor(0.5),
           "batch_size": np.int64(4), "anneal_steps": torch.tensor(8.0)}  # fmt: skip


@pytest.mark.parametrize("name", MOMENTS)
def test_giving_a_momentum_as_another_type_of_number(name):
    models = [seeded(Net) for _ in range(2)]
    for model, value in zip(models, (MOMENTS[name], as_python(MOMENTS[name])), strict=True):
        take_steps(make("helene-scratch", model, **{name: value}), model, 3)
    assert_same_weights(*models)


schedulers = torch.optim.lr_scheduler
TABLE = np.linspace(1, 0.1, 10, dtype=np.float32)
SCHEDULES = {
    "lambda_of_numpy": lambda o: schedulers.LambdaLR(o, lambda step: TABLE[step]),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 2e-2, total_steps=10, cycle_momentum=False),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 3),
    "warmup": lambda o: schedulers.LinearLR(o),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.5)], milestones=[2]
    ),
}


# Schedulers do arithmetic on what the group has; modes and recipes ask for the number that comes out of it.
KINDS = {"float": float, "numpy": np.float32, "tensor": torch.tensor}
RATES = list(itertools.product(SCHEDULES, KINDS))


@pytest.mark.parametrize("schedule, kind, case", cycled(RATES, EVERY_MODE))
def test_scheduling_the_learning_rate(schedule, kind, case):
    kind = KINDS[kind]
    models = [seeded(Net) for _ in range(2)]
    optimizer = make(case, models[0], lr=kind(1e-2))
    by_hand = make(case, models[1], lr=float(kind(1e-2)))
    scheduler = SCHEDULES[schedule](optimizer)
    rates = []
    for _ in range(5):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        by_hand.param_groups[0]["lr"] = rates[-1]
        for o, model in ((optimizer, models[0]), (by_hand, models[1])):
            take_steps(o, model)
        scheduler.step()
    optimizer.merge()
    by_hand.merge()
    assert len({*rates}) > 1
    assert_same_weights(*models)
    copy = make(case, seeded(Net))
    copy.load_state_dict(optimizer.state_dict())
    assert float(copy.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])


BAD_NUMBERS = {
    "lr": [math.nan, math.inf, "1e-3", None, True, 1j, torch.ones(2), torch.ones((), device="meta")],
    "eps": [math.nan, 0, 0.0, -1e-3, "x", torch.tensor(0.0)],
    "weight_decay": [math.nan, None],
}


# The base class checks these before it asks the recipe or the mode for anything: one recipe for each number.
BAD = [(name, value) for name, values in BAD_NUMBERS.items() for value in values]


@pytest.mark.parametrize("name, value, case", cycled(BAD, EVERY))
def test_scheduling_what_is_no_number(name, value, case):
    """Refused by its name before anything is perturbed, in the constructor as in a step."""
    if not (name == "weight_decay" and case.startswith("dizo")):  # which has none
        with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: "):
            make(case, seeded(Net), **{name: value})
    model, calls = seeded(Net), []
    optimizer = make(case, model)
    take_steps(optimizer, model)
    before, good = snapshot(model), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    refused(ValueError, rf"^{name}: got .*; accepted: ", lambda: optimizer.step(lambda: calls.append(1)))
    assert not calls
    assert_same_weights(model, before)
    optimizer.param_groups[0][name] = good
    take_steps(optimizer, model)
