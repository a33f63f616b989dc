"""Which mode serves: the table, what it says about it, what is refused, and changes between steps."""

from __future__ import annotations

import copy
import logging
import math
import weakref

import pytest
import torch
from support.contract import build
from support.helpers import DTYPES
from support.methods import METHODS, ROWS, options_of
from support.models import IDS, Losses, Words, assert_same_weights, snapshot
from support.selection import cycled, some_runs, unstacked
from torch import nn

from pgap_kernels import draw, noise
from pgap_kernels.optim import PGAP, LeZO, LowRankOptimizer, MeZO
from pgap_kernels.optim.evaluation import FlatLosses
from pgap_kernels.perturbation import MODES, points

ROW = {row.id: row for row in ROWS}
PLAIN = MODES[:3]
LAYERWISE = ("lezo", "adalezo")  # which leave most layers alone in a step
LOW_RANK = [row for row in METHODS if issubclass(row.make, LowRankOptimizer)]


def make(row, params=None, **options):
    params = Words() if params is None else params
    return params, row.make(params, **{**row.options, **options})


class Bare(nn.Module):
    """A matrix of no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(6, 4), nn.Parameter(0.3 * draw((8, 4), 1, 1))

    def forward(self, x):
        return self.inner(x) + self.table


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, dtype", cycled(METHODS, DTYPES, each=2))
def test_auto(row, dtype, caplog):
    lowrank = issubclass(row.make, LowRankOptimizer)
    if dtype == torch.float32:
        mode, kind = ("folded", "low-rank") if lowrank else ("inplace", "dense")
        reason = f"table of float32 modes, {kind} on cpu"
    else:
        mode, reason = "folded" if lowrank else "scratch", "16-bit weights are not restored exactly in place"
    with caplog.at_level(logging.INFO, "pgap_kernels"):
        model, opt = make(row, Words().to(dtype))
    assert (opt.mode, opt.mode_reason) == (mode, reason)
    assert caplog.messages == [f"{row.make.__name__} runs in mode {mode}: {reason}"]
    opt.step(Losses(model))


def test_auto_without_a_matrix_to_fold():
    _, opt = make(ROW["pgap"], Words(), exclude=["*"])
    assert (opt.mode, opt.mode_reason) == ("inplace", "table of float32 modes, dense on cpu")


@pytest.mark.parametrize("id", ["mezo-3", "pgap"])
def test_auto_without_a_model_is_in_place(id):
    model, lowrank = Words(), id == "pgap"
    _, opt = make(ROW[id], list(model.named_parameters()))
    assert opt.mode == "inplace"
    assert opt.mode_reason.startswith("no model was given" if lowrank else "table of float32 modes")
    _, opt = make(ROW[id], list(model.named_parameters()), model=model)
    assert opt.mode == ("folded" if lowrank else "inplace")
    _, opt = make(ROW["pgap"], [("w", torch.zeros(3, 3))], model=model)  # another's weights
    assert opt.mode == "inplace" and "do not have the parameter 'w'" in opt.mode_reason


def test_auto_of_16_bit_weights_without_a_model_warns():
    with pytest.warns(UserWarning, match="16-bit weights are perturbed in place.*no model was given"):
        make(ROW["mezo"], list(Words().to(torch.bfloat16).named_parameters()))
    with pytest.warns(UserWarning, match="16-bit weights are perturbed in place.*other modes are exact"):
        make(ROW["mezo"], Words().to(torch.bfloat16), mode="inplace")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_folded_takes_the_scratch(dtype, caplog):
    """Whole models of such matrices another mode; some of them beside others are named."""
    _, opt = make(ROW["pgap"], Bare().to(dtype), exclude=["inner*"])
    assert opt.mode == ("inplace" if dtype == torch.float32 else "scratch")
    assert "'table', for one, belongs to a Bare" in opt.mode_reason
    with caplog.at_level(logging.INFO, "pgap_kernels"):
        _, opt = make(ROW["pgap"], Bare().to(dtype))
    assert opt.mode == "folded" and caplog.messages[-1] == "1 matrices are not folded but take the scratch: table"
    _, opt = make(ROW["pgap"], Bare().to(dtype), exclude=["table"])
    assert opt.mode == "folded"


@pytest.mark.parametrize("mode", PLAIN)
def test_a_mode_that_was_asked_for(mode):
    _, opt = make(ROW["pgap"], mode=mode)
    assert (opt.mode, opt.mode_reason) == (mode, "asked for")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id, options, message",
    [
        ("mezo", {"mode": "folded"}, r"^mode: got 'folded', but the method's directions are dense"),
        ("mezo", {"mode": "outplace"}, r"^mode: got 'outplace'; accepted: .*auto"),
        ("mezo", {"mode": "scratch", "two_pass": True}, r"^two_pass: got True with mode='scratch'"),
        ("pgap", {"mode": "folded", "two_pass": True}, r"^two_pass: got True with mode='folded'"),
        ("helene", {"mode": "inplace", "two_pass": True}, r"^two_pass: got True with mode='inplace'.*know their first"),
        ("mezo", {"mode": "inplace", "members": 2}, r"^members, groups: got 2 slices of a batch with mode='inplace'"),
        ("mezo", {"mode": "inplace", "residual": True}, r"^residual: got True with mode='inplace'"),
        ("loren-query", {"mode": "scratch", "weight_decay": 0.1}, r"^weight_decay: got some with momentum='per_query'"),
        ("mezo", {"mode": "scratch", "residual": True}, r"^residual: got True with .*torch.float32"),
        ("dizo", {"mode": "scratch", "residual": True}, r"^residual: got True; accepted: False with DiZO"),
        ("helene", {"mode": "scratch", "residual": True}, r"^residual: got True; accepted: False with HELENE"),
        ("lozo-m", {"mode": "folded", "residual": True}, r"^residual: got True; accepted: False with LOZOM"),
        ("pgap", {"mode": "scratch", "merge": "window"}, r"^merge: got 'window' with mode='scratch'"),
        ("pgap", {"merge": "never"}, r"^merge: got 'never'; accepted: "),
    ],
)
def test_options_that_do_not_go_together(id, options, message):
    model = Words()
    with pytest.raises(ValueError, match=message):
        make(ROW[id], model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_hooked_modes_need_the_model(mode):
    named = list(Words().named_parameters())
    with pytest.raises(ValueError, match=f"^mode: got '{mode}', but no model was given"):
        make(ROW["pgap"], named, mode=mode)
    with pytest.raises(ValueError, match=f"^mode: got '{mode}', but model: its modules do not have the parameter"):
        make(ROW["pgap"], named, model=Words(), mode=mode)  # another's parameters


def test_folded_where_nothing_folds_is_refused():
    with pytest.raises(
        ValueError, match=r"^mode: got 'folded', but no low-rank direction could be folded: 'table', for one.*'scratch'"
    ):
        make(ROW["pgap"], Bare(), exclude=["inner*"], mode="folded")


@pytest.mark.parametrize("row, mode", cycled(LOW_RANK, PLAIN))
def test_a_rank_above_the_matrix_is_that_of_the_matrix(row, mode):
    model, opt = make(row, rank=400, mode=mode)
    opt.step(Losses(model))
    ranks = {w.name: min(w.tensor.shape) for w in opt.matrices()}
    assert {w.name: opt.rank_of(w) for w in opt.matrices()} == ranks
    if row.id != "eggroll":  # which keeps no factors
        side = "left" if row.id == "zo-muon" else "right"
        assert {w.name: opt.state[w.tensor][side].shape[1] for w in opt.matrices()} == ranks
    with pytest.raises(ValueError, match=r"^rank: got 600; accepted: .*512"):
        make(row, nn.Linear(600, 600, bias=False), rank=600, mode=mode)


@pytest.mark.parametrize("id, mode", [("mezo-3", "scratch"), ("pgap", "folded")])
def test_slices_are_not_served_in_place(id, mode):
    _, opt = make(ROW[id], Words(), mode="auto", members=2)
    assert opt.mode == mode and opt.mode_reason == "slices see points of their own"
    with pytest.raises(ValueError, match=r"^mode: got 'auto', but no mode can serve: no model was given"):
        ROW["mezo-3"].make(list(Words().named_parameters()), **ROW["mezo-3"].options, members=2)


@pytest.mark.parametrize(
    "id, mode", [("mezo-3", "scratch"), ("pgap", "scratch"), ("pgap", "folded"), ("helene", "scratch")]
)
def test_stacked_losses_and_batches(id, mode):
    model = Words()
    before = snapshot(model)
    opt = ROW[id].make(model, **{**ROW[id].options, **options_of(mode), "members": 2})
    whole = Losses(model, stacked=True)

    def rows(count: int):
        return model(torch.cat([IDS, IDS])[:count]).mean((1, 2))[:2]

    for closure in (lambda: whole()[:1], lambda: whole()[[0, 1, 1]], lambda: whole()[0].item()):
        with pytest.raises(ValueError, match=r"^closure: returned .*accepted: with members=2 .* the 2 real losses"):
            opt.step(closure)
    with pytest.raises(RuntimeError, match=r"^points: '\w+' got 15 rows"):
        opt.step(lambda: rows(15))
    assert opt.steps == 0
    assert_same_weights(model, before)
    opt.step(whole)


# ---- changes between steps ------------------------------------------------------------------------------------------


def stepped(opt, model, steps) -> None:
    for _ in range(steps):
        opt.step(Losses(model))


@pytest.mark.parametrize(
    "before, after", [(a, b) for a in ("inplace", "scratch", "folded", "window") for b in PLAIN if a != b]
)
def test_the_mode_may_change_between_steps(before, after):
    """Within a window merge() comes first; what follows is the run of the other mode from there."""
    row = ROW["pgap"]
    model, opt, _ = build(row, before, weight_decay=0.5)
    stepped(opt, model, 2)
    if before == "window":
        with pytest.raises(ValueError, match=rf"^mode: got '{after}' while mode 'folded' has updates.*merge\(\)"):
            opt.mode = after
        opt.merge()
    passes, merges = opt.passes, {"merge": "window"} if before == "window" and after == "folded" else {}
    if before == "window" and after != "folded":
        with pytest.raises(ValueError, match=rf"^merge: got 'window' with mode='{after}'"):
            opt.mode = after
        stepped(opt, model, 1)
        return
    other, twin = make(row, mode=after, weight_decay=0.5, seed=9, **merges)
    other.load_state_dict(model.state_dict())
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.mode = after
    assert opt.mode == twin.mode and opt.passes == passes
    stepped(opt, model, 4)
    stepped(twin, other, 4)
    assert opt.pending == twin.pending
    assert_same_weights(model, other)


def test_a_mode_change_out_of_the_two_pass_schedule():
    model, opt, _ = build(ROW["mezo"], "two_pass")
    stepped(opt, model, 2)
    with pytest.raises(ValueError, match=r"^mode: got 'scratch' while mode 'inplace' has updates or perturbations"):
        opt.mode = "scratch"
    opt.merge()
    with pytest.raises(ValueError, match=r"^two_pass: got True with mode='scratch'"):
        opt.mode = "scratch"
    assert opt.mode == "inplace"
    stepped(opt, model, 1)


def test_a_mode_that_is_refused_changes_nothing():
    model, opt = make(ROW["mezo"], mode="scratch")
    for bad in ("folded", "nowhere"):
        with pytest.raises(ValueError, match=r"^mode: got"):
            opt.mode = bad
    other, twin = make(ROW["mezo"], mode="scratch")
    stepped(opt, model, 2)
    stepped(twin, other, 2)
    assert_same_weights(model, other)


@pytest.mark.parametrize("row, mode", some_runs(METHODS, unstacked))
def test_add_param_group_within_a_window(row, mode):
    """Merges; the new weights are perturbed from the next step on, and the old ones' run goes on."""
    model = Words(tied=False)
    named = dict(model.named_parameters())
    new = [(name, named.pop(name)) for name in ("head.weight", "head.bias")]
    own = {"kappa": 9} if row.id == "dizo" else {}
    opt = row.make(list(named.items()), model=model, **{**row.options, **options_of(mode), **own})
    stepped(opt, model, 2)
    assert opt.pending == (mode in ("two_pass", "window"))
    with pytest.raises(ValueError, match=r"^lr: got"):
        opt.add_param_group({"params": new, "lr": -1.0})
    opt.add_param_group({"params": new, "lr": 0.01})
    assert not opt.pending
    before = snapshot(model)
    stepped(opt, model, 12 if row.id in LAYERWISE else 3)
    opt.merge()
    moved = {name for name, w in snapshot(model).items() if not torch.equal(w, before[name])}
    assert set(before) - moved <= (
        {"affine.gain"} if row.id == "sparse-mezo" else set()
    )  # it may outgrow its threshold


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_add_param_group_that_cannot_be_served_changes_nothing(mode):
    model = Words(tied=False)
    opt = PGAP(list(model.named_parameters()), model=model, **ROW["pgap"].options, mode=mode)
    stepped(opt, model, 2)
    with pytest.raises(ValueError, match="do not have the parameter 'extra'"):
        opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(4, 4)))]})
    assert len(opt.param_groups) == 1 and noise.tensor_id("extra") not in {w.id for w in opt.weights()}
    stepped(opt, model, 2)


