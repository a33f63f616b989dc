"""A step that fails anywhere has not been: weights, windows and modules are as before, and so is what follows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import bits
from optim_contract import UNIT, failing, restored_bound, snapshot
from test_modes import Losses, Words
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pgap_kernels import draw
from pgap_kernels.optim import PGAP, MeZO, NonFiniteLossError
from pgap_kernels.perturbation.residual import joined

EXACT = [(MeZO, "scratch"), (MeZO, "scratch-paired"), (PGAP, "scratch"), (PGAP, "folded"), (PGAP, "folded-paired")]
WINDOW = 3  # step 0 refreshes, 1 runs in an open window, 2 closes it, 3 refreshes
LAYERS = ("addmm", "mm", "bmm", "embedding", "native_layer_norm", "linear")


class Failing(TorchDispatchMode):
    """Raises at call number ``at`` of an op of this package, of a layer or of the SVD; counts the calls."""

    def __init__(self, at: int = -1, error: type[BaseException] = MemoryError) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("pgap_kernels::") or "linalg" in name or name.removeprefix("aten::") in LAYERS:
            self.calls += 1
            if self.calls == self.at + 1:
                raise self.error("deliberate")
        return func(*args, **(kwargs or {}))


def mixed() -> nn.Module:
    """Weights of two dtypes."""
    model = Words()
    model.norm.to(torch.bfloat16)
    model.down.to(torch.bfloat16)
    model.norm.register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
    model.head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return model


class Many(Words):
    """Several dtypes and ranks, each of whose weights together are larger than the largest of all."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.narrow = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(5))).to(torch.bfloat16)
        self.wide = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(3)))
        with torch.no_grad():
            for p in (*self.narrow.parameters(), *self.wide.parameters()):
                p.copy_(torch.eye(len(p)) + 0.1 * draw(p.shape, 2, len(p)))

    def forward(self, ids):
        hidden = self.narrow(self.embed(ids).to(torch.bfloat16)).float()
        return self.head(self.down(self.wide(self.norm(self.up(hidden)))))


def build(method, mode, model=Words, **options):
    net = model()
    own = {"rank": 7, "window": WINDOW, "probes": 2} if method is PGAP else {"probes": 2}
    base = {"lr": 0.05, "eps": 0.02, "seed": 5, "weight_decay": 0.5} | own
    chosen = {"mode": mode.removesuffix("-paired"), "paired": mode.endswith("-paired")}
    if mode == "two_pass":
        chosen = {"mode": "inplace", "two_pass": True}
    opt = method(net, **(base | chosen | options))
    return net, opt, Losses(net, mode.endswith("-paired"))


def state_of(model, opt) -> dict:
    """Everything that a step may change, to the bit; windows by what they hold."""
    state = {name: bits(p.detach()) for name, p in model.named_parameters()}
    for number, window in getattr(opt.perturbation, "windows", {}).items():
        if window.open:
            state[f"core {number}"] = bits(window.core.clone())
            state[f"keep {number}"] = torch.tensor([window.keep], dtype=torch.float64)
    if opt.perturbation.residual is not None:
        state |= {f"plane {name}": plane.clone() for name, plane in opt.perturbation.residual.planes.items()}
    return state


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_clean(opt, parameters: dict) -> None:
    assert all(module._parameters[name] is p for (module, name), p in parameters.items())
    assert not any(opt.perturbation.arena.top.values())
    assert not opt.perturbation.frames and not opt.perturbation.active


def parameters_of(model) -> dict:
    return {(module, name): p for module in model.modules() for name, p in module._parameters.items()}


def undisturbed(method, mode, steps, **options):
    """The states before each step of a run, and after the last; the calls in each step."""
    model, opt, closure = build(method, mode, **options)
    states, calls = [state_of(model, opt)], []
    for _ in range(steps):
        with Failing() as mode_:
            opt.step(closure)
        states.append(state_of(model, opt))
        calls.append(mode_.calls)
    return states, calls


