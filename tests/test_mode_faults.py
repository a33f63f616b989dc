"""A step that fails anywhere has not been: weights, windows and modules are as before, and so is what follows."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from support.contract import Contract, build
from support.helpers import bits
from support.methods import METHODS, ROWS, is_exact
from support.models import Losses, Words, assert_clean, failing, filled, parameters_of, snapshot
from support.selection import runs, some_runs, unstacked
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pgap_kernels.optim import NonFiniteLossError
from pgap_kernels.perturbation.residual import joined

pytestmark = pytest.mark.filterwarnings("ignore:16-bit weights")
ROW = {row.id: row for row in ROWS}
# An element that is at its threshold may be on the other side after the roundings of a restoration.
IN_PLACE = runs([row for row in METHODS if row.id != "sparse-mezo"], lambda mode: not is_exact(mode))
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


def some_of(calls: int, early: int = 3, late: int = 3) -> list[int]:
    """Where to fail: at some of the evaluations' calls, and at each of the last, which write."""
    first = max(0, calls - late)
    return sorted({*range(first, calls), *(round(i * first / early) for i in range(early))} & {*range(calls)})


def exact(*ids: str) -> list:
    """The methods of these names in each mode that leaves the weights alone, with one point in each forward."""
    return runs([ROW[id] for id in ids], lambda mode: is_exact(mode) and unstacked(mode))


def large() -> Words:
    """Copies of all but the last write fit: as much as the largest weight is copied."""
    return Words(words=60)


def mixed() -> Words:
    """Weights of two dtypes."""
    model = large()
    for layer in (model.norm, model.affine, model.down, model.lora_a, model.lora_b):
        layer.to(torch.bfloat16)
    model.norm.register_forward_pre_hook(_to_bfloat16)
    model.head.register_forward_pre_hook(_to_float)
    return model


def _to_bfloat16(module, args):
    return (args[0].to(torch.bfloat16),)


def _to_float(module, args):
    return (args[0].float(),)


class Many(Words):
    """Several dtypes and ranks, each of whose weights together are larger than the largest of all."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.narrow = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(5)))
        self.wide = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(3)))
        filled(self)
        with torch.no_grad():
            for p in (*self.narrow.parameters(), *self.wide.parameters()):
                p.add_(torch.eye(len(p)))
        self.narrow.to(torch.bfloat16)

    def forward(self, ids):
        hidden = self.narrow(self.embed(ids).to(torch.bfloat16)).float()
        return self.head(self.down(self.wide(self.norm(self.up(hidden)))) + 0 * self.affine(hidden) + self.lora(hidden))

    def lora(self, hidden):
        return self.lora_b(self.lora_a(hidden.repeat(1, 1, 2)[..., :9]))


def state_of(model, opt) -> dict[str, torch.Tensor]:
    """Everything that a step may change, to the bit; a window by what the model's forward makes of it."""
    state = {name: bits(p.detach()) for name, p in model.named_parameters()}
    state["forward"] = bits(Losses(model)().detach())
    if opt.perturbation.residual is not None:
        state |= {f"plane {name}": plane.clone() for name, plane in opt.perturbation.residual.planes.items()}
    return state


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def begun(row, mode, step, model=large, **options):
    """A run before a step, and what undisturbed steps make of it: states before, after, and the calls of the step."""
    net, opt, _ = build(row, mode, model(), **options)
    for _ in range(step):
        opt.step(Losses(net, mode.endswith("stacked")))
    other, twin = copy.deepcopy((net, opt))
    states = [state_of(other, twin)]
    with Failing() as count:
        twin.step(Losses(other, mode.endswith("stacked")))
    states.append(state_of(other, twin))
    return net, opt, states, count.calls


def fail(net, opt, mode, at: int, error: type[BaseException] = MemoryError):
    """A copy of a run whose step fails at a call."""
    other, twin = copy.deepcopy((net, opt))
    parameters = parameters_of(other)
    with pytest.raises(error, match="deliberate"), Failing(at, error):
        twin.step(Losses(other, mode.endswith("stacked")))
    assert_clean(parameters)
    assert twin.steps == opt.steps
    return other, twin


