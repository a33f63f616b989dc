"""Which mode serves: the table, what it says about it, what is refused, and changes between steps."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from optim_contract import INPUTS, LABELS, snapshot
from test_modes import Losses, Words
from torch import nn
from torch.nn import functional as F

from pgap_kernels import draw, noise
from pgap_kernels.optim import PGAP, MeZO
from pgap_kernels.perturbation import MODES, Subspace, Weight

SMALL = {MeZO: {}, PGAP: {"rank": 2, "window": 4, "probes": 2}}


def make(method, params=None, **options):
    params = Words() if params is None else params
    return params, method(params, **({"lr": 0.05, "eps": 0.02, "seed": 3} | SMALL[method] | options))


class Bare(nn.Module):
    """A matrix of no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(6, 4), nn.Parameter(0.3 * draw((8, 4), 1, 1))

    def forward(self, x):
        return self.inner(x) + self.table


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, dtype, mode, reason",
    [
        (MeZO, torch.float32, "inplace", "table of float32 modes, dense on cpu"),
        (PGAP, torch.float32, "folded", "table of float32 modes, subspace on cpu"),
        (MeZO, torch.bfloat16, "scratch", "16-bit weights are not restored exactly in place"),
        (PGAP, torch.float16, "folded", "16-bit weights are not restored exactly in place"),
    ],
)
def test_auto(method, dtype, mode, reason, caplog):
    with caplog.at_level(logging.INFO, "pgap_kernels"):
        model, opt = make(method, Words().to(dtype))
    assert (opt.mode, opt.mode_reason) == (mode, reason)
    assert caplog.messages == [f"{method.__name__} runs in mode {mode}: {reason}"]
    opt.step(Losses(model))


@pytest.mark.parametrize("method", [MeZO, PGAP])
def test_auto_without_a_model_is_in_place(method):
    model = Words()
    _, opt = make(method, list(model.named_parameters()))
    assert opt.mode == "inplace"
    assert opt.mode_reason.startswith("no model was given" if method is PGAP else "table of float32 modes")
    _, opt = make(method, list(model.named_parameters()), model=model)
    assert opt.mode == ("folded" if method is PGAP else "inplace")
    _, opt = make(PGAP, [("w", torch.zeros(3, 3))], model=model)  # another's weights
    assert opt.mode == "inplace" and "do not have the parameter 'w'" in opt.mode_reason


def test_auto_of_16_bit_weights_without_a_model_warns():
    with pytest.warns(UserWarning, match="16-bit weights are perturbed in place.*no model was given"):
        make(MeZO, list(Words().to(torch.bfloat16).named_parameters()))
    with pytest.warns(UserWarning, match="16-bit weights are perturbed in place.*other modes are exact"):
        make(MeZO, Words().to(torch.bfloat16), mode="inplace")


@pytest.mark.parametrize("dtype, mode", [(torch.float32, "inplace"), (torch.bfloat16, "scratch")])
def test_auto_does_not_fold_where_a_matrix_is_in_no_layer(dtype, mode):
    _, opt = make(PGAP, Bare().to(dtype))
    assert opt.mode == mode and opt.mode_reason.startswith("table belongs to a Bare")
    assert "exclude=" in opt.mode_reason
    _, opt = make(PGAP, Bare().to(dtype), exclude=["table"])
    assert opt.mode == "folded"


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_mode_that_was_asked_for(mode):
    _, opt = make(PGAP, mode=mode)
    assert (opt.mode, opt.mode_reason) == (mode, "asked for")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, message",
    [
        (MeZO, {"mode": "folded"}, r"^mode: got 'folded', but the method's directions are dense"),
        (MeZO, {"mode": "outplace"}, r"^mode: got 'outplace'; accepted: .*auto"),
        (MeZO, {"mode": "scratch", "two_pass": True}, r"^two_pass: got True with mode='scratch'"),
        (PGAP, {"mode": "folded", "two_pass": True}, r"^two_pass: got True with mode='folded'"),
        (MeZO, {"mode": "inplace", "paired": True}, r"^paired: got True with mode='inplace'"),
        (MeZO, {"mode": "inplace", "residual": True}, r"^residual: got True with mode='inplace'"),
        (MeZO, {"mode": "scratch", "residual": True}, r"^residual: got True with .*torch.float32"),
    ],
)
def test_options_that_do_not_go_together(method, options, message):
    model = Words()
    with pytest.raises(ValueError, match=message):
        make(method, model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_hooked_modes_need_the_model(mode):
    named = list(Words().named_parameters())
    with pytest.raises(ValueError, match=f"^mode: got '{mode}', but no model was given"):
        make(PGAP, named, mode=mode)
    with pytest.raises(ValueError, match=f"^mode: got '{mode}', but model: its modules do not have the parameter"):
        make(PGAP, named, model=Words(), mode=mode)  # another's parameters


def test_folded_of_a_matrix_in_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"^mode: got 'folded', but table belongs to a Bare.*exclude=.*'scratch'"):
        make(PGAP, Bare(), mode="folded")


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_rank_above_the_matrix_is_that_of_the_matrix(mode):
    model, opt = make(PGAP, rank=400, mode=mode)
    opt.step(Losses(model))
    assert (
        {w.name: opt.rank_of(w) for w in opt.matrices()}
        == {w.name: min(w.tensor.shape) for w in opt.matrices()}
        == {name: len(basis.singular_values) for name, basis in opt.bases.items()}
    )


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_rank_above_what_kernels_take_is_refused_at_once(mode):
    with pytest.raises(ValueError, match=r"^rank: got 600; accepted: .*512"):
        make(PGAP, nn.Linear(600, 600, bias=False), rank=600, mode=mode)


