"""Runs continue where they stopped; foreign states and bad arguments are refused."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from optim_contract import (
    METHODS,
    SMALL_PGAP,
    Net,
    Recorder,
    WatchedPGAP,
    assert_same_bits,
    check_applied,
    dense_direction,
    failing,
    is_dense,
    loss_of,
    make,
    snapshot,
    subspace_direction,
)
from torch import nn

from pgap_kernels.optim import PGAP, MeZO

# ---- state ----------------------------------------------------------------------------------------------------------


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("at", [0, 1, 4, 5])
@pytest.mark.parametrize("method, options", [(MeZO, {"probes": 2}), (PGAP, {"rank": 2, "window": 4, "probes": 2})])
def test_a_loaded_run_continues_bit_for_bit(method, options, at):
    model, opt = make(method, options, seed=2**64 - 1)
    for step in range(7):
        if step == at:
            state = saved({"model": model.state_dict(), "opt": opt.state_dict()})
        opt.step(lambda: loss_of(model))
    other, loaded = make(method, options, seed=0, lr=0.7)
    other.load_state_dict(state["model"])
    loaded.load_state_dict(state["opt"])
    assert loaded.steps == at
    for _ in range(at, 7):
        loaded.step(lambda: loss_of(other))
    assert_same_bits(snapshot(model), snapshot(other))
    assert (loaded.steps, loaded.seed) == (7, 2**64 - 1)


@pytest.mark.parametrize("method, options", METHODS)
def test_a_skip_in_a_refresh_survives_a_checkpoint(method, options):
    model, opt = make(method, options, on_nonfinite="skip")
    opt.step(Recorder(model, fail_at={0: failing(math.nan)}))
    other, loaded = make(method, options, copy.deepcopy(model))
    loaded.load_state_dict(saved(opt.state_dict()))
    assert loaded.skipped == 1
    for _ in range(2):
        opt.step(lambda: loss_of(model))
        loaded.step(lambda: loss_of(other))
    assert_same_bits(snapshot(model), snapshot(other))


def test_foreign_states_are_refused():
    model, opt = make(MeZO, {})
    state = opt.state_dict()
    before = opt.state_dict()
    plain = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    for bad, message in (
        (plain, "without the entry 'zo'"),
        (state | {"zo": state["zo"] | {"contract_version": 2}}, "under noise contract 2"),
        (make(PGAP, SMALL_PGAP)[1].state_dict(), "got PGAP"),
    ):
        with pytest.raises(ValueError, match=f"^state_dict: .*{message}"):
            opt.load_state_dict(bad)
        assert opt.state_dict() == before
    source = make(PGAP, SMALL_PGAP, exclude=["inner*"])
    source[1].step(lambda: loss_of(source[0]))
    with pytest.raises(ValueError, match=r"^state_dict: got rank None for 'inner\.weight'"):
        make(PGAP, SMALL_PGAP)[1].load_state_dict(source[1].state_dict())


def test_a_state_with_more_matrices_is_refused_by_name():
    model, opt = make(PGAP, SMALL_PGAP)
    opt.step(lambda: loss_of(model))
    with pytest.raises(ValueError, match=r"^state_dict: .*inner"):
        make(PGAP, SMALL_PGAP, exclude=["inner*"])[1].load_state_dict(opt.state_dict())


def test_a_state_never_renames_parameters():
    model = Net()
    forward, backward = MeZO(model, mode="inplace"), MeZO(list(model.named_parameters())[::-1], mode="inplace")
    names = [w.name for w in backward.weights()]
    try:
        backward.load_state_dict(forward.state_dict())
    except ValueError as error:
        assert str(error).startswith("state_dict: ")
    assert [w.name for w in backward.weights()] == names


def test_a_scheduler_moves_both_learning_rates():
    model = Net()
    opt = WatchedPGAP(model, lr=0.05, lr_dense=0.2, rank=3, window=1, probes=2, seed=4, mode="inplace")
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    for step in range(3):
        closure = Recorder(model)
        opt.step(closure)
        scheduler.step()
        new, (plus, minus) = snapshot(model), closure.points[-2:]
        for name, clean in opt.clean.items():
            dense = is_dense(opt, name, clean)
            direction = (
                dense_direction(clean.shape, 4, step, name)
                if dense
                else subspace_direction(opt, step, name, clean.shape, 2.0)
            )
            check_applied(
                name, clean, new[name], [(plus[name], minus[name])], [closure.losses[-2:]], [direction],
                lr=(0.2 if dense else 0.05) * 0.5**step, eps=1e-3, decay=0.0,
            )  # fmt: skip


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("method, options", METHODS)
def test_a_copy_runs_on_its_own(method, options, copied, scheduled):
    model, opt = make(method, options)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    opt.step(lambda: loss_of(model))
    twin, twin_opt = copied((model, opt))
    before = snapshot(model)
    for _ in range(3):
        twin_opt.step(lambda: loss_of(twin))
    assert_same_bits(snapshot(model), before)
    for _ in range(3):
        opt.step(lambda: loss_of(model))
    assert_same_bits(snapshot(model), snapshot(twin))
    assert twin_opt.steps == opt.steps == 4


# ---- arguments ------------------------------------------------------------------------------------------------------


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
    ],
)
def test_bad_hyper_parameters(method, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: "):
            method(Net(), **{name: value}, mode="inplace")


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**64, ValueError), (1.5, TypeError), (None, TypeError)])
def test_bad_seeds(seed, error):
    with pytest.raises(error, match=r"^seed: got .*; accepted: an integer in \[0, 2\*\*64\)"):
        MeZO(Net(), seed=seed, mode="inplace")


def test_bad_exclude():
    with pytest.raises(TypeError, match=r"^exclude: got the string"):
        PGAP(Net(), exclude="*embed*", mode="inplace")


def test_bad_closure():
    _, opt = make(MeZO, {})
    with pytest.raises(TypeError, match=r"^closure: got None; accepted: a function"):
        opt.step(None)
    assert opt.steps == 0


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match=r"^params: got no trainable parameter"):
        MeZO(nn.ReLU(), mode="inplace")
    with pytest.raises(ValueError, match=r"^params: got no trainable parameter"):
        PGAP(Net().requires_grad_(False), mode="inplace")


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_other_dtypes_are_refused_at_once(dtype):
    with pytest.raises((TypeError, ValueError), match=r"(?s)got.*accepted: torch\.float32"):
        MeZO([("w", torch.zeros(3, dtype=dtype))], mode="inplace")


def test_a_state_under_another_tensor_id_is_refused():
    model = nn.Linear(3, 2)
    state = MeZO(model, tensor_ids={"weight": 5}, mode="inplace").state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: 'weight' had the tensor id 5"):
        MeZO(model, mode="inplace").load_state_dict(state)
    MeZO(model, tensor_ids={"weight": 5}, mode="inplace").load_state_dict(state)
