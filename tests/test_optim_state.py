"""State moves and stays where it belongs; foreign states and bad arguments are refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.contract import Contract, build
from support.methods import METHODS, ROWS
from support.models import Losses, Words, assert_same_weights, failing, snapshot
from torch import Tensor, nn

from pgap_kernels.optim import (
    EGGROLL,
    FZOO,
    HELENE,
    LOZO,
    LOZOM,
    PGAP,
    PIZO,
    AdaLeZO,
    DiZO,
    LeZO,
    MeZO,
    PIZOSubZero,
    SubZero,
    TeZO,
    ZOMuon,
)

ROW = {row.id: row for row in ROWS}


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_every_state_moves(row):
    """After twenty steps; published code has state that never does."""
    _, opt, closure = build(row, "inplace", lr=1e-3)
    start: dict[tuple, Tensor] = {}
    for _ in range(20):
        opt.step(closure)
        for p, state in opt.state.items():
            for entry, value in state.items():
                start.setdefault((p, entry), copy.deepcopy(value))
    without = row.id in ("pgap-dense", "sparse-mezo-random")
    assert bool(start) != (without or row.make in (MeZO, PIZO, EGGROLL, FZOO, LeZO, AdaLeZO))
    for (p, entry), first in start.items():
        if entry in opt.state[p] and entry not in row.constant:
            now = opt.state[p][entry]
            assert not (torch.equal(now, first) if isinstance(now, Tensor) else now == first), entry
    for name in opt.saved_attributes:  # the step of a refresh, the key of the best noise
        never = row.id in ("pgap-dense", "pizo-gv", "pizo-subzero") or row.make in (EGGROLL, TeZO)
        assert never or getattr(opt, name) is not None


def test_state_lies_with_its_parameter():
    """In float32 on 16-bit parameters, none on what is frozen; P-GAP's and LOZO's of matrices alone."""
    for row in METHODS:
        model = Words().to(torch.bfloat16)
        model.norm.requires_grad_(False)
        _, opt, closure = build(row, "scratch", model)
        opt.step(closure)
        kept = {n: opt.state.get(p, {}) for n, p in model.named_parameters()}
        assert not kept["norm.weight"]
        if row.id in ("pgap", "lozo"):
            assert {n for n, state in kept.items() if state} == {w.name for w in opt.matrices()}
        tensors = [(entry, t) for state in kept.values() for entry, t in state.items() if isinstance(t, Tensor)]
        assert all(t.dtype == torch.float32 or entry == "anchor" for entry, t in tensors)


@pytest.mark.parametrize("row", METHODS)
def test_a_state_is_pytorchs_with_a_header(row):
    _model, opt, closure = build(row, "inplace")
    opt.step(closure)
    state = opt.state_dict()
    assert state.keys() == {"state", "param_groups", "zo"}
    assert state["zo"].items() >= {"format": 3, "contract_version": 1, "method": row.make.method, "steps": 1}.items()


def test_a_loaded_state_is_a_copy():
    """The dict stays as it is, whatever the optimizer does next; another may load it too."""
    state = copy.deepcopy(stepped("lozo-m").state_dict())
    before = copy.deepcopy(state["state"])
    _, opt, closure = build(ROW["lozo-m"], "inplace")
    opt.load_state_dict(state)
    opt.step(closure)
    assert before
    for number, entries in before.items():
        assert all(torch.equal(value, state["state"][number][entry]) for entry, value in entries.items())


def test_a_loaded_tensor_takes_the_memory_of_the_one_before():
    """Captured graphs read it there."""
    _model, opt, closure = build(ROW["lozo-m"], "inplace")
    opt.step(closure)
    places = {(p, e): t.data_ptr() for p, state in opt.state.items() for e, t in state.items()}
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert places == {(p, e): t.data_ptr() for p, state in opt.state.items() for e, t in state.items()}


@pytest.mark.parametrize("row", METHODS)
def test_a_skip_in_a_first_step_survives_a_checkpoint(row):
    model, opt, closure = build(row, "inplace", on_nonfinite="skip")
    assert math.isnan(opt.step(failing(math.nan)))
    other, loaded, its = build(row, "inplace", copy.deepcopy(model), on_nonfinite="skip")
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert (loaded.skipped, loaded.steps) == (1, 1)
    for _ in range(2):
        opt.step(closure)
        loaded.step(its)
    assert_same_weights(model, other)


# ---- states that are refused ----------------------------------------------------------------------------------------


def stepped(id: str, **options):
    _, opt, closure = build(ROW[id], "inplace", **options)
    opt.step(closure)
    return opt


def without_format(state: dict) -> dict:
    """As the first version of this package wrote it."""
    return {**state, "zo": {key: value for key, value in state["zo"].items() if key != "format"}}


@pytest.mark.parametrize(
    "foreign, message",
    [
        (lambda own: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict(), "without the entry 'zo'"),
        (without_format, "got format 1, of another version of this package, which kept the state of methods otherwise"),
        (lambda own: {**own, "zo": own["zo"] | {"format": 4}}, "got format 4.*accepted: format 3"),
        (lambda own: {**own, "zo": own["zo"] | {"contract_version": 2}}, "got noise of version 2"),
        (lambda own: stepped("pgap").state_dict(), "got that of the method PGAP; accepted: that of LOZO"),
        (lambda own: {**own, "zo": own["zo"] | {"tensor_ids": {"up.weight": 5}}}, "'up.weight' had the tensor id 5"),
        (lambda own: {**own, "zo": own["zo"] | {"residual": {}}}, "^residual: got False; accepted: True"),
    ],
)
def test_foreign_states_are_refused(foreign, message):
    opt = stepped("lozo")
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(foreign(copy.deepcopy(before)))
    after = opt.state_dict()
    assert after["zo"] == before["zo"] and after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(value, after["state"][number][entry]) for entry, value in state.items())


def test_a_state_never_renames_parameters():
    model = Words()
    forward, backward = MeZO(model, mode="inplace"), MeZO(list(model.named_parameters())[::-1], mode="inplace")
    with pytest.raises(
        ValueError, match=r"^state_dict: got parameters .*accepted: those of this optimizer in their order"
    ):
        backward.load_state_dict(forward.state_dict())
    assert [w.name for w in backward.weights()] == [n for n, _ in list(model.named_parameters())[::-1]]


# ---- hyper-parameters -----------------------------------------------------------------------------------------------


def test_a_scheduler_moves_every_rate():
    """P-GAP's two learning rates; the naive method has those that the groups have at the moment."""
    contract = Contract(ROW["pgap-groups"], "inplace")
    scheduler = torch.optim.lr_scheduler.LambdaLR(contract.optimizer, lambda step: 0.5**step)
    for _ in range(4):
        contract.step()
        scheduler.step()
    contract.finish()


