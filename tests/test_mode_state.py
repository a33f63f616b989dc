"""What a model and its optimizer are between the steps of each mode: evaluated, saved, copied, handed over, loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.contract import Contract, build
from support.helpers import bits
from support.methods import METHODS, ROWS, is_exact, options_of
from support.models import Losses, Words, assert_same_weights, snapshot
from support.selection import cycled, some_runs
from torch import Tensor

from pgap_kernels.perturbation.residual import joined

pytestmark = pytest.mark.filterwarnings("ignore:16-bit weights")
ROW = {row.id: row for row in ROWS}
PENDING = [(row, mode) for mode in ("two_pass", "window") for row in METHODS if mode in row.modes]
DEFERRING = [(ROW["lozo-m"], "two_pass"), (ROW["pgap"], "window")]  # one method in each of these modes


def pending(row, mode: str, steps: int = 2) -> Contract:
    """A run with updates that its weights do not have, or with a perturbation that they should not have."""
    contract = Contract(row, mode, lr=0.05)
    for _ in range(steps):
        contract.step()
    assert contract.optimizer.pending
    return contract


# ---- the model between steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mode, grad", cycled(PENDING, [False, True]))
def test_evaluation_sees_what_was_learnt(row, mode, grad):
    contract = pending(row, mode)
    model, before = contract.model, snapshot(contract.model)
    with torch.set_grad_enabled(grad):
        if mode == "two_pass":
            contract.merge(lambda: Losses(model)())  # the perturbation is taken off before
            assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            return
        contract.check_evaluation()
    assert contract.optimizer.pending
    assert_same_weights(model, before)
    contract.merge(contract.optimizer.detach)
    contract.check_evaluation()


@pytest.mark.parametrize("look", ["state_dict", "child", "opt", "detach"])
@pytest.mark.parametrize("row, mode", DEFERRING)
def test_whoever_reads_the_state_merges_first(row, mode, look):
    contract = pending(row, mode)
    model, opt = contract.model, contract.optimizer
    looks = {"state_dict": model.state_dict, "child": model.up.state_dict, "opt": opt.state_dict, "detach": opt.detach}
    contract.merge(looks[look])


@pytest.mark.parametrize("row, mode", DEFERRING)
def test_loading_a_model_replaces_what_was_pending(row, mode):
    contract, fresh = pending(row, mode), Words().state_dict()
    contract.model.load_state_dict(fresh)
    contract.optimizer.merge()
    assert_same_weights(contract.model, Words())
    assert Losses(contract.model)() == Losses(Words())()


def saved(value):
    """Through a file, whole."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("row, mode, copied", cycled(PENDING, [copy.deepcopy, saved]))
def test_a_copied_model_keeps_what_was_learnt(row, mode, copied):
    contract = pending(row, mode)
    other = copied(contract.model)
    assert contract.optimizer.pending  # the model was only read
    seen = Losses(other)()
    contract.step()  # the copy does not go on with it
    assert Losses(other)() == seen
    assert seen == Losses(pending(row, mode).model)()
    loaded, whole = Words(), pending(row, mode)
    loaded.load_state_dict(other.state_dict())
    whole.optimizer.merge()
    assert_same_weights(loaded, whole.model)


# The first one's mode has something to hand over; the second finds it in the weights, whatever it does with them.
FIRST = [*PENDING, (ROW["helene"], "scratch")]
SECOND = [("mezo-3", "scratch"), ("pgap", "window"), ("mezo-3", "inplace"), ("lozo", "two_pass")]


@pytest.mark.parametrize("row, mode, other_id, other_mode", cycled(FIRST, SECOND))
def test_a_second_optimizer_finds_what_the_first_has_learnt(row, mode, other_id, other_mode):
    first = Contract(row, mode)
    for _ in range(2):
        first.step()
    other = []
    first.merge(lambda: other.append(Contract(ROW[other_id], other_mode, first.model, seed=8)))
    for _ in range(2):
        other[0].step()
    with pytest.raises(RuntimeError, match=r"^step: a newer optimizer has taken over .*make a new optimizer"):
        first.optimizer.step(first.closure)
    other[0].finish()


@pytest.mark.parametrize("row, mode", some_runs(METHODS))
def test_detach_leaves_no_trace(row, mode):
    model, opt, closure = build(row, mode)
    fresh = Words()
    for _ in range(2):
        opt.step(closure)
    opt.detach()
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
             "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")  # fmt: skip
    for module, plain in zip(model.modules(), fresh.modules(), strict=True):
        assert not any(getattr(module, name) for name in hooks)
        assert module.__dict__.keys() == plain.__dict__.keys()
        assert not any(value is opt.perturbation for value in module.__dict__.values())
    opt.detach()
    with pytest.raises(RuntimeError, match=r"^step: the optimizer was detached"):
        opt.step(closure)


# ---- state ----------------------------------------------------------------------------------------------------------


def own_run(row, mode: str, **options):
    """Weights of 16 bits where the mode is exact, in another order than the model's, some of them frozen."""
    model = Words().to(torch.bfloat16 if is_exact(mode) else torch.float32)
    model.norm.requires_grad_(False)
    residual = is_exact(mode) and row.id in ("mezo-3", "pgap", "lozo", "pizo-greedy")
    named = list(model.named_parameters())[::-1]
    opt = row.make(named, model=model, **{**row.options, **options_of(mode), "residual": residual, **options})
    return model, opt, Losses(model, mode.endswith("stacked"))