# One step of each kind in each mode: by a rule, a projection, a refresh from subspaces, the merge of a window.
STEPS = [
    ("helene", "scratch", 1),
    ("dizo", "scratch", 5),
    ("lozo", "folded", 1),
    ("lozo", "window", 2),
    ("pgap", "window", 3),
    pytest.param("pgap", "folded", 3, marks=pytest.mark.slow),
    pytest.param("helene", "scratch-stacked", 1, marks=pytest.mark.slow),
    pytest.param("lozo", "window-stacked", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("id, mode, step", STEPS)
def test_a_failing_call(id, mode, step):
    """Any: of an op or a layer in an evaluation, of the assembly or the SVD, of an update or a merge."""
    fail_at(range, ROW[id], mode, step, **({"probes": 1} if id == "pgap" else {}))  # all probes are alike


# What fails in a mode is above, what another recipe has changed by then is here.
@pytest.mark.parametrize("id", ["mezo-3", "pizo-greedy", "lozo-m"])
def test_a_failing_call_of_another_method(id):
    fail_at(some_of, ROW[id], "scratch", 1)


@pytest.mark.parametrize("id, mode", [("pgap", "folded-stacked"), ("mezo-3", "scratch-stacked")])
def test_a_failing_call_with_both_signs_in_a_forward(id, mode):
    fail_at(some_of, ROW[id], mode, 1)


def fail_at(some, row, mode: str, step: int, **options) -> None:
    """Fail at some of a step's calls; now and then the step is tried again."""
    net, opt, states, calls = begun(row, mode, step, **options)
    for number, at in enumerate(some(calls)):
        other, twin = fail(net, opt, mode, at, (MemoryError, KeyboardInterrupt)[number % 2])
        assert_same(state_of(other, twin), states[0])
        if number % 3 == 2:
            twin.step(Losses(other, mode.endswith("stacked")))
            assert_same(state_of(other, twin), states[1])


@pytest.mark.parametrize("row, mode", exact("mezo-3", "pgap", "helene", "dizo"))
def test_an_update_of_several_writes_that_fails(row, mode):
    """Weights of two dtypes: those that were written before the failure come back, to the bit, where copies fit."""
    step = row.period - 1 or 1
    net, opt, states, calls = begun(row, mode, step, mixed)
    for at in some_of(calls, early=0, late=6):
        other, twin = fail(net, opt, mode, at)
        assert_same(state_of(other, twin), states[0])
    twin.step(Losses(other, mode.endswith("stacked")))
    assert_same(state_of(other, twin), states[1])


@pytest.mark.parametrize("row, mode", exact("mezo-3", "pgap", "dizo"))
def test_an_update_of_more_than_copies_hold(row, mode):
    """It is taken back to rounding: some each way, of values up to the largest."""
    net, opt, states, calls = begun(row, mode, row.period - 1 or 1, Many)
    dtypes = {name: p.dtype for name, p in net.named_parameters()}
    for at in some_of(calls, early=0, late=6):
        other, twin = fail(net, opt, mode, at)
        got = state_of(other, twin)
        for name, dtype in dtypes.items():
            value, want = (
                state[name].to(bits(torch.zeros(1, dtype=dtype)).dtype).view(dtype).double()
                for state in (got, states[0])
            )
            assert (value - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max(), name


@pytest.mark.parametrize("row, mode", exact("mezo-3", "pgap"))
def test_a_failing_update_of_residual_planes(row, mode):
    """Weights with a plane are written a few at a time: those before a failure come back as float32 does, to rounding.

    Each is moved by an update u and back: four roundings of at most |w| + |u|, and two of (1 - d) and its inverse.
    """
    net, opt, states, calls = begun(row, mode, row.period - 1, mixed, residual=True)

    def masters(state: dict) -> dict:
        values = {}
        for name in (n for n in state if not n.startswith("plane ") and n != "forward"):
            plane = state.get(f"plane {name}")
            own = (
                state[name].to(torch.int16).view(torch.bfloat16)
                if plane is not None
                else state[name].view(torch.float32)
            )
            values[name] = own if plane is None else joined(own, plane)
        return values

    wanted, after = masters(states[0]), masters(states[1])
    for at in some_of(calls, early=0, late=6):
        got = masters(state_of(*fail(net, opt, mode, at)))
        for name, value in wanted.items():
            if f"plane {name}" not in states[0]:
                assert torch.equal(got[name], value), name
                continue
            size = value.double().abs() + (after[name].double() - value.double()).abs()
            assert ((got[name].double() - value.double()).abs() <= 8 * torch.finfo(torch.float32).eps * size).all(), (
                name
            )


@pytest.mark.parametrize("row, mode", runs(METHODS, "window".__eq__))
def test_a_merge_that_fails_keeps_the_window(row, mode):
    net, opt, states, _ = begun(row, mode, 2, mixed)
    with Failing() as count:
        copy.deepcopy((net, opt))[1].merge()
    assert count.calls >= 2  # a list of each dtype at least
    for at in range(count.calls):
        with pytest.raises(MemoryError), Failing(at):
            opt.merge()
        assert_same(state_of(net, opt), states[0])
        assert opt.pending
    opt.merge()
    assert not opt.pending


# ---- in place: to rounding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mode", IN_PLACE)
def test_a_failing_call_in_place(row, mode):
    """The weights are back to the roundings of the passes there and back, unperturbed, and the next try is the step."""
    net, opt, closure = build(row, mode)
    contract = Contract(row, mode)
    for _ in range(mode == "two_pass"):  # whose first step is as any
        opt.step(closure)
        contract.step()
    contract.step()
    copied, twin = copy.deepcopy((net, opt))
    with Failing() as count:
        twin.step(Losses(copied))
    start, off = contract.start, contract.way_back()
    # With two passes a part of the last pass is the next step's first: what fails after the update does not undo it.
    calls = count.calls - (2 if mode == "two_pass" else 0)
    for number, at in enumerate(range(calls) if row.id == "lozo-m" else some_of(calls)):
        other, twin = fail(net, opt, mode, at, (MemoryError, KeyboardInterrupt)[number % 2])
        assert not twin.pending
        for name, p in other.named_parameters():
            assert ((p - start[name].value).abs() <= off[name]).all(), f"{name}: not restored"
        seen: list[dict] = []
        twin.step(Losses(other, at=lambda call, seen=seen, other=other: seen.append(snapshot(other))))
        wanted = contract.points[-len(seen) :]  # the subspaces of a first try serve the next one
        for point, want in zip(seen, wanted, strict=True):
            for name, p in point.items():
                assert ((p - want[name].value).abs() <= 2 * off[name] + want[name].bound()).all(), (
                    f"{name}: another point"
                )
    assert sum(error.norm() for error in off.values()) < 0.01 * sum(
        (w.value - start[n].value).norm() for n, w in contract.points[-1].items()
    )


FAULTS = [
    (ValueError, ValueError, "deliberate"),
    (math.nan, NonFiniteLossError, r"loss at point \d of \d is nan in step"),
    (KeyboardInterrupt, KeyboardInterrupt, "deliberate"),
    ("vector", ValueError, r"^closure: returned torch.float32 of shape \(\d,\); accepted: "),
    (StopIteration, StopIteration, "deliberate"),
    (-math.inf, NonFiniteLossError, r"loss at point \d of \d is -inf in step"),
]


@pytest.mark.parametrize("row, mode", some_runs(METHODS))
def test_a_failing_closure(row, mode):
    """At every call, each time in another way."""
    model, opt, closure = build(row, mode)
    opt.step(closure)  # tries the model out
    closure.calls = 0
    opt.step(closure)
    calls = closure.calls
    if not is_exact(mode):
        opt.merge()
    parameters, before = parameters_of(model), snapshot(model)
    fault: dict = {}

    def fails():
        loss = closure()
        if closure.calls <= fault["call"]:
            return loss
        return torch.zeros(3) if fault["kind"] == "vector" else failing(fault["kind"])().expand(loss.shape)

    for call, (kind, error, message) in zip(range(calls), itertools.cycle(FAULTS), strict=False):
        fault.update(call=call, kind=kind)
        closure.calls = 0
        with pytest.raises(error, match=message):
            opt.step(fails)
        assert_clean(parameters)
        assert opt.steps == 2 and opt.pending == (is_exact(mode) and mode.startswith("window"))
        for name, p in model.named_parameters():
            if is_exact(mode):
                assert torch.equal(p, before[name]), name
            else:  # the passes of so many steps, each of which rounds some ulps of values below 4
                assert (p - before[name]).abs().max() <= 1e-5, name
    assert math.isfinite(opt.step(closure)) and opt.steps == 3


@pytest.mark.parametrize("row", METHODS)
def test_a_non_finite_loss_can_skip_the_step(row):
    """P-GAP and LOZO make up for the refresh that failed."""
    contract = Contract(row, "inplace", on_nonfinite="skip")
    contract.skip()
    assert (contract.optimizer.steps, contract.optimizer.skipped) == (1, 1)
    for name, p in contract.model.named_parameters():
        assert (p.detach() - contract.weights[name].value).abs().max() <= 1e-5, name
    model, opt = contract.model, contract.optimizer
    for _ in range(12 if row.id in ("lezo", "adalezo") else 3):  # which leave most layers alone in a step
        assert math.isfinite(opt.step(Losses(model)))
    assert opt.skipped == 1
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), Words().parameters(), strict=True))


@pytest.mark.parametrize("row, mode", [*exact("mezo-3", "pgap"), (ROW["mezo-3"], "scratch-stacked")])
def test_a_buffer_that_cannot_be_had(row, mode, monkeypatch):
    """No memory for the scratch in the first forward: the next try has all of it."""
    net, opt, states, _ = begun(row, mode, 0)
    parameters, real = parameters_of(net), torch.empty

    def empty(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            raise MemoryError("deliberate")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty", empty)
        opt.step(Losses(net, mode.endswith("stacked")))
    assert_clean(parameters)
    opt.step(Losses(net, mode.endswith("stacked")))
    assert_same(state_of(net, opt), states[1])