@pytest.mark.parametrize("mode", ["two_pass", "scratch"])
def test_a_planned_step_takes_weights_that_were_added(mode):
    """The two-pass schedule has planned the next step, and so has a step that failed."""
    model = Words()
    late = [(n, p) for n, p in model.named_parameters() if n.startswith("head")]
    early = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    opt, losses = MeZO(early, model=model, lr=0.05, **options_of(mode)), Losses(model)
    opt.step(losses)
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
    model, opt = make(ROW["mezo"], mode=mode, lr=1.0, weight_decay=1.0)
    assert math.isfinite(opt.step(Losses(model)))


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_a_change_that_was_refused_can_be_undone(mode):
    """Embeddings with max_norm, and recurrent layers on the scratch, cannot be served: only frozen."""
    first = nn.Embedding(10, 8, max_norm=1.0) if mode == "inplace" else nn.Sequential(nn.Embedding(10, 8), Recurrent())
    model = nn.Sequential(first.requires_grad_(False), nn.Flatten(), nn.Linear(16, 2))
    opt, ids = MeZO(model, lr=0.05, mode=mode), torch.tensor([[1, 2], [3, 4]])

    def closure():
        return model(ids).square().mean()

    opt.step(closure)
    first.requires_grad_(True)
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError)):
        opt.step(closure)
    assert_same_weights(snapshot(model), before)
    first.requires_grad_(False)
    opt.step(closure)
    after = snapshot(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"2.weight", "2.bias"}
    if mode == "scratch":  # and what this mode cannot serve another one can
        first.requires_grad_(True)
        with pytest.raises((ValueError, RuntimeError)):
            opt.step(closure)
        opt.mode = "inplace"
        opt.step(closure)
        assert opt.mode == "inplace" and not torch.equal(
            after["0.1.inner.weight_hh_l0"], model.state_dict()["0.1.inner.weight_hh_l0"]
        )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


