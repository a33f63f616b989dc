"""What a model and its optimizer are between the steps of each mode: evaluated, saved, copied, handed over, loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import bits
from optim_contract import snapshot
from test_mode_hooks import (
    ALL,
    HOOKED,
    assert_clean,
    close,
    near,
    optimizer,
    rounding,
)
from test_modes import Losses, Words

from pgap_kernels.optim import PGAP, MeZO

# ---- the model between steps ----------------------------------------------------------------------------------------


def within_a_window(method=PGAP, mode="folded", steps=2, **options):
    """A model with two updates that its weights do not have, the same run in place, bounds of losses and weights."""
    options = {"weight_decay": 10.0, "lr": 0.01} | ({"window": 5} if method is PGAP else {}) | options
    runs, told = [], {}
    for m in ("inplace", mode):
        model = Words()
        opt = optimizer(method, m, model, told, **options)
        runs.append((model, opt))
        for _ in range(steps):
            opt.step(Losses(model))
    return *runs[1], runs[0][0], rounding(Words(), words_loss)


def words_loss(model):
    return Losses(model)().sum()


def weights_near(model, same, bound) -> None:
    near(snapshot(model), snapshot(same), bound, lr=0.01)


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_sees_the_updates_of_a_window(grad):
    model, opt, same, bound = within_a_window()
    stored = snapshot(model)
    with torch.set_grad_enabled(grad):
        seen = words_loss(model).item()
    assert seen == pytest.approx(words_loss(same).item(), abs=bound)
    assert opt.perturbation.pending
    assert all(torch.equal(w, stored[name]) for name, w in snapshot(model).items())
    opt.detach()
    assert not opt.perturbation.pending and words_loss(model).item() == pytest.approx(seen, abs=bound)
    assert abs(seen - words_loss(Words()).item()) > 10 * bound


@pytest.mark.parametrize("method", [MeZO, PGAP])
def test_evaluation_sees_clean_weights_in_the_two_pass_schedule(method):
    model, opt, same, bound = within_a_window(method, "two_pass", eps=0.3)
    assert opt.perturbation.pending
    apart = max((w - snapshot(same)[name]).abs().max() for name, w in snapshot(model).items())
    assert apart > 0.1  # perturbed, until somebody looks
    assert words_loss(model).item() == pytest.approx(words_loss(same).item(), abs=bound)
    assert not opt.perturbation.pending
    weights_near(model, same, bound)


@pytest.mark.parametrize("mode", ["folded", "two_pass"])
@pytest.mark.parametrize("look", ["state_dict", "child", "load", "opt", "detach"])
def test_whoever_reads_the_state_merges_first(look, mode):
    model, opt, same, bound = within_a_window(mode=mode, eps=0.1)
    assert opt.perturbation.pending
    if look == "load":
        fresh = Words().state_dict()
        model.load_state_dict(fresh)  # not on top of which a window comes later
        opt.merge()
        assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())
        assert words_loss(model) == words_loss(Words())
        return
    {"state_dict": model.state_dict, "child": model.up.state_dict, "opt": opt.state_dict, "detach": opt.detach}[look]()
    assert not opt.perturbation.pending
    weights_near(model, same, bound)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("mode", ["folded", "two_pass"])
def test_a_copied_model_keeps_what_was_learnt(mode, copied):
    model, opt, same, bound = within_a_window(mode=mode)
    other = copied(model)
    assert opt.perturbation.pending  # the model was only read
    assert words_loss(other).item() == pytest.approx(words_loss(same).item(), abs=bound)
    opt.step(Losses(model))
    assert words_loss(other).item() == pytest.approx(words_loss(same).item(), abs=bound)
    loaded = Words()
    loaded.load_state_dict(other.state_dict())
    weights_near(loaded, same, bound)


@pytest.mark.parametrize("second", [(MeZO, "scratch"), (PGAP, "folded"), (MeZO, "inplace"), (MeZO, "two_pass")])
@pytest.mark.parametrize("mode", ["folded", "two_pass", "scratch"])
def test_a_second_optimizer_finds_what_the_first_has_learnt(mode, second):
    model, opt, same, bound = within_a_window(mode=mode)
    method, own = second
    told: dict = {}
    other, plain = (optimizer(method, m, net, told, seed=8) for m, net in ((own, model), ("inplace", same)))
    seen, wanted = Losses(model), Losses(same)
    for _ in range(2):
        plain.step(wanted)
        other.step(seen)
    close(torch.tensor(seen.seen), torch.tensor(wanted.seen), bound)
    other.merge()
    opt.merge()
    weights_near(model, same, bound)
    if own not in ("inplace", "two_pass") and mode != "two_pass":
        with pytest.raises(RuntimeError, match="not perturbed"):
            opt.step(seen)  # it has no hooks any more


@pytest.mark.parametrize("method, mode", [*ALL, (PGAP, "folded-paired")])
def test_detach_leaves_no_trace(method, mode):
    model, fresh = Words(), Words()
    opt = optimizer(method, mode.removesuffix("-paired"), model, paired=mode.endswith("-paired"))
    for _ in range(2):
        opt.step(Losses(model, mode.endswith("-paired")))
    opt.detach()
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
             "_forward_hooks_with_kwargs")  # fmt: skip
    for module, plain in zip(model.modules(), fresh.modules(), strict=True):
        assert not any(getattr(module, name) for name in hooks)
        assert module.__dict__.keys() == plain.__dict__.keys() and not any(
            isinstance(v, type(opt.perturbation)) for v in module.__dict__.values()
        )
    opt.detach()


# ---- state ----------------------------------------------------------------------------------------------------------

STATES = [(method, mode, {}) for method, mode in ALL]
STATES += [(method, mode, {"residual": True}) for method, mode in HOOKED]


def stateful(method, mode, options, **more):
    dtype = torch.bfloat16 if options else torch.float32
    model = Words().to(dtype)
    return model, optimizer(method, mode, model, **options, **more)


def same_state(model, opt, other, twin):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(p.detach()), bits(q.detach())), name
    if opt.residual:
        planes, theirs = opt.perturbation.residual.planes, twin.perturbation.residual.planes
        assert all(torch.equal(plane, theirs[name]) for name, plane in planes.items())
        assert any(plane.any() for plane in planes.values())


@pytest.mark.parametrize("by", ["file", "memory"])
@pytest.mark.parametrize("method, mode, options", STATES)
def test_a_loaded_state_continues_bit_for_bit(method, mode, options, by):
    """Through a refresh, and apart from each other; a state merges, so both stand on clean weights."""
    model, opt = stateful(method, mode, options)
    for _ in range(2):
        opt.step(Losses(model))
    state = {"model": model.state_dict(), "opt": opt.state_dict()}
    if by == "file":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    other, twin = stateful(method, mode, options, seed=1, lr=0.3)
    other.load_state_dict(state["model"])
    twin.load_state_dict(state["opt"])
    for _ in range(5):
        opt.step(Losses(model))
    for _ in range(5):
        twin.step(Losses(other))
    opt.merge()
    twin.merge()
    same_state(model, opt, other, twin)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("method, mode, options", STATES)
def test_a_copied_pair_continues_bit_for_bit(method, mode, options, copied):
    """Model and optimizer together, within a window or perturbed, and each then runs on its own."""
    model, opt = stateful(method, mode, options)
    for _ in range(2):
        opt.step(Losses(model))
    other, twin = copied((model, opt))
    assert twin.perturbation.pending == opt.perturbation.pending
    for _ in range(5):
        twin.step(Losses(other))
    for _ in range(5):
        opt.step(Losses(model))
    assert_clean(twin)
    opt.merge()
    twin.merge()
    same_state(model, opt, other, twin)


@pytest.mark.parametrize("method, mode", [(PGAP, "folded"), (PGAP, "scratch"), (MeZO, "scratch")])
def test_a_residual_survives_a_change_of_mode(method, mode):
    model, opt = stateful(method, mode, {"residual": True})
    opt.step(Losses(model))
    opt.merge()
    before = {name: plane.clone() for name, plane in opt.perturbation.residual.planes.items()}
    opt.mode = "scratch"
    assert any(plane.any() for plane in before.values())
    assert all(torch.equal(plane, before[name]) for name, plane in opt.perturbation.residual.planes.items())