SMALL = {HELENE: {"batch_size": 8}, DiZO: {"select": ["up.weight"]}}


@pytest.mark.parametrize(
    "method, name, values",
    [
        (MeZO, "lr", [-1e-9, math.nan, math.inf, "1e-3", True, None]),
        (MeZO, "eps", [0.0, -1e-3, math.nan, math.inf]),
        (MeZO, "weight_decay", [-0.1, math.nan]),
        (MeZO, "probes", [0, -1, 1.0, True]),
        (MeZO, "on_nonfinite", ["ignore"]),
        (PGAP, "rank", [0, -1, 2.0]),
        (PGAP, "window", [0, 1.5]),
        (PGAP, "probes", [0]),
        (PGAP, "delta", [-1e-9, math.nan]),
        (PGAP, "delta_steps", [0, -3]),
        (PGAP, "xi", ["both"]),
        (PGAP, "scale", ["mezo"]),
        (PGAP, "eps_probe", [0.0]),
        (PGAP, "eps_dense", [0, -1.0]),
        (PGAP, "lr_dense", [-1.0]),
        (PIZO, "alpha", [math.nan, "half"]),
        (PIZO, "alpha, pool", [0.2, 1.0]),
        (PIZO, "guide", ["best"]),
        (HELENE, "beta1", [1.0, -0.1, math.nan]),
        (HELENE, "beta2", [1.0]),
        (HELENE, "gamma", [0.0]),
        (HELENE, "floor", [0.0, -1.0]),
        (HELENE, "e", [0.0]),
        (HELENE, "anneal_steps", [0.0]),
        (HELENE, "refresh_every", [0, 2.5]),
        (HELENE, "batch_size", [0, 1.5]),
        (LOZO, "rank", [0, 600]),
        (LOZO, "window", [0]),
        (LOZOM, "beta", [1.0, -1e-9]),
        (DiZO, "kappa", [0]),
        (DiZO, "iterations", [0]),
        (DiZO, "eps_p", [0.0]),
        (DiZO, "tau", [0.0, math.nan]),
        (DiZO, "s", [-1.0]),
    ],
)
def test_bad_hyper_parameters(method, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: "):
            method(Words(), **{**SMALL.get(method, {}), name.partition(",")[0]: value}, mode="inplace")


def test_hyper_parameters_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"^baseline: got 'loo' with xi='fixed'"):
        PGAP(Words(), xi="fixed", directions=2, baseline="loo")
    with pytest.raises(ValueError, match=r"^lr: got 0.0; accepted: "):
        ZOMuon(Words(), lr=0.0)