def test_costs_are_asked_of_an_optimizer_that_is_attached():
    model = Words()
    one = MeZO(model, mode="scratch")
    one.detach()
    two = MeZO(model, mode="scratch")
    two.step(Losses(model))
    model.up.requires_grad_(False)
    with pytest.raises(RuntimeError, match="detached"):
        one.cost()
    two.step(Losses(model))


def test_copies_of_data_parallel_are_refused():
    model = Words()
    opt = MeZO(model, mode="scratch")
    model.up.__dict__["_is_replica"] = True
    with pytest.raises(RuntimeError, match="DataParallel"):
        opt.step(Losses(model))


def test_memory_that_captured_graphs_read_is_kept(monkeypatch):
    """A method that moves other layers in each step has new operands in each, and the oldest go."""
    monkeypatch.setattr(points, "_MOST", 0)
    model = Words()
    opt, losses, kept = LeZO(model, lr=0.01, mode="scratch"), Losses(model), {}
    shown = opt.perturbation.points

    def captured():
        shown.keep_captured()
        kept.update({place: shown._memory[place] for place in shown._used})
        return losses()

    opt.step(captured)
    for _ in range(20):
        opt.step(losses)
    assert kept and all(shown._memory.get(place) is operands for place, operands in kept.items())
    key = shown.key
    shown.clear()
    opt.step(losses)
    assert shown.key[1] != key[1], "graphs of the memory before are of another key"


