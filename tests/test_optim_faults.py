"""Ctrl-C waits for passes, every forward of a step sees the same state, and what overflows is no step."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from support.contract import build
from support.methods import METHODS, ROWS
from support.models import INPUTS, assert_same_weights, snapshot
from support.selection import some_runs, unstacked
from torch import nn
from torch.nn import functional as F

from pgap_kernels import ops
from pgap_kernels.directions import LowRank
from pgap_kernels.optim import LOZO, PGAP, CapturedClosure, LeZO, MeZO, captured
from pgap_kernels.perturbation import uninterrupted
from pgap_kernels.perturbation.points import Points

ROW = {row.id: row for row in ROWS}

# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


def interrupted_during_pass(monkeypatch, opt, closure, number):
    """One step with SIGINT arriving within the given dense pass; whether the pass was completed."""
    real, calls, completed = ops.dense_perturb_, [], []

    def op(*args, **kwargs):
        calls.append(0)
        if len(calls) - 1 == number:
            os.kill(os.getpid(), signal.SIGINT)
        real(*args, **kwargs)
        completed.append(len(calls) - 1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "dense_perturb_", op)
        opt.step(closure)
    return number in completed


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("id", ["mezo-3", "pgap"])
def test_ctrl_c_waits_until_a_pass_is_over(id, number, monkeypatch):
    model, opt, closure = build(ROW[id], "inplace")
    before, handler = snapshot(model), signal.getsignal(signal.SIGINT)
    assert interrupted_during_pass(monkeypatch, opt, closure, number)
    assert signal.getsignal(signal.SIGINT) is handler and opt.steps == 0
    for name, p in model.named_parameters():
        assert (p - before[name]).abs().max() <= 1e-5, name  # roundings of values below 4, not an eps of 1e-2
    assert math.isfinite(opt.step(closure))


@pytest.mark.parametrize("id, mode, last", [("mezo-3", "inplace", 6), ("mezo-3", "scratch", 0), ("pgap", "folded", 0)])
def test_ctrl_c_during_the_update_counts_the_step(id, mode, last, monkeypatch):
    model, opt, closure = build(ROW[id], mode)
    same, counted, its = build(ROW[id], mode)
    counted.step(its)
    assert interrupted_during_pass(monkeypatch, opt, closure, last)
    assert opt.steps == 1 and not opt.pending
    assert_same_weights(model, same)
    opt.step(closure)
    counted.step(its)
    assert_same_weights(model, same)


def test_a_step_whose_update_was_interrupted_is_whole(monkeypatch):
    """What a method notes after its update, too: the momentum of the factors."""
    (model, opt, closure), (same, plain, its) = (build(ROW["tezo-momentum"], "inplace") for _ in range(2))
    plain.step(its)
    apply = opt.perturbation.apply

    def interrupted(update):
        os.kill(os.getpid(), signal.SIGINT)
        apply(update)

    monkeypatch.setattr(opt.perturbation, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    monkeypatch.undo()
    assert opt.steps == 1 and opt.last.losses == plain.last.losses
    for one, other in ((opt, closure), (plain, its)):
        one.step(other)
    assert_same_weights(model, same)


def test_all_signals_that_python_handles_wait():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("term"))
    alarm = signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGALRM)
            assert seen == []
        assert sorted(seen) == ["alarm", "term"]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGALRM, alarm)


def test_ctrl_c_is_not_lost_under_the_default_handler():
    code = (
        "import os, signal; from pgap_kernels.perturbation import uninterrupted\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "with uninterrupted(): os.kill(os.getpid(), signal.SIGINT); print('held', flush=True)\n"
        "print('lost')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("held\n", -signal.SIGINT)


@pytest.mark.parametrize("id, mode", [("mezo-3", "inplace"), ("pgap", "window")])
def test_steps_in_a_thread(id, mode):
    """Signal handlers belong to the main thread; elsewhere a step just runs."""
    (model, opt, closure), (same, plain, its) = build(ROW[id], mode), build(ROW[id], mode)
    thread = threading.Thread(target=opt.step, args=(closure,))
    thread.start()
    thread.join()
    plain.step(its)
    assert opt.steps == 1
    assert_same_weights(model, same)


# ---- operands -------------------------------------------------------------------------------------------------------


def test_parts_of_one_layout_have_operands_of_their_own():
    _, opt, _ = build(ROW["eggroll"], "scratch")
    one, other = (next(iter(opt.direction(0, number))) for number in (0, 1))
    assert one.layout() == other.layout()
    points = Points(len(opt.weights()))
    points.show([[one, other]])
    first, second = (loaded.operands for loaded in points.added(one.indices[0], 0))
    assert first is not second


def test_no_memory_for_a_window_is_no_step(monkeypatch):
    (model, opt, closure), (same, plain, its) = (build(ROW["lozo"], "window") for _ in range(2))
    apply = opt.perturbation.apply

    def full(self):
        raise MemoryError

    def failing(update):
        with monkeypatch.context() as patch:
            patch.setattr(LowRank, "operands", full)
            apply(update)

    before = snapshot(model)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(opt.perturbation, "apply", failing)
        opt.step(closure)
    assert opt.steps == 0 and not opt.pending
    assert_same_weights(model, before)
    for one, other in ((opt, closure), (plain, its)):
        one.step(other)
        one.merge()
    assert_same_weights(model, same)


def test_operands_of_other_weights_in_each_step_do_not_pile_up():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    opt = LeZO(model, mode="scratch", sparsity=0.5)
    x = torch.ones(2, 2)
    for _ in range(80):
        opt.step(lambda: model(x).square().mean())
    assert len(opt.perturbation.points._memory) <= 64


# ---- what every forward of a step sees ------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mode", some_runs(METHODS, unstacked))
def test_every_forward_of_a_step_sees_the_same_torch_rng(row, mode):
    _, opt, closure = build(row, mode)
    torch.manual_seed(5)
    seen = []
    for _ in range(3):
        masks: list = []
        closure.at = lambda call, masks=masks: masks.append(F.dropout(torch.ones(64)))
        state = torch.get_rng_state()
        opt.step(closure)
        after = torch.get_rng_state()
        assert len(masks) >= 2 and all(torch.equal(mask, masks[0]) for mask in masks)
        torch.set_rng_state(state)
        F.dropout(torch.ones(64))
        assert torch.equal(torch.get_rng_state(), after)  # one forward's worth
        seen.append(masks[0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_buffers_survive_a_skipped_step():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    opt, start = MeZO(model, on_nonfinite="skip", mode="inplace"), copy.deepcopy(dict(model.named_buffers()))
    opt.step(lambda: model(INPUTS).sum() * math.nan)
    assert opt.skipped == 1
    assert_same_weights(dict(model.named_buffers()), start)


@pytest.mark.parametrize(
    "method, options",
    [(PGAP, {"lr": 2e35, "window": 10, "probes": 1}), (LOZO, {"lr": 3e38, "directions": 2})],
)
@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_an_update_that_overflows_with_its_scale_is_skipped(mode, method, options):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    before = snapshot(model)
    opt = method(model, rank=1, on_nonfinite="skip", mode=mode, **options)
    opt.step(lambda: (model(torch.eye(64)) * torch.arange(64.0)).sum())
    assert opt.skipped == 1 and opt.steps == 1
    for name, after in snapshot(model).items():
        assert ((after - before[name]).abs() <= (1e-5 if mode == "inplace" else 0)).all()


def test_forwards_that_come_back_are_captured(monkeypatch):
    """In the second step that has their kind; what comes in one step alone would only fill the memory."""
    perturbation = SimpleNamespace(weights=[], watched=False, graph_key=None)
    optimizer = SimpleNamespace(weights=list, steps=0, perturbation=perturbation, model=None)
    ran, replayed = [], []

    def capture(call):
        key = perturbation.graph_key
        return SimpleNamespace(replay=lambda: replayed.append((optimizer.steps, key))), torch.zeros(())

    monkeypatch.setattr(captured, "capture", capture)
    own = CapturedClosure(optimizer, lambda: ran.append((optimizer.steps, perturbation.graph_key)))
    for optimizer.steps, keys in enumerate(("aa", "ab", "ac", "ba")):
        for perturbation.graph_key in keys:
            own()
    assert ran == [(0, "a"), (0, "a"), (1, "b"), (2, "c")]
    assert replayed == [(1, "a"), (2, "a"), (3, "b"), (3, "a")] and len(own.graphs) == 2
    perturbation.weights = []  # moved or cast
    own()
    assert ran[-1] == (3, "a") and not own.graphs


def test_forwards_are_captured_on_a_gpu_only():
    _, opt, closure = build(ROWS[0], "inplace")
    with pytest.raises(ValueError, match=r"^optimizer: got weights on cpu; accepted: weights on a CUDA device"):
        CapturedClosure(opt, closure)
