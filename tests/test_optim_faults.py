"""Whatever happens in a step, the weights come back, and every forward of it sees the same state."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from optim_contract import (
    METHODS,
    SMALL_PGAP,
    Recorder,
    assert_same_bits,
    dense_direction,
    failing,
    loss_of,
    make,
    pass_error,
    restored_bound,
    snapshot,
    weights_of,
)
from torch import nn
from torch.nn import functional as F

from pgap_kernels import ops
from pgap_kernels.optim import PGAP, MeZO, NonFiniteLossError

# ---- faults ---------------------------------------------------------------------------------------------------------


FAULTS = [
    pytest.param(ValueError, ValueError, "deliberate", id="exception"),
    pytest.param(KeyboardInterrupt, KeyboardInterrupt, "deliberate", id="ctrl-c"),
    pytest.param(StopIteration, StopIteration, "deliberate", id="stop-iteration"),
    pytest.param("vector", ValueError, r"^closure: returned torch.float32 of shape \(2,\)", id="not-a-scalar"),
    pytest.param(math.nan, NonFiniteLossError, "loss at W .* is nan in step 0", id="nan"),
    pytest.param(-math.inf, NonFiniteLossError, "loss at W .* is -inf in step 0", id="inf"),
]


def assert_restored(before, model, passes, eps=1e-3):
    for name, w in snapshot(model).items():
        bound = restored_bound(before[name], passes, eps)
        assert ((w - before[name]).abs() <= bound).all(), f"{name}: not restored"
        assert bound.max() < 0.1 * eps


def steps_like_new(opt, model, step):
    """The next step of ``opt`` evaluates the contract's directions of that step."""
    closure = Recorder(model)
    assert opt.steps == step and math.isfinite(opt.step(closure)) and opt.steps == step + 1
    plus, minus = (p["inner.bias"] for p in closure.points[-2:])
    z = dense_direction(plus.shape, opt.seed, step, "inner.bias", probe=getattr(opt, "probes", 1) - 1
                        if isinstance(opt, MeZO) else 0)  # fmt: skip
    assert ((plus - minus - 2e-3 * z.value).abs() <= pass_error(minus, (2e-3, z))).all()


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("kind, error, message", FAULTS)
def test_a_failing_closure_leaves_the_weights(method, options, kind, error, message, call):
    calls = {MeZO: 4, PGAP: 6}[method]
    if call >= calls:
        call -= calls  # MeZO has four calls only: the first two again, after a good step
    model, opt = make(method, options)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        opt.step(Recorder(model, fail_at={call: failing(kind)}))
    assert_restored(before, model, 2 * 2 + 4)
    steps_like_new(opt, model, 0)


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("method, options", METHODS)
def test_a_non_finite_loss_can_skip_the_step(method, options, call):
    model, opt = make(method, options, on_nonfinite="skip")
    before = snapshot(model)
    assert math.isnan(opt.step(Recorder(model, fail_at={call: failing(math.nan)})))
    assert (opt.steps, opt.skipped) == (1, 1)
    assert_restored(before, model, 2 * 2 + 4)
    steps_like_new(opt, model, 1)  # P-GAP: makes up for the refresh that failed
    assert opt.skipped == 1


@pytest.mark.parametrize("method, options", METHODS)
def test_a_failing_weight_pass_leaves_the_weights(method, options, monkeypatch):
    """The op itself raises, at each call but the landing's."""
    real, passes = ops.dense_perturb_, {MeZO: 4, PGAP: 7}[method]
    for fail_at in range(passes):
        model, opt = make(method, options)
        before, calls = snapshot(model), []

        def op(*args, calls=calls, fail_at=fail_at, **kwargs):
            calls.append(0)
            if len(calls) == fail_at + 1:
                raise MemoryError("deliberate")
            real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(ops, "dense_perturb_", op)
            opt.step(lambda model=model: loss_of(model))
        assert_restored(before, model, 2 * 2 + 4)
        steps_like_new(opt, model, 0)