def test_tensors_that_captured_graphs_read_are_kept():
    """DiZO makes new ones in each projection, which might else take the place, and so the key, of those of a graph."""
    row = ROW["dizo"]
    _, opt, closure = build(row, "scratch")
    shown, read = opt.perturbation.points, []

    def captured():
        shown.keep_captured()
        read.extend(weakref.ref(t) for place in shown._used for t in shown._memory[place].outside() if t is not None)
        return closure()

    for _ in range(3 * row.period):
        opt.step(captured)
    assert read and all(ref() is not None for ref in read)


def test_planes_of_frozen_weights_wait():
    model = Words().to(torch.bfloat16)
    opt = MeZO(model, lr=0.05, residual=True, mode="scratch")
    for _ in range(3):
        opt.step(Losses(model))
    planes = {name: plane.clone() for name, plane in opt.perturbation.residual.planes.items()}
    twin = Words().to(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    twin.up.requires_grad_(False)
    other = MeZO(twin, lr=0.05, residual=True, mode="scratch")
    other.load_state_dict(opt.state_dict())
    twin.up.requires_grad_(True)
    other.follow_model()
    assert planes["up.weight"].any()
    assert all(torch.equal(plane, planes[name]) for name, plane in other.perturbation.residual.planes.items())


def test_flat_losses_are_those_of_each_group():
    flat = FlatLosses()
    for _ in range(9):
        flat.note([1.0, 2.0, 1.0, 2.0], groups=2)
    assert flat.steps == 9
    flat.note([1.0, 2.0, 1.0, 2.5], groups=2)
    assert flat.steps == 0
