"""Buffers: all forwards of a step begin with the same ones, and what no forward changes is not copied."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from support.models import assert_same_weights
from support.recipes import EVERY_MODE, Net, make, seeded, take_steps
from support.selection import cycled
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

pytestmark = pytest.mark.filterwarnings("error")


BIG = 1 << 19  # elements: more bytes than are copied on suspicion


class Buffered(nn.Module):
    """A layer beside a buffer that each forward changes in some way; keeps what the forwards began with."""

    def __init__(self, change, size: int = 8, made=torch.zeros) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.change, self.began = change, []
        self.register_buffer("state", made(size) if size else None)

    def forward(self, x: Tensor) -> Tensor:
        begin = (0.0, 0) if self.state is None else (self.state.view(-1)[0].item(), self.state._version > 0)
        self.began.append((begin[0], torch.rand(1).item()))
        self.change(self, x)
        return self.layer(x) + (0 if self.state is None else self.state.view(-1)[0])


def add_in_place(module, x):
    module.state += 1


def add_past_the_version_counter(module, x):
    module.state.data.add_(1)


def add_by_view(module, x):
    module.state[:3] += 1


def replace(module, x):
    module.state = module.state + 1


def make_on_demand(module, x):
    if module.state is None:
        module.state = torch.randn(8)


def register_on_demand(module, x):
    if "late" not in module._buffers:
        module.register_buffer("late", torch.randn(8))
    module.began[-1] += (module.late[0].item(),)


def only_in_training(module, x):
    if module.training:
        module.state.data.add_(1)


CHANGES = {f.__name__: f for f in (add_in_place, add_past_the_version_counter, add_by_view, replace, only_in_training)}
SIZES = {"small": 8, "big": BIG}
# The step looks after buffers (ForwardState), for every mode and recipe alike: these take turns everywhere below.
CASES = ["mezo-inplace", "mezo-two_pass", "mezo-scratch", "pgap-folded", "pgap-window", "pizo-inplace"]


@pytest.mark.parametrize("change, size, case", cycled(list(itertools.product(CHANGES, SIZES)), CASES, each=2))
def test_a_buffer_that_every_forward_changes(change, size, case):
    """Moving statistics, codebooks: all forwards of a step begin with one state, and the last one's stays."""
    model = seeded(Buffered, CHANGES[change], SIZES[size])
    if change == "only_in_training":
        model.eval()
    optimizer = make(case, model)
    calls = []
    for step in range(4):
        if step == 2:
            model.train()
        model.began.clear()
        take_steps(optimizer, model)
        assert len({*model.began[-2:]}) == 1 and len({*model.began[1:]}) == 1
        calls.append(len(model.began))
        changes = change != "only_in_training" or step >= 2
        assert model.state.view(-1)[0].item() == model.began[-1][0] + changes
    learnt = size == "big" or change == "replace"  # with one forward more, the first time
    assert calls[0] - calls[1] >= learnt * (change != "only_in_training") or case.startswith("pgap")
    assert model.state.view(-1)[0].item() == (4 if change != "only_in_training" else 2) + learnt


class Growing(nn.Module):
    """A table that grows with the sequence, whose length the module notes beside it, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.length = nn.Linear(8, 2), 4
        self.register_buffer("table", torch.ones(4))

    def forward(self, x):
        if len(x) > self.length:
            self.length, self.table = len(x), torch.full((len(x),), 2.0)
        return self.layer(x) * self.table[: len(x), None]


@pytest.mark.parametrize("case", CASES)
def test_a_buffer_that_is_replaced_once_stays(case):
    model = seeded(Growing)
    optimizer = make(case, model)
    x = torch.ones(6, 8)
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
        assert len(model.table) == 6


@pytest.mark.parametrize("case, change", cycled(CASES, [make_on_demand, register_on_demand]))
def test_a_buffer_that_the_first_forward_makes(case, change):
    model = seeded(Buffered, change, 0 if change is make_on_demand else 8)
    optimizer = make(case, model)
    for step in range(3):
        model.began.clear()
        take_steps(optimizer, model)
        assert len({*model.began[step == 0 :]}) == 1


@pytest.mark.parametrize("case", EVERY_MODE)
def test_batch_norm_in_training(case):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    means = []
    model[1].register_forward_pre_hook(lambda module, args: means.append(module.running_mean.clone()))
    optimizer = make(case, model)
    for _ in range(3):
        means.clear()
        take_steps(optimizer, model)
        assert all(map(torch.equal, means, means[1:]))
    assert model[1].num_batches_tracked == 3 and model[1].running_mean.any()


def peak_of(call) -> int:
    """The largest piece of memory that a call asks torch for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("case, dtype", cycled(CASES, [torch.uint8, torch.int32, torch.float16, torch.bool]))
def test_a_large_buffer_that_no_forward_changes(case, dtype):
    """Packed weights of quantised models: no copy, not even once, and no forward more."""
    model = seeded(Buffered, lambda module, x: None, 64 * BIG, lambda size: torch.ones(size, dtype=dtype))
    optimizer = make(case, model)
    assert peak_of(lambda: take_steps(optimizer, model)) < model.state.nbytes
    model.began.clear()
    take_steps(optimizer, model)
    assert len(model.began) == {"pizo-inplace": 6}.get(case, 2)


UNUSUAL = {
    "expanded": lambda size: torch.ones(1, 1).expand(4, size),
    "inference": torch.inference_mode()(torch.ones),
    "meta": lambda size: torch.ones(size, device="meta"),
    "sparse": lambda size: torch.ones(size).to_sparse(),
    "wrapping": lambda size: TwoTensor(torch.ones(size), torch.ones(size)),
    "float64": lambda size: torch.ones(size, dtype=torch.float64),
    "empty": lambda size: torch.ones(0),
    "scalar": lambda size: torch.ones(()),
    "transposed": lambda size: torch.ones(size // 8, 8).T,
}


@pytest.mark.parametrize("kind, size, case", cycled(list(itertools.product(UNUSUAL, SIZES)), CASES))
def test_a_buffer_of_an_unusual_kind(kind, size, case):
    model, plain = seeded(Net), seeded(Net)
    model.register_buffer("unusual", UNUSUAL[kind](SIZES[size]))
    for m in (model, plain):
        take_steps(make(case, m), m, 2)
    assert_same_weights(plain, model)


@pytest.mark.parametrize("case, size", cycled(CASES, [8, BIG]))
def test_inference_mode_around_everything(case, size):
    """The model, its buffers, its forwards: "forward passes only"."""
    with torch.inference_mode():
        model = seeded(Buffered, lambda module, x: module.state.add_(1), size)
        model.forward = functools.partial(_forward_without_version, model)
        optimizer = make(case, model)
        for _ in range(3):
            model.began.clear()
            take_steps(optimizer, model)
            assert len({*model.began[-2:]}) == 1
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.merge()


def _forward_without_version(model, x):
    model.began.append((model.state[0].item(), torch.rand(1).item()))
    model.change(model, x)
    return model.layer(x)
