"""Evaluated = applied for every method in every mode; exact weights, declared costs, parameters that are the model."""

from __future__ import annotations

import pytest
import torch
from support.contract import Contract, Contract16, build
from support.helpers import DTYPES, bits
from support.methods import METHODS, ROWS, Row, is_exact
from support.models import IDS, Words, snapshot
from support.selection import cycled, runs, some_runs, unstacked

from pgap_kernels.optim import cost

pytestmark = pytest.mark.filterwarnings("ignore:16-bit weights")


EXACT = runs(METHODS, is_exact)
# Both signs in one forward are another way to the same points, and what a pass leaves alone is so in every dtype.
SINGLE = runs(METHODS, unstacked)
# Each method in each mode, and so with a decay and two groups. Other options are the recipe's: no mode knows them.
GROUPS = [row for row in ROWS if row.groups is not None]
CONTRACTS = runs(METHODS) + runs(GROUPS, unstacked)
CONTRACTS += some_runs([row for row in ROWS if row not in METHODS and row not in GROUPS])


@pytest.mark.parametrize("row, mode", CONTRACTS)
def test_applies_what_it_evaluated(row, mode):
    contract = Contract(row, mode)
    for _ in range(max(10, 2 * row.period)):
        contract.step()
    contract.finish()


@pytest.mark.parametrize("row, mode", runs(METHODS, ("window", "two_pass").__contains__))
def test_goes_on_after_a_skipped_step(row, mode):
    """The step that would have closed a window is skipped: the next one finds it open, or the weights clean."""
    contract = Contract(row, mode, on_nonfinite="skip")
    for step in range(8):
        contract.skip() if step == 2 else contract.step()
    assert contract.optimizer.skipped == 1
    contract.finish()


KINDS = [(torch.bfloat16, False), (torch.float16, True), (torch.float16, False), (torch.bfloat16, True)]


@pytest.mark.parametrize("row, mode, dtype, residual", cycled(EXACT, KINDS))
def test_16_bit_evaluations_and_updates(row, mode, dtype, residual):
    contract = Contract16(row, mode, dtype, residual and row.make.takes_residual, eps=0.5)
    for _ in range(max(6, row.period)):
        contract.step()
    contract.finish()


@pytest.mark.parametrize("row, mode, dtype", cycled([run for run in SINGLE if is_exact(run[1])], DTYPES))
def test_learning_rate_zero_leaves_every_bit(row, mode, dtype):
    decay = {"weight_decay": 0.5} if "weight_decay" in row.options else {}
    model, opt, closure = build(row, mode, Words().to(dtype), **decay)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = {name: bits(p.detach()) for name, p in model.named_parameters()}
    for _ in range(4):
        opt.step(closure)
    opt.merge()
    assert len(set(closure.seen)) > 4  # the forwards did see perturbations
    for name, p in model.named_parameters():
        assert torch.equal(bits(p.detach()), before[name])


@pytest.mark.parametrize("row, mode, dtype", cycled(SINGLE, DTYPES))
def test_parameters_are_the_model(row, mode, dtype):
    """After every step, whoever reads them; where updates are deferred ``pending`` says so, and ``merge`` ends it."""
    model, opt, closure = build(row, mode, Words().to(dtype))
    was_pending = False
    for _ in range(3):
        opt.step(closure)
        assert not opt.pending or mode in ("window", "two_pass")
        read = outputs_of(snapshot(model), dtype)
        if opt.pending:
            was_pending = True
            with torch.no_grad():
                assert not torch.equal(model(IDS), read)
            opt.merge()
            read = outputs_of(snapshot(model), dtype)
        with torch.no_grad():
            assert torch.equal(model(IDS), read)
    assert was_pending == (mode in ("window", "two_pass"))


def outputs_of(parameters, dtype):
    """What a model of its own makes of parameters."""
    plain = Words().to(dtype)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(parameters[name])
        return plain(IDS)


# ---- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mode", runs(METHODS))
def test_cost_is_what_is_counted(row, mode):
    """Over a period, after one in which the schedule of two passes is entered and state is made."""
    _, opt, closure = build(row, mode, Words(tied=False))
    for _ in range(row.period):
        opt.step(closure)
    for tried in opt._checked_slices.values():  # slices are tried once with each weight, some of which move later
        tried.update(w.index for w in opt.weights())
    begun, closure.calls, held = opt.passes, 0, []
    for _ in range(row.period):
        opt.step(closure)
        tensors = [t for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        held.append(sum(t.nbytes for t in tensors) + opt.perturbation.state_bytes)
    declared = opt.cost()
    assert opt.passes - begun == pytest.approx(row.period * declared.weight_passes, rel=1e-12)
    assert closure.calls == pytest.approx(row.period * declared.forwards)
    assert declared.state_bytes == max(held)


WINDOWS = [row for row in METHODS if "window" in row.options]


@pytest.mark.parametrize("row, mode", runs(WINDOWS))
def test_a_long_window_costs_what_its_steps_cost(row, mode, monkeypatch):
    """Of which few are taken."""
    optimizer = build(row, mode, Words(tied=False), window=7)[1]
    whole = optimizer.cost()
    monkeypatch.setattr(cost, "_TAKEN_WHOLE", 6)
    assert optimizer.cost() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    "id, mode, forwards, passes",
    [
        ("mezo", "inplace", 2, 3),
        ("mezo", "two_pass", 2, 2),
        ("mezo-3", "inplace", 6, 7),
        ("mezo-3", "two_pass", 6, 6),
        ("mezo", "scratch", 2, 3),
        ("mezo", "scratch-stacked", 1, 3),
        ("pizo-greedy", "inplace", 6, 7),
        ("helene", "inplace", 2, 3),
        ("lozo", "inplace", 2, 3),
        ("lozo-m", "inplace", 2, 3),
    ],
)
def test_costs_of_the_literature(id, mode, forwards, passes):
    """As the methods' docstrings have them, counted by hand."""
    row: Row = next(r for r in ROWS if r.id == id)
    declared = build(row, mode, Words(tied=False))[1].cost()
    assert (declared.forwards, declared.weight_passes) == (forwards, pytest.approx(passes, rel=1e-12))