def check_every_call(method, mode, step, stride, error=MemoryError, **options):
    """Failures at every so many calls of a step, one after the other in one run: none leaves a trace."""
    states, calls = undisturbed(method, mode, step + 3, **options)
    model, opt, closure = build(method, mode, **options)
    parameters = parameters_of(model)
    for _ in range(step):
        opt.step(closure)
    failed = 0
    for at in itertools.count(0, stride):
        try:
            with Failing(at, error):
                opt.step(closure)
        except error:
            failed += 1
        else:
            break
        assert_clean(opt, parameters)
        assert_same(state_of(model, opt), states[step])
        assert opt.steps == step
    assert stride * (failed + 2) >= calls[step]  # the direction that was drawn in the first try is kept
    assert_same(state_of(model, opt), states[step + 1])
    for later in range(step + 1, step + 3):
        opt.step(closure)
        assert_same(state_of(model, opt), states[later + 1])


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("method, mode", EXACT)
def test_a_failing_call(method, mode, step):
    """Of an op or a layer in an evaluation, of the assembly or the SVD, of a landing or the merge."""
    check_every_call(method, mode, step, 2 if step == 0 else 1)


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("method, mode", EXACT)
def test_a_failing_call_with_buckets_of_dtypes_and_ranks(method, mode):
    check_every_call(method, mode, WINDOW - 1, 1, model=mixed)


def masters(state: dict) -> dict:
    """The float32 values of a state with residual planes."""
    values = {}
    for name, value in state.items():
        if name.startswith("plane "):
            continue
        plane = state.get(f"plane {name}")
        values[name] = value if plane is None else joined(value.to(torch.int16).view(torch.bfloat16), plane)
    return values


@pytest.mark.parametrize("method, mode", EXACT)
def test_a_failing_call_with_residual_planes(method, mode):
    """Weights with a plane are written a few at a time: those before a failure come back as float32 does, to rounding.

    Each is moved by an update u and back: four roundings of at most |w| + |u|, and two of (1 - d) and its inverse.
    """
    states, _ = undisturbed(method, mode, WINDOW, model=mixed, residual=True)
    model, opt, closure = build(method, mode, model=mixed, residual=True)
    for _ in range(WINDOW - 1):
        opt.step(closure)
    wanted, after = masters(states[WINDOW - 1]), masters(states[WINDOW])
    for at in itertools.count(0):
        try:
            with Failing(at, MemoryError):
                opt.step(closure)
        except MemoryError:
            got = masters(state_of(model, opt))
            for name, value in wanted.items():
                if f"plane {name}" not in states[0]:
                    assert torch.equal(got[name], value), name
                    continue
                size = value.double().abs() + (after[name].double() - value.double()).abs()
                bound = 8 * (at + 1) * torch.finfo(torch.float32).eps * size
                assert ((got[name].double() - value.double()).abs() <= bound).all(), name
            continue
        break
    assert at > 2


@pytest.mark.parametrize("method, mode", EXACT)
def test_an_interrupt_at_a_call(method, mode):
    check_every_call(method, mode, 0, 3, KeyboardInterrupt)