def test_a_landing_that_fails_half_way_leaves_the_weights(monkeypatch):
    model, opt = make(PGAP, SMALL_PGAP)
    opt.step(lambda: loss_of(model))
    before, real, calls = snapshot(model), ops.dense_perturb_, []

    def op(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:  # the landing of the dense tensors; the matrices have landed
            raise MemoryError("deliberate")
        real(*args, **kwargs)

    monkeypatch.setattr(ops, "dense_perturb_", op)
    with pytest.raises(MemoryError):
        opt.step(lambda: loss_of(model))
    assert_restored(before, model, 4)


def interrupted_during_pass(monkeypatch, opt, model, number):
    """One step with SIGINT arriving within the given pass; whether the pass was completed."""
    real, calls, completed = ops.dense_perturb_, [], []

    def op(*args, **kwargs):
        calls.append(0)
        if len(calls) - 1 == number:
            os.kill(os.getpid(), signal.SIGINT)
        real(*args, **kwargs)
        completed.append(len(calls) - 1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "dense_perturb_", op)
        opt.step(lambda: loss_of(model))
    return number in completed


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("method, options", METHODS)
def test_ctrl_c_waits_until_a_pass_is_over(method, options, number, monkeypatch):
    model, opt = make(method, options)
    before, handler = snapshot(model), signal.getsignal(signal.SIGINT)
    assert interrupted_during_pass(monkeypatch, opt, model, number)
    assert signal.getsignal(signal.SIGINT) is handler
    assert_restored(before, model, 2 * 2 + 4)
    steps_like_new(opt, model, 0)


@pytest.mark.parametrize("method, options, landing", [(MeZO, {"probes": 2}, 4), (PGAP, SMALL_PGAP, 7)])
def test_ctrl_c_during_the_update_counts_the_step_or_undoes_it(method, options, landing, monkeypatch):
    model, opt = make(method, options)
    reference, counted = make(method, options)
    counted.step(lambda: loss_of(reference))
    before = snapshot(model)
    assert interrupted_during_pass(monkeypatch, opt, model, landing)
    if opt.steps == 0:
        assert_restored(before, model, 8)
    else:
        assert_same_bits(snapshot(model), snapshot(reference))


def test_ctrl_c_is_not_lost_under_the_default_handler():
    code = (
        "import os, signal; from pgap_kernels.perturbation import uninterrupted\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "with uninterrupted(): os.kill(os.getpid(), signal.SIGINT); print('held', flush=True)\n"
        "print('lost')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("held\n", -signal.SIGINT)


@pytest.mark.parametrize("method, options", METHODS)
def test_steps_in_a_thread(method, options):
    """Signal handlers belong to the main thread; elsewhere a step just runs."""
    (model, opt), (other, same) = make(method, options), make(method, options)
    thread = threading.Thread(target=opt.step, args=(lambda: loss_of(model),))
    thread.start()
    thread.join()
    same.step(lambda: loss_of(other))
    assert_same_bits(weights_of(opt), weights_of(same))


# ---- what every forward of a step sees ------------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", METHODS)
def test_every_forward_of_a_step_sees_the_same_torch_rng(method, options):
    model, opt = make(method, options)
    torch.manual_seed(5)
    seen = []
    for _ in range(3):
        masks = []
        state = torch.get_rng_state()

        def closure(masks=masks):
            masks.append(F.dropout(torch.ones(64)))
            return loss_of(model)

        opt.step(closure)
        after = torch.get_rng_state()
        assert len(masks) >= 2 and all(torch.equal(mask, masks[0]) for mask in masks)
        torch.set_rng_state(state)
        F.dropout(torch.ones(64))
        assert torch.equal(torch.get_rng_state(), after)  # one forward's worth
        seen.append(masks[0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.count = self.count + 1  # replaces the buffer
        return self.net(x)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("method, options", METHODS)
def test_every_forward_of_a_step_sees_the_same_buffers(method, options, by_name):
    torch.manual_seed(0)
    model = Normed()
    params = model.named_parameters() if by_name else model
    opt = method(params, **options, **({"model": model} if by_name else {}), mode="inplace")
    for step in range(3):
        start = {name: b.clone() for name, b in model.named_buffers()}
        seen = []

        def closure(seen=seen):
            seen.append({name: b.clone() for name, b in model.named_buffers()})
            closure.last = copy.deepcopy(model)
            return loss_of(model)

        opt.step(closure)
        for buffers in seen:
            assert_same_bits(buffers, start)
        loss_of(closure.last)  # from the last evaluated weights and the step's first buffers
        assert_same_bits(dict(model.named_buffers()), dict(closure.last.named_buffers()))
        assert model.count == model.net[1].num_batches_tracked == step + 1


def test_buffers_survive_a_skipped_step():
    model = Normed()
    opt = MeZO(model, on_nonfinite="skip", mode="inplace")
    start = {name: b.clone() for name, b in model.named_buffers()}
    opt.step(lambda: model(torch.full((8, 6), math.nan)).sum())
    assert opt.skipped == 1
    assert_same_bits(dict(model.named_buffers()), start)


def test_an_update_that_overflows_with_its_scale_is_skipped():
    model = nn.Linear(64, 64, bias=False)
    before = snapshot(model)
    opt = PGAP(model, lr=2e35, rank=1, window=10, probes=1, on_nonfinite="skip", mode="inplace")
    opt.step(lambda: (model.weight * torch.arange(64.0)).sum())
    assert opt.skipped == 1 and opt.steps == 1
    for name, after in snapshot(model).items():
        assert ((after - before[name]).abs() <= 1e-5).all()


def test_a_float_loss_keeps_its_digits():
    model = nn.Linear(3, 2)
    before = snapshot(model)
    losses = iter([1 + 3e-8, 1.0])  # one and the same in float32
    MeZO(model, lr=1.0, mode="inplace").step(lambda: next(losses))
    moved = max((after - before[name]).abs().max().item() for name, after in snapshot(model).items())
    assert moved > 3e-8 / 2e-3 / 2  # rho z, with some |z| above a half