@pytest.mark.parametrize("method, mode", [(MeZO, "scratch"), (PGAP, "scratch"), (PGAP, "folded")])
def test_paired_losses_and_batches(method, mode):
    model, opt = make(method, nn.Linear(6, 4), mode=mode, paired=True)
    before = snapshot(model)

    def losses(rows=16, wanted=2):
        logits = model(torch.cat([INPUTS, INPUTS])[:rows])
        return F.cross_entropy(logits, LABELS.repeat(2)[:rows], reduction="none").chunk(wanted)[0].mean().repeat(wanted)

    for closure in (lambda: losses(wanted=1), lambda: losses(wanted=3), lambda: losses(wanted=1).item()):
        with pytest.raises(ValueError, match=r"^closure: returned .*accepted: 2 real losses, of the halves"):
            opt.step(closure)
    with pytest.raises(RuntimeError, match=r"^paired: a Linear got 15 rows"):
        opt.step(lambda: losses(15))
    assert opt.steps == 0 and all(torch.equal(w, before[name]) for name, w in snapshot(model).items())
    opt.step(losses)


@pytest.mark.parametrize("method, mode", [(MeZO, "scratch"), (PGAP, "folded")])
def test_a_layer_that_mixes_rows_is_refused_in_pairs(method, mode):
    """The second layer gets another number of rows than the first: halves of it are not halves of the batch."""
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 4)])
    opt = method(model, **SMALL[method], mode=mode, paired=True)

    def closure():
        hidden = model[0](torch.cat([INPUTS, INPUTS]))
        return model[1](hidden[:6]).mean(1)[:2]

    with pytest.raises(RuntimeError, match=r"^paired: a Linear got 6 rows, the forward began with 16"):
        opt.step(closure)


# ---- changes between steps ------------------------------------------------------------------------------------------


def stepped(opt, model, steps):
    for _ in range(steps):
        opt.step(Losses(model))


@pytest.mark.parametrize("before, after", [(a, b) for a in MODES[:3] for b in MODES if a != b])
def test_the_mode_may_change_between_steps(before, after):
    """Within a window merge() comes first; what follows is the run of the other mode from there."""
    model, opt = make(PGAP, mode=before, weight_decay=0.5)
    stepped(opt, model, 2)
    if before == "folded":
        with pytest.raises(ValueError, match=rf"^mode: got '{after}' while mode 'folded' has updates.*merge\(\)"):
            opt.mode = after
        assert opt.mode == "folded"
    opt.merge()
    passes = opt.passes
    other, twin = make(PGAP, mode="folded" if after == "auto" else after, weight_decay=0.5, seed=9)
    other.load_state_dict(model.state_dict())
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.mode = after
    assert opt.mode == twin.mode and opt.passes == passes
    stepped(opt, model, 4)
    stepped(twin, other, 4)
    assert opt.perturbation.pending == twin.perturbation.pending
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_mode_change_out_of_the_two_pass_schedule():
    model, opt = make(MeZO, mode="inplace", two_pass=True)
    stepped(opt, model, 2)
    with pytest.raises(ValueError, match=r"^mode: got 'scratch' while mode 'inplace' has updates or perturbations"):
        opt.mode = "scratch"
    opt.merge()
    with pytest.raises(ValueError, match=r"^two_pass: got True with mode='scratch'"):
        opt.mode = "scratch"
    assert opt.mode == "inplace"
    stepped(opt, model, 1)