def same_to_rounding(left: dict, right: dict) -> None:
    """Weights that were moved and moved back: some roundings each way, of values up to the largest."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        dtype = {torch.int32: torch.float32, torch.int16: torch.bfloat16}.get(value.dtype)
        if dtype is None:
            assert torch.equal(value, right[name]), name
            continue
        got, want = (v.view(dtype).double() for v in (value, right[name]))
        assert (got - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max(), name


@pytest.mark.parametrize("kind, same", [(mixed, assert_same), (Many, same_to_rounding)])
@pytest.mark.parametrize("method, mode", EXACT)
def test_a_landing_that_fails_late_is_undone(method, mode, kind, same, monkeypatch):
    """Of several writes each in turn fails, and those before it come back: to the bit, where copies of them fit."""
    states, _ = undisturbed(method, mode, WINDOW, model=kind)
    model, opt, closure = build(method, mode, model=kind)
    for _ in range(WINDOW - 1):
        opt.step(closure)
    real, order = opt.perturbation.landing, []

    def landing(*args):
        return [failing(write) for write in real(*args)]

    def failing(write):
        number = len(order)
        order.append(0)

        def do():
            if number == fail_at:
                raise MemoryError("deliberate")
            write.do()

        return write._replace(do=do)

    monkeypatch.setattr(opt.perturbation, "landing", landing)
    fail_at = 0
    while True:
        del order[:]
        try:
            opt.step(closure)
        except MemoryError:
            same(state_of(model, opt), states[WINDOW - 1])
            fail_at += 1
            continue
        break
    assert fail_at == len(order) >= 2
    if same is assert_same:
        assert_same(state_of(model, opt), states[WINDOW])


@pytest.mark.parametrize("kind, error", [(ValueError, ValueError), (KeyboardInterrupt, KeyboardInterrupt),
                                         (math.nan, NonFiniteLossError), ("vector", ValueError)])  # fmt: skip
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("method, mode", EXACT)
def test_a_failing_closure(method, mode, step, kind, error):
    states, _ = undisturbed(method, mode, step + 2)
    model, opt, closure = build(method, mode)
    parameters = parameters_of(model)
    for _ in range(step):
        opt.step(closure)
    opt_calls = (2 if method is MeZO else 1) + (2 if method is PGAP and step == 0 else 0)
    for call in range(opt_calls * (1 if mode.endswith("-paired") else 2)):
        closure.calls = 0

        def fails(call=call):
            loss = closure()
            return failing(kind)().expand(loss.shape if kind != "vector" else 2) if closure.calls == call + 1 else loss

        if kind == "vector" and mode.endswith("-paired"):

            def fails(call=call, fails=fails):  # of two losses one is missing
                return fails()[:1] if closure.calls == call else closure()[: 1 if closure.calls == call + 1 else 2]

        with pytest.raises(error):
            opt.step(fails)
        assert_clean(opt, parameters)
        assert_same(state_of(model, opt), states[step])
    for later in range(step, step + 2):
        opt.step(closure)
        assert_same(state_of(model, opt), states[later + 1])


@pytest.mark.parametrize("method, mode", EXACT)
def test_a_buffer_that_cannot_be_had(method, mode, monkeypatch):
    """No memory for the scratch in the first forward: the next try has all of it."""
    states, _ = undisturbed(method, mode, 1)
    model, opt, closure = build(method, mode)
    real = torch.empty

    def empty(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            raise MemoryError("deliberate")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty", empty)
        opt.step(closure)
    assert_clean(opt, parameters_of(model))
    opt.step(closure)
    assert_same(state_of(model, opt), states[1])
    assert_clean(opt, parameters_of(model))


@pytest.mark.parametrize("mode", ["folded", "folded-paired"])
def test_a_merge_that_fails_keeps_the_window(mode):
    states, _ = undisturbed(PGAP, mode, 2, model=mixed)
    model, opt, closure = build(PGAP, mode, model=mixed)
    for _ in range(2):
        opt.step(closure)
    for at in (0, 1):  # a bucket of each dtype at least
        with pytest.raises(MemoryError), Failing(at) as counted:
            opt.merge()
        assert counted.calls == at + 1
        assert_same(state_of(model, opt), states[2])
    opt.merge()
    assert not opt.perturbation.pending


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("method", [MeZO, PGAP])
def test_two_passes_restore_to_rounding(method, step):
    """Of the schedule that leaves the weights perturbed: after a failure they are clean."""
    twin, plain, same = build(method, "inplace")
    model, opt, closure = build(method, "two_pass")
    for _ in range(step):
        opt.step(closure)
        plain.step(same)
    _, probe, calls = build(method, "two_pass")
    for _ in range(step):
        probe.step(calls)
    with Failing() as counted:
        probe.step(calls)
    landing = 2 if method is PGAP else 1  # what follows it is the next step's
    for at in range(counted.calls - landing):
        with pytest.raises(MemoryError), Failing(at):
            opt.step(closure)
        assert not opt.perturbation.pending
    for name, w in snapshot(model).items():
        bound = restored_bound(snapshot(twin)[name], opt.passes + plain.passes, 0.02)
        spread = 100 * UNIT * step / 0.02  # rounding in the losses, through the update
        assert ((w - snapshot(twin)[name]).abs() <= bound + spread).all()
    opt.step(closure)
    assert opt.steps == step + 1