def assert_same_run(model, opt, other, twin) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(p.detach()), bits(q.detach())), name
        mine, theirs = opt.state.get(p, {}), twin.state.get(q, {})
        assert mine.keys() == theirs.keys()
        for entry, value in mine.items():
            same = torch.equal(value, theirs[entry]) if isinstance(value, Tensor) else value == theirs[entry]
            assert same and type(value) is type(theirs[entry]), (name, entry)
            assert not isinstance(value, Tensor) or value.dtype == theirs[entry].dtype
    if opt.residual:
        planes, theirs = opt.perturbation.residual.planes, twin.perturbation.residual.planes
        assert all(torch.equal(plane, theirs[name]) for name, plane in planes.items())
        assert any(plane.any() for plane in planes.values())


# State is the recipe's, what is merged into the weights before it is saved is the mode's.
@pytest.mark.parametrize("row, mode", some_runs(METHODS))
def test_a_loaded_state_continues_bit_for_bit(row, mode):
    """Out of a window or a projection, through a file, and apart from each other; a state merges first."""
    model, opt, closure = own_run(row, mode)
    for _ in range(4 if row.id == "dizo" else 2):
        opt.step(closure)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other, twin, its = own_run(row, mode, seed=1, lr=0.3)
    other.load_state_dict(state["model"])
    twin.load_state_dict(state["opt"])
    for kept in twin.state.values():
        for entry, value in kept.items():
            assert not isinstance(value, Tensor) or value.dtype == torch.float32 or entry == "anchor"
    for run, loss in ((opt, closure), (twin, its)):
        for _ in range(4):
            run.step(loss)
        run.merge()
    assert (twin.steps, twin.seed) == (opt.steps, 13)
    assert_same_run(model, opt, other, twin)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("row, mode, copied", cycled(some_runs(METHODS), [copy.deepcopy, pickled]))
def test_a_copied_pair_continues_bit_for_bit(row, mode, copied):
    """Model and optimizer together, within a window or perturbed, and each then runs on its own."""
    model, opt, closure = own_run(row, mode)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)  # puts a method of this object into it
    for _ in range(4 if row.id == "dizo" else 2):
        opt.step(closure)
    other, twin = copied((model, opt))
    assert twin.pending == opt.pending
    its = Losses(other, mode.endswith("stacked"))
    for run, loss in ((twin, its), (opt, closure)):
        for _ in range(3):
            run.step(loss)
        run.merge()
    assert_same_run(model, opt, other, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", ["zero", "load", "mask", "zero and freeze"])
def test_weights_that_others_have_written_are_what_they_wrote(write, dtype):
    """Not that plus what a plane had kept of another weight, which beside a zero of bfloat16 would be a NaN."""
    model, opt, closure = build(ROW["mezo-3"], "scratch", Words().to(dtype), residual=True, lr=0.05)
    initial = {name: p.zero_() if "bias" in name else p for name, p in copy.deepcopy(model.state_dict()).items()}
    for _ in range(2):
        opt.step(closure)
    if write == "load":
        model.load_state_dict(initial)
    with torch.no_grad():
        for p in model.parameters() if write != "load" else ():
            p.mul_(0 if "zero" in write else torch.arange(p.numel()).view(p.shape) % 2)
    if "freeze" in write:  # the mode serves other weights from now on
        model.embed.weight.requires_grad_(False)
    wrote = snapshot(model)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure)
    assert_same_weights(model, wrote)
    model.embed.weight.requires_grad_(True)
    opt.step(closure)
    assert not any(plane.any() for plane in opt.perturbation.residual.planes.values())


def test_planes_are_kept_if_the_weights_are_loaded_after_them():
    model, opt, closure = build(ROW["mezo-3"], "scratch", Words().to(torch.bfloat16), residual=True, lr=0.05)
    opt.step(closure)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    planes = {name: plane.clone() for name, plane in opt.perturbation.residual.planes.items()}
    opt.step(closure)
    opt.load_state_dict(state)
    model.load_state_dict(weights)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure)
    assert all(torch.equal(plane, planes[name]) for name, plane in opt.perturbation.residual.planes.items())
    assert any(plane.any() for plane in planes.values())


def test_a_plane_beside_another_weight_makes_no_other_number():
    high = torch.tensor([0.0, -0.0, 1.0, 3.0], dtype=torch.bfloat16)
    low = torch.tensor([-5, -7, -100, 100], dtype=torch.int16)
    assert joined(high, low)[:2].tolist() == [0.0, 0.0] and (joined(high, low)[2:] != high[2:].float()).all()


@pytest.mark.parametrize("id, mode", [("pgap", "window"), ("pgap", "scratch"), ("mezo-3", "scratch")])
def test_a_residual_survives_a_change_of_mode(id, mode):
    _model, opt, closure = build(ROW[id], mode, Words().to(torch.bfloat16), residual=True)
    opt.step(closure)
    opt.merge()
    before = {name: plane.clone() for name, plane in opt.perturbation.residual.planes.items()}
    opt.mode = "scratch" if mode != "window" else "folded"
    assert any(plane.any() for plane in before.values())
    assert all(torch.equal(plane, before[name]) for name, plane in opt.perturbation.residual.planes.items())