def test_a_rank_beyond_the_probes():
    model = Words()
    opt = PGAP(model, rank=2, probes=2, probe_rank=1, mode="inplace")
    opt.param_groups[0]["rank"] = 4
    closure = Losses(model)
    with pytest.raises(ValueError, match=r"^rank: got 4 for 'embed.weight' with probe_rank=1; accepted: up to 2"):
        opt.step(closure)
    assert closure.calls == 0


def test_a_step_taken_again_makes_its_direction_anew():
    """Of what the groups then say."""
    ends = []
    for fails in (True, False):
        model = Words()
        opt = PGAP(model, lr=0.05, rank=2, probes=2, window=3, delta=0.5, mode="inplace")
        opt.step(Losses(model))
        if fails:
            with pytest.raises(ZeroDivisionError):
                opt.step(failing(ZeroDivisionError))
        opt.param_groups[0]["delta"] = 4.0
        opt.step(Losses(model))
        ends.append(snapshot(model))
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[1][name], rtol=1e-5, atol=1e-6)


RANKED = ("pgap", "svd-0", "subzero", "pizo-subzero", "lozo", "lozo-m", "tezo-adam", "zo-muon", "agzo")


@pytest.mark.parametrize("way", ["inplace", "two_pass", "window"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.id in RANKED])
def test_a_rank_that_is_changed_between_refreshes(row, way):
    ends = []
    for mode in {way if way in row.modes else "inplace", "scratch"}:
        model, opt, closure = build(row, mode)
        for rank in (2, 2, 1, 1, 3):
            opt.param_groups[0]["rank"] = rank
            opt.step(closure)
            for w in opt.matrices():
                sides = {"left", "right"} & opt.state[w.tensor].keys()
                assert {opt.state[w.tensor][side].shape[1] for side in sides} == {opt.rank_of(w)}
        opt.merge()
        ends.append(snapshot(model))
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[-1][name], rtol=1e-3, atol=1e-4)
    opt.param_groups[0]["rank"] = 600
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^rank: got 600; accepted: 1 to 512"):
        opt.step(closure)
    assert_same_weights(model, before)


@pytest.mark.parametrize("method", [SubZero, PIZOSubZero])
def test_a_state_of_reshaped_matrices_is_loaded(method):
    runs = []
    for _ in range(2):
        model = Words()
        runs.append((model, method(model, rank=2, reshape=["lora_*"], mode="inplace"), Losses(model)))
    (model, opt, closure), (other, loaded, its) = runs
    opt.step(closure)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(opt.state_dict())
    opt.step(closure)
    loaded.step(its)
    assert_same_weights(model, other)


def test_a_weight_decay_that_dizo_does_not_have():
    model = Words()
    with pytest.raises(ValueError, match=r"^weight_decay: got 0\.1; accepted: 0, DiZO has none"):
        DiZO([{"params": list(model.named_parameters()), "weight_decay": 0.1}], select=["up.weight"], mode="inplace")


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**64, ValueError), (1.5, TypeError), (None, TypeError)])
def test_bad_seeds(seed, error):
    with pytest.raises(error, match=r"^seed: got .*; accepted: an integer in \[0, 2\*\*64\)"):
        MeZO(Words(), seed=seed, mode="inplace")


def test_the_largest_seed():
    model, before = Words(), snapshot(Words())
    opt = MeZO(model, seed=2**64 - 1, mode="inplace")
    opt.step(Losses(model))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.seed == 2**64 - 1 and not torch.equal(model.up.weight, before["up.weight"])


def test_a_model_without_trainable_parameters():
    for method, model in ((MeZO, nn.ReLU()), (PGAP, Words().requires_grad_(False))):
        with pytest.raises(ValueError, match=r"^params: got no trainable parameter"):
            method(model, mode="inplace")