def test_a_mode_that_is_refused_changes_nothing():
    model, opt = make(MeZO, mode="scratch")
    for bad in ("folded", "nowhere"):
        with pytest.raises(ValueError, match=r"^mode: got"):
            opt.mode = bad
    other, twin = make(MeZO, mode="scratch")
    stepped(opt, model, 2)
    stepped(twin, other, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method, mode", [(MeZO, "two_pass"), (PGAP, "two_pass"), (MeZO, "scratch"), (PGAP, "scratch"),
                                          (PGAP, "folded")])  # fmt: skip
def test_add_param_group_within_a_window(method, mode):
    """Merges; the new weights are perturbed from the next step on, and the old ones' run goes on."""
    model = Words(tied=False)
    named = dict(model.named_parameters())
    new = [(name, named.pop(name)) for name in ("head.weight", "head.bias")]
    chosen = {"mode": "inplace", "two_pass": True} if mode == "two_pass" else {"mode": mode}
    opt = method(list(named.items()), model=model, lr=0.05, eps=0.02, seed=3, **SMALL[method], **chosen)
    stepped(opt, model, 2)
    pending = opt.perturbation.pending
    assert pending == (mode in ("two_pass", "folded"))
    with pytest.raises(ValueError, match=r"^lr: got"):
        opt.add_param_group({"params": new, "lr": -1.0})
    opt.add_param_group({"params": new, "lr": 0.01})
    assert not opt.perturbation.pending
    before = snapshot(model)
    stepped(opt, model, 3)
    opt.merge()
    moved = {name for name, w in snapshot(model).items() if not torch.equal(w, before[name])}
    assert moved == set(before)
    if method is PGAP:
        assert "head.weight" in opt.bases


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_add_param_group_that_cannot_be_served_changes_nothing(mode):
    model = Words(tied=False)
    opt = PGAP(list(model.named_parameters()), model=model, lr=0.05, eps=0.02, seed=3, **SMALL[PGAP], mode=mode)
    stepped(opt, model, 2)
    with pytest.raises(ValueError, match="do not have the parameter 'extra'"):
        opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(4, 4)))]})
    assert len(opt.param_groups) == 1 and noise.tensor_id("extra") not in {w.id for w in opt.weights()}
    stepped(opt, model, 2)


def test_a_rank_above_the_layer_is_refused_before_a_forward():
    weight = Weight("layer.weight", nn.Parameter(torch.zeros(3, 8)), 1, {})
    with pytest.raises(ValueError, match=r"^rank: got 4 for 'layer.weight' of shape \(3, 8\)"):
        Subspace([weight], [torch.zeros(3, 4)], [torch.zeros(8, 4)], [torch.zeros(4, 4)], [1.0])


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("mode", ["two_pass", "scratch"])
def test_a_planned_step_takes_weights_that_were_added(mode, failed):
    """The two-pass schedule has planned the next step, and so has a step that failed."""
    model = Words()
    late = [(n, p) for n, p in model.named_parameters() if n.startswith("head")]
    early = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    how = {"mode": "inplace", "two_pass": True} if mode == "two_pass" else {"mode": mode}
    _, opt = make(MeZO, early, model=model, **how)
    losses = Losses(model)
    opt.step(losses)
    if failed:
        with pytest.raises(TypeError, match="closure: returned str"):
            opt.step(lambda: str(losses()))
    opt.add_param_group({"params": late})
    before = {n: p.detach().clone() for n, p in late}
    opt.step(losses)
    opt.merge()
    assert not any(torch.equal(before[n], p) for n, p in late)


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_a_decay_that_leaves_nothing_is_a_step(mode):
    """lr * weight_decay = 1: the pass has no inverse, and needs none while nothing fails."""
    model, opt = make(MeZO, Words(), mode=mode, lr=1.0, weight_decay=1.0)
    assert math.isfinite(opt.step(Losses(model)))
