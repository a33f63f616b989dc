"""MeZO and P-GAP: what was evaluated is what is applied, weights always come back, runs continue where they stopped."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from optim_contract import (
    UNIT,
    Net,
    Recorder,
    WatchedPGAP,
    aligned_core,
    dense_direction,
    is_dense,
    loss_of,
    pass_error,
    restored_bound,
    snapshot,
    subspace_direction,
)
from torch import nn
from torch.nn import functional as F

from pgap_kernels import cpu, noise, ops
from pgap_kernels.noise import Role
from pgap_kernels.optim import PGAP, MeZO, NonFiniteLossError
from pgap_kernels.subspace import gradient_basis

SMALL_PGAP = {"rank": 2, "window": 2, "probes": 2}
METHODS = [pytest.param(MeZO, {"probes": 2}, id="mezo"), pytest.param(PGAP, SMALL_PGAP, id="pgap")]


def make(method, options, model=None, **more):
    model = Net() if model is None else model
    return model, method(model, **({"lr": 0.05, "eps": 1e-3, "seed": 11} | options | more))


def two_groups(model, lr=0.05, eps=1e-3):
    """The model's parameters in two groups, each with its own lr and eps."""
    inner = [(n, p) for n, p in model.named_parameters() if n.startswith("inner")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("inner")]
    return [{"params": inner}, {"params": rest, "lr": lr / 4, "eps": eps * 2}]


def weights_of(opt):
    return {w.name: w.tensor.detach().clone() for w in opt.weights()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- evaluated = applied --------------------------------------------------------------------------------------------


def check_applied(name, clean, new, pairs, losses, directions, *, lr, eps, decay, dense=True):
    """The update of one tensor is along the directions that were evaluated, and those are the contract's.

    Every stored weight is one pass from the stored weight before it, so with the passes' errors e_i (``pass_error``)
      |(W+ - W-) - 2 eps D| <= e(W-)             and
      |W_new - ((1 - d) W - sum_j a_j (W+_j - W-_j) / (2 eps))| <= sum_i e_i + sum_j |a_j| e(W-_j) / (2 eps).
    """
    count = len(pairs)
    total = torch.zeros_like(clean)
    expected = (1 - decay) * clean
    update = torch.zeros_like(clean)
    before = None
    land = []
    for (plus, minus), (loss_plus, loss_minus), direction in zip(pairs, losses, directions, strict=True):
        leave = [] if before is None else [(eps, before)]
        total += pass_error(plus, *leave, (eps, direction))
        error = pass_error(minus, (2 * eps, direction))
        total += error
        off = (plus - minus - 2 * eps * direction.value).abs()
        assert (off <= error).all(), f"{name}: not the contract's direction"
        a = lr / count * (loss_plus - loss_minus) / (2 * eps)
        update -= a * (plus - minus) / (2 * eps)
        total += abs(a) * error / (2 * eps)
        land.append((a, direction))
        before = direction
    land[-1] = (abs(land[-1][0]) + eps, land[-1][1])
    total += pass_error(new, *land, decayed=decay * pairs[-1][1].abs())
    assert ((new - expected - update).abs() <= total).all(), f"{name}: the update is not along what was evaluated"
    assert total.norm() < 0.01 * update.norm(), f"{name}: the bound would let a wrong update pass"


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("groups", [False, True])
def test_mezo_applies_what_it_evaluated(probes, weight_decay, groups):
    model = Net()
    params = two_groups(model) if groups else model
    opt = MeZO(params, lr=0.05, eps=1e-3, weight_decay=weight_decay, probes=probes, seed=3)
    for step in range(3):
        clean, closure = snapshot(model), Recorder(model)
        mean = opt.step(closure)
        new = snapshot(model)
        assert len(closure.points) == 2 * probes
        assert mean == pytest.approx(sum(closure.losses) / len(closure.losses), rel=1e-12)
        losses = list(zip(closure.losses[::2], closure.losses[1::2], strict=True))
        for name in clean:
            ours = not groups or name.startswith("inner")
            pairs = [(p[name], m[name]) for p, m in zip(closure.points[::2], closure.points[1::2], strict=True)]
            z = [dense_direction(clean[name].shape, 3, step, name, probe=j) for j in range(probes)]
            lr, eps = (0.05, 1e-3) if ours else (0.0125, 2e-3)
            decay = lr * weight_decay if clean[name].dim() > 1 else 0.0
            check_applied(name, clean[name], new[name], pairs, losses, z, lr=lr, eps=eps, decay=decay)


PGAP_CASES = [
    {},
    {"weight_decay": 0.2},
    {"scale": "paper", "lr": 0.5, "eps": 1e-2, "eps_dense": 1e-3, "lr_dense": 0.05},
    {"xi": "global", "delta": 0.5},
    {"xi": "fixed", "delta": 5.0},
    {"delta": 0.0},
    {"delta": 3.0, "delta_steps": 2},
    {"rank": 20, "exclude": ["out*.weight"]},
    {"exclude": ["*"], "eps_dense": 2e-3, "lr_dense": 0.02},
    {"eps_probe": 1e-2, "probes": 1, "window": 2},
]


@pytest.mark.parametrize("options", PGAP_CASES, ids=lambda o: "-".join(map(str, o)) or "default")
@pytest.mark.parametrize("groups", [False, True])
def test_pgap_applies_what_it_evaluated(options, groups):
    model = Net()
    options = {"lr": 0.05, "eps": 1e-3, "rank": 3, "window": 3, "probes": 2, "delta": 2.0} | options
    params = two_groups(model, options["lr"], options["eps"]) if groups else model
    opt = WatchedPGAP(params, seed=4, **options)
    for step in range(4):
        clean, closure = snapshot(model), Recorder(model)
        opt.step(closure)
        new = snapshot(model)
        if step % options["window"] == 0:
            check_refresh(opt, clean, closure, step, options)
            clean = opt.clean
        assert len(closure.points) == 2 + 2 * options["probes"] * (step % options["window"] == 0)
        plus, minus = closure.points[-2:]
        delta = options["delta"] * (1 - min(1, step / options["delta_steps"]) if "delta_steps" in options else 1)
        for name, tensor in clean.items():
            share = 1 if not groups or name.startswith("inner") else 4
            lr, eps = options["lr"] / share, options["eps"] * (1 if share == 1 else 2)
            decay = lr * options.get("weight_decay", 0.0) if tensor.dim() > 1 else 0.0
            if is_dense(opt, name, tensor):
                direction = dense_direction(tensor.shape, 4, step, name)
                lr = options.get("lr_dense", options["lr"]) / share
                eps = options.get("eps_dense", eps)
            else:
                direction = subspace_direction(opt, step, name, tensor.shape, delta)
                assert direction.size.max() < 40  # what restored_bound relies on
            check_applied(
                name, tensor, new[name], [(plus[name], minus[name])], [closure.losses[-2:]], [direction],
                lr=lr, eps=eps, decay=decay,
            )  # fmt: skip


def check_refresh(opt, clean, closure, step, options):
    """Probes stand at W +- eps_probe Q_j, bases are orthonormal, and the weights end as they began, to rounding."""
    for name, tensor in clean.items():
        group = next(w.group for w in opt.weights() if w.name == name)
        eps = options.get("eps_probe", 1e-3 if options.get("scale") == "paper" else group["eps"])
        total, before = torch.zeros_like(tensor), []
        for j in range(options["probes"]):
            q = dense_direction(tensor.shape, opt.seed, step, name, Role.PROBE, j)
            plus, minus = closure.points[2 * j][name], closure.points[2 * j + 1][name]
            error = pass_error(minus, (2 * eps, q))
            assert ((plus - minus - 2 * eps * q.value).abs() <= error).all()
            total += pass_error(plus, *before, (eps, q)) + error
            before = [(eps, q)]
        total += pass_error(opt.clean[name], *before)
        assert ((opt.clean[name] - tensor).abs() <= total).all()
        assert total.max() < 0.01 * eps  # a probe left behind would show
        if name not in opt.bases:
            assert is_dense(opt, name, tensor)
            continue
        h = options["probes"]
        keys = [noise.derive(opt.seed, step, Role.PROBE, j) for j in range(h)]
        differences = [closure.losses[2 * j] - closure.losses[2 * j + 1] for j in range(h)]
        draws = [(key, d / (2 * eps * h)) for key, d in zip(keys, differences, strict=True)]
        basis = gradient_basis(
            tensor.shape,
            draws,
            min(options["rank"], *tensor.shape),
            tensor_id=noise.tensor_id(name),
            range_key=noise.derive(opt.seed, step, Role.RANGE_FINDER),
            scratch=torch.empty(tensor.numel()),
        )
        assert all(torch.equal(a, b) for a, b in zip(basis, opt.bases[name], strict=True))


@pytest.mark.parametrize("xi, delta", [("per_matrix", 2.0), ("global", 0.3), ("fixed", 7.0), ("per_matrix", 0.0)])
def test_pgap_direction_is_aligned_with_the_basis(xi, delta):
    """Measured on the evaluated weights:  <S, Z> = xi sqrt(delta) |S|."""
    model, opt = make(WatchedPGAP, SMALL_PGAP, xi=xi, delta=delta, lr=0.0, rank=3)
    signs = set()
    for step in range(3):
        closure = Recorder(model)
        opt.step(closure)
        per_step = set()
        for w in opt.matrices():
            u, s, v = (t.double() for t in opt.bases[w.name])
            plus, minus = (p[w.name] for p in closure.points[-2:])
            scale = math.sqrt(plus.numel()) / 3
            z = u.T @ (plus - minus) @ v / (2e-3 * scale)
            # The pass rounds W- and the direction; U and V are orthonormal to eps, which multiplies |D|.
            d = subspace_direction(opt, step, w.name, plus.shape, delta)
            error = pass_error(minus, (2e-3, d)).norm() / (2e-3 * scale)
            error += 2 * (max(plus.shape) * 2 * UNIT) * d.value.norm() / scale
            _, sign = aligned_core(s, opt.seed, step, w.name, xi, delta)
            assert abs(s @ z.diagonal() / s.norm() - sign * math.sqrt(delta)) <= error < 0.01
            per_step.add(sign)
        assert len(per_step) == 1 or xi == "per_matrix"
        signs |= per_step
    assert signs == ({1.0} if xi == "fixed" else {-1.0, 1.0})


@pytest.mark.parametrize("method, options", METHODS)
def test_learning_rate_zero_leaves_the_weights(method, options):
    model, opt = make(method, options, lr=0.0, weight_decay=0.5)
    before, steps = snapshot(model), 40
    for _ in range(steps):
        opt.step(lambda: loss_of(model))
    for name, w in snapshot(model).items():
        bound = restored_bound(before[name], opt.passes, 1e-3)
        assert ((w - before[name]).abs() <= bound).all()
        assert bound.max() < 0.1 * 1e-3  # one perturbation left behind would show


@pytest.mark.parametrize(
    "xi, delta", [("per_matrix", 0.0), ("per_matrix", 1.0), ("per_matrix", 3.0), ("global", 1.0), ("fixed", 3.0)]
)
def test_pgap_estimator_mean(xi, delta):
    """The mean:  E[rho Z] = M + (delta - 1) a S^, plus delta (sum of the other a) S^ if matrices share a sign.

    A loss that is linear, <T, W>, has rho = <T, D> whatever eps and W; eps = 1 makes its float32 rounding negligible.
    """
    steps, model = 700, nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3, 5))
    slope = {"a": ops.draw((4, 3), 1, 1).double(), "b": ops.draw((3, 5), 2, 2).double()}
    opt = PGAP(model, lr=1e-3, eps=1.0, rank=2, window=steps, probes=64, xi=xi, delta=delta, scale="paper",
               eps_probe=1.0, seed=5)  # fmt: skip
    calls = []

    def closure():
        calls.append((model.a.double(), model.b.double()))
        return sum((slope[n] * p).sum() for n, p in zip("ab", calls[-1], strict=True))

    opt.step(closure)
    start = snapshot(model)
    del calls[:]
    for _ in range(steps - 1):
        opt.step(closure)
    basis = {name: [t.double() for t in basis] for name, basis in opt.bases.items()}
    m = {n: u.T @ slope[n] @ v for n, (u, _, v) in basis.items()}
    unit = {n: (s / s.norm()).diag() for n, (_, s, _) in basis.items()}
    aligned = {n: (unit[n] * m[n]).sum() for n in m}
    directions = {n: torch.stack([(p[i] - q[i]) / 2 for p, q in zip(calls[::2], calls[1::2], strict=True)])
                  for i, n in enumerate("ab")}  # fmt: skip
    rho = sum((slope[n] * directions[n]).sum((1, 2)) for n in "ab")
    for n in "ab":
        u, _, v = basis[n]
        samples = rho[:, None, None] * (u.T @ directions[n] @ v)
        mean, sigma = samples.mean(0), samples.std(0) / len(samples) ** 0.5
        shared = 0.0 if xi == "per_matrix" else delta * (sum(aligned.values()) - aligned[n])
        expected = m[n] + ((delta - 1) * aligned[n] + shared) * unit[n]
        assert ((mean - expected).abs() <= 5 * sigma).all()
        wrong = m[n] + (delta * aligned[n] + shared) * unit[n]  # what (delta - 1) -> delta would give
        assert ((mean - wrong).abs() > 5 * sigma).any()
        # What was applied is the same sum; losses of size 1e2 are rounded to float32.
        applied = -(snapshot(model)[n] - start[n]) / opt.param_groups[0]["lr"] / len(samples)
        assert (u.T @ applied @ v - mean).abs().max() <= 1e-3 * mean.abs().max()


# ---- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, window, forwards",
    [
        (MeZO, {"probes": 1}, 1, 2),
        (MeZO, {"probes": 3}, 1, 6),
        (PGAP, {"rank": 4, "window": 3, "probes": 1}, 3, 2 + 2 / 3),
        (PGAP, {"rank": 2, "window": 1, "probes": 3}, 1, 8),
        (PGAP, {"rank": 99, "window": 5, "probes": 2, "exclude": ["adapter"]}, 5, 2 + 4 / 5),
    ],
)
def test_cost_is_what_is_declared(method, options, window, forwards):
    model, opt = make(method, options)
    closure = Recorder(model)
    for _ in range(2 * window):
        opt.step(closure)
    assert opt.passes == pytest.approx(2 * window * opt.cost().weight_passes, rel=1e-12)
    assert len(closure.points) == pytest.approx(2 * window * forwards, rel=1e-12)
    bases = getattr(opt, "bases", {})
    assert opt.cost().state_bytes == sum(t.numel() * t.element_size() for basis in bases.values() for t in basis)
    largest = max((4 * w.tensor.numel() for w in opt.weights() if w.name in bases), default=0)
    assert opt.cost().scratch_bytes == largest


def test_time_is_accounted_once():
    model, opt = make(PGAP, SMALL_PGAP)
    opt.step(lambda: loss_of(model))
    assert all(seconds > 0 for seconds in opt.seconds.values())
    before = dict(opt.seconds)
    opt.step(lambda: loss_of(model))
    assert opt.seconds["refresh"] == before["refresh"]
    assert opt.seconds["forward"] > before["forward"] and opt.seconds["perturb"] > before["perturb"]


# ---- faults ---------------------------------------------------------------------------------------------------------


def failing(kind):
    """What a closure does at the moment it fails."""
    if isinstance(kind, float):
        return lambda: torch.tensor(kind)
    if kind == "vector":
        return lambda: torch.zeros(2)

    def fail():
        raise kind("deliberate")

    return fail


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
    opt = method(params, **options, **({"model": model} if by_name else {}))
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
    opt = MeZO(model, on_nonfinite="skip")
    start = {name: b.clone() for name, b in model.named_buffers()}
    opt.step(lambda: model(torch.full((8, 6), math.nan)).sum())
    assert opt.skipped == 1
    assert_same_bits(dict(model.named_buffers()), start)


# ---- which tensors, under which names -------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, alias=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.head.weight = nn.Parameter(self.embed.weight.data) if alias else self.embed.weight

    def forward(self, x):
        return self.head(self.embed(torch.arange(8) % 7))[:, :4]


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("method, options", METHODS)
def test_tied_weights_move_once_under_their_first_name(method, options, alias):
    model, opt = make(method, options, Tied(alias), lr=0.0)
    assert [w.name for w in opt.weights()] == ["embed.weight", "head.bias"]
    assert opt.weights()[0].id == noise.tensor_id("embed.weight")
    clean, closure = snapshot(model), Recorder(model)
    opt.step(closure)
    name = "embed.weight"
    role = Role.DENSE if method is MeZO else Role.PROBE
    z = dense_direction(clean[name].shape, 11, 0, name, role)
    plus = closure.points[0][name]
    assert ((plus - clean[name] - 1e-3 * z.value).abs() <= pass_error(plus, (1e-3, z))).all()
    if alias:
        assert all(torch.equal(point["head.weight"], point[name]) for point in closure.points)


@pytest.mark.parametrize("method, options", METHODS)
def test_frozen_parameters_are_untouched(method, options):
    model = Net()
    model.inner.requires_grad_(False)
    before = snapshot(model)
    closure = Recorder(model)
    make(method, options, model)[1].step(closure)
    for point in [*closure.points, snapshot(model)]:
        moved = {name for name in before if not torch.equal(point[name], before[name])}
        assert moved == {name for name in before if not name.startswith("inner")}


def test_frozen_parameters_are_untouched_if_given_by_name():
    model = Net()
    model.inner.requires_grad_(False)
    before = snapshot(model)
    MeZO(model.named_parameters(), lr=0.05).step(lambda: loss_of(model))
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("inner"))


@pytest.mark.parametrize("method, options", METHODS)
def test_empty_parameters_are_fine(method, options):
    model = Net()
    model.nothing, model.none = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
    (_, opt), (_, plain) = make(method, options, model), make(method, options)
    closure, same = Recorder(model), Recorder(plain.model)
    for _ in range(3):
        opt.step(closure)
        plain.step(same)
    assert closure.losses == same.losses


@pytest.mark.parametrize("method, options", METHODS)
def test_order_and_form_of_params_do_not_matter(method, options):
    runs = []
    for form in ("model", "named", "reversed", "groups"):
        model = Net()
        named = list(model.named_parameters())
        params = {"model": model, "named": named, "reversed": named[::-1],
                  "groups": [{"params": named[:3]}, {"params": named[3:]}]}[form]  # fmt: skip
        opt = method(params, lr=0.05, seed=11, **options)
        for _ in range(3):
            opt.step(lambda model=model: loss_of(model))
        runs.append(snapshot(model))
    for run in runs[1:]:
        assert_same_bits(runs[0], run)


def test_a_subset_takes_the_same_directions():
    whole, part = Net(), Net()
    subset = [(n, p) for n, p in part.named_parameters() if n.startswith("outer")]
    a, b = Recorder(whole), Recorder(part)
    MeZO(whole, seed=9).step(a)
    MeZO(subset, seed=9).step(b)
    for at_whole, at_part in zip(a.points, b.points, strict=True):
        for name, _ in subset:
            assert torch.equal(at_whole[name], at_part[name])
        assert torch.equal(at_part["inner.weight"], snapshot(Net())["inner.weight"])


def test_wrapper_prefixes_do_not_change_the_noise():
    plain, wrapped = Net(), Net()
    MeZO(plain, seed=9, lr=0.05).step(lambda: loss_of(plain))
    named = [("module._orig_mod." + n, p) for n, p in wrapped.named_parameters()]
    MeZO(named, seed=9, lr=0.05).step(lambda: loss_of(wrapped))
    assert_same_bits(snapshot(plain), snapshot(wrapped))


def test_nameless_tensors_are_named_by_index_with_a_warning():
    tensors = [torch.zeros(3, 2), torch.zeros(4)]
    with pytest.warns(UserWarning, match="parameters without names"):
        opt = MeZO(tensors, lr=0.0, eps=1e-3, seed=2)
    seen = []
    opt.step(lambda: seen.append([t.clone() for t in tensors]) or 0.0)
    for i, tensor in enumerate(seen[0]):
        z = dense_direction(tensor.shape, 2, 0, str(i)).value
        assert torch.equal(tensor, (torch.tensor(1e-3) * z.float()))


COLLIDING = ("blocks.44.expert87226.w8", "blocks.40.expert27505.w0")


def test_names_with_one_id_are_refused_and_can_be_told_apart():
    assert noise.tensor_id(COLLIDING[0]) == noise.tensor_id(COLLIDING[1])
    named = [(name, torch.zeros(4)) for name in COLLIDING]
    with pytest.raises(ValueError, match=r"(?s)^tensor_ids: .*expert87226.*expert27505.*same id 0xc95c5a2d"):
        MeZO(named)
    opt = MeZO(named, tensor_ids={COLLIDING[1]: 7})
    assert [w.id for w in opt.weights()] == [0xC95C5A2D, 7]
    with pytest.raises(ValueError, match=r"^tensor_ids\['a'\]: got -1"):
        MeZO([("a", torch.zeros(2))], tensor_ids={"a": -1})


def test_add_param_group():
    model, opt = make(MeZO, {})
    extra = nn.Parameter(torch.ones(5))
    for bad in ({"lr": -1.0}, {"eps": 0.0}, {"weight_decay": math.nan}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
            opt.add_param_group({"params": [("extra", extra)]} | bad)
        assert len(opt.param_groups) == 1 and "extra" not in {w.name for w in opt.weights()}
    with pytest.raises(ValueError, match=r"^tensor_ids: "):
        opt.add_param_group({"params": [("gain", extra)]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("extra", extra)], "eps": 0.5})
    seen = []
    opt.step(lambda: seen.append(extra.clone()) or loss_of(model))
    z = dense_direction(extra.shape, 11, 0, "extra")
    assert ((seen[0] - 1 - 0.5 * z.value).abs() <= pass_error(seen[0].double(), (0.5, z))).all()


def test_pgap_takes_a_matrix_added_within_a_window():
    model, opt = make(PGAP, SMALL_PGAP, window=100)
    opt.step(lambda: loss_of(model))
    opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(4, 4)))]})
    opt.step(lambda: loss_of(model))


# ---- 16-bit weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probes", [1, 2])
def test_16_bit_mezo_is_its_passes_with_a_stochastic_landing(dtype, probes):
    with pytest.warns(UserWarning, match="16-bit weights") as caught:
        model, opt = make(MeZO, {"probes": probes}, Net().to(dtype), weight_decay=0.1)
    assert len([w for w in caught if "16-bit" in str(w.message)]) == 1
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = [noise.tensor_id(n) for n in expected]
    decay = [0.05 * 0.1 if p.dim() > 1 else 0.0 for p in expected.values()]
    for step in range(2):
        closure = Recorder(model)
        opt.step(closure)
        keys = [noise.derive(11, step, Role.DENSE, j) for j in range(probes)]
        weights = list(expected.values())
        rho = [(p - m) / 2e-3 for p, m in zip(closure.losses[::2], closure.losses[1::2], strict=True)]
        for j, key in enumerate(keys):
            leave = [(keys[j - 1], 1e-3)] if j else []
            ops.dense_perturb_(weights, [*leave, (key, 1e-3)], tensor_ids=ids)
            ops.dense_perturb_(weights, [(key, -2e-3)], tensor_ids=ids)
        draws = [(key, -0.05 / probes * r) for key, r in zip(keys, rho, strict=True)]
        last = [draws[-1][1] + (1 - d) * 1e-3 for d in decay]
        ops.dense_perturb_(weights, [*draws[:-1], (keys[-1], last)], tensor_ids=ids, decay=decay, rounding="stochastic",
                           rounding_key=noise.derive(11, step, Role.ROUNDING, 2 * probes))  # fmt: skip
        assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, expected)


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("method, options", [(MeZO, {}), (PGAP, {"rank": 4, "window": 9, "probes": 1})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_steps_below_half_an_ulp_arrive_on_average(method, options, dtype):
    """The slope of the update along its direction is the step's, within 5 sigma of its own scatter."""
    model = nn.Module()
    model.w = nn.Parameter((1 + ops.draw((128, 128), 3, 3).abs() / 8).to(dtype))  # above 1: an ulp is eps of dtype
    half_ulp = torch.finfo(dtype).eps / 2
    eps, size = 4 * half_ulp, half_ulp / 4
    opt = method(model, lr=1.0, eps=eps, seed=6, **options)
    if method is PGAP:
        losses = iter([1.0, 0.0, 0.0, 0.0])  # refresh; no update
        opt.step(lambda: next(losses))
    clean = model.w.detach().double().clone()
    losses = iter([2 * eps * size, 0.0])
    opt.step(lambda: next(losses))
    moved = (model.w.detach().double() - clean).flatten()
    direction = (
        dense_direction((128, 128), 6, 0, "w").value
        if method is MeZO
        else subspace_direction(opt, 1, "w", (128, 128), 2.0).value
    ).flatten()
    slope = (moved @ direction) / (direction @ direction)
    scatter = (moved - slope * direction).std() / direction.norm()
    assert abs(slope + size) <= 5 * scatter
    assert abs(slope) > 5 * scatter


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_loss_warns_once(dtype):
    model, opt = make(MeZO, {})
    with pytest.warns(UserWarning, match=r"^closure: returned a torch.*16 loss"):
        opt.step(lambda: loss_of(model).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: loss_of(model).to(dtype))


@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]), 1])
def test_a_loss_may_be_a_number_or_any_tensor_of_one(loss):
    _, opt = make(MeZO, {})
    assert opt.step(lambda: loss) == float(loss)


def test_a_float64_loss_keeps_its_digits():
    model, opt = make(MeZO, {})
    before = snapshot(model)
    calls = iter([1e8 + 1e-3, 1e8])  # in float32 their difference is 0 or 8
    opt.step(lambda: torch.tensor(next(calls), dtype=torch.float64))
    step = snapshot(model)["inner.weight"] - before["inner.weight"]
    z = dense_direction(step.shape, 11, 0, "inner.weight").value
    torch.testing.assert_close(step, -0.05 * 0.5 * z, rtol=1e-3, atol=1e-6)


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
    forward, backward = MeZO(model), MeZO(list(model.named_parameters())[::-1])
    names = [w.name for w in backward.weights()]
    try:
        backward.load_state_dict(forward.state_dict())
    except ValueError as error:
        assert str(error).startswith("state_dict: ")
    assert [w.name for w in backward.weights()] == names


def test_a_scheduler_moves_both_learning_rates():
    model = Net()
    opt = WatchedPGAP(model, lr=0.05, lr_dense=0.2, rank=3, window=1, probes=2, seed=4)
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
            method(Net(), **{name: value})


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**64, ValueError), (1.5, TypeError), (None, TypeError)])
def test_bad_seeds(seed, error):
    with pytest.raises(error, match=r"^seed: got .*; accepted: an integer in \[0, 2\*\*64\)"):
        MeZO(Net(), seed=seed)


def test_bad_exclude():
    with pytest.raises(TypeError, match=r"^exclude: got the string"):
        PGAP(Net(), exclude="*embed*")


def test_bad_closure():
    _, opt = make(MeZO, {})
    with pytest.raises(TypeError, match=r"^closure: got None; accepted: a function"):
        opt.step(None)
    assert opt.steps == 0


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match=r"^params: got no trainable parameter"):
        MeZO(nn.ReLU())
    with pytest.raises(ValueError, match=r"^params: got no trainable parameter"):
        PGAP(Net().requires_grad_(False))


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_other_dtypes_are_refused_at_once(dtype):
    with pytest.raises((TypeError, ValueError), match=r"(?s)got.*accepted: torch\.float32"):
        MeZO([("w", torch.zeros(3, dtype=dtype))])


# ---- backends and learning ------------------------------------------------------------------------------------------


needs_cpu = pytest.mark.skipif(
    cpu.refusal("dense_perturb_", torch.device("cpu"), torch.float32) is not None, reason="no C++ extension"
)


@needs_cpu
@pytest.mark.parametrize("probes", [1, 3])
def test_backends_give_mezo_the_same_bits(probes, monkeypatch):
    runs = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("PGAP_BACKEND", backend)
        model, opt = make(MeZO, {"probes": probes}, weight_decay=0.1)
        for _ in range(3):
            opt.step(lambda model=model: loss_of(model))
        runs.append(snapshot(model))
    assert_same_bits(*runs)


@needs_cpu
def test_backends_give_pgap_the_same_basis_and_directions(monkeypatch):
    """Noise and bases to the bit; the products U Z V^T may be summed in another order, within the passes' rounding."""
    runs = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("PGAP_BACKEND", backend)
        model, opt = make(PGAP, SMALL_PGAP)
        closure = Recorder(model)
        opt.step(closure)
        runs.append((closure.points, opt))
    (points, opt), (others, other) = runs
    assert opt.bases.keys() == other.bases.keys()
    for name, basis in opt.bases.items():
        assert all(torch.equal(a, b) for a, b in zip(basis, other.bases[name], strict=True))
        d = subspace_direction(opt, 0, name, basis.left.shape[:1] + basis.right.shape[:1], 2.0)
        plus, minus = (pass_error(points[i][name], (a * 1e-3, d)) for i, a in ((-2, 1), (-1, 2)))
        assert ((points[-2][name] - others[-2][name]).abs() <= 2 * plus).all()
        assert ((points[-1][name] - others[-1][name]).abs() <= 2 * (plus + minus)).all()


@pytest.mark.parametrize(
    "method, options", [(MeZO, {"lr": 0.02}), (PGAP, {"lr": 0.02, "rank": 4, "window": 50, "probes": 4})]
)
def test_learning(method, options):
    """Both halve the loss of a small classification in 400 steps (the start is near log 4)."""
    model, opt = make(method, options, seed=1)
    start = loss_of(model).item()
    for _ in range(400):
        opt.step(lambda: loss_of(model))
    assert loss_of(model).item() < start / 2


# ---- found in review ------------------------------------------------------------------------------------------------


def test_a_float_loss_keeps_its_digits():
    model = nn.Linear(3, 2)
    before = snapshot(model)
    losses = iter([1 + 3e-8, 1.0])  # one and the same in float32
    MeZO(model, lr=1.0).step(lambda: next(losses))
    moved = max((after - before[name]).abs().max().item() for name, after in snapshot(model).items())
    assert moved > 3e-8 / 2e-3 / 2  # rho z, with some |z| above a half


def test_a_state_under_another_tensor_id_is_refused():
    model = nn.Linear(3, 2)
    state = MeZO(model, tensor_ids={"weight": 5}).state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: 'weight' had the tensor id 5"):
        MeZO(model).load_state_dict(state)
    MeZO(model, tensor_ids={"weight": 5}).load_state_dict(state)


def test_an_override_for_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"^tensor_ids: got 'wieght'"):
        MeZO(nn.Linear(3, 2), tensor_ids={"wieght": 5})


def test_an_update_that_overflows_with_its_scale_is_skipped():
    model = nn.Linear(64, 64, bias=False)
    before = snapshot(model)
    opt = PGAP(model, lr=2e35, rank=1, window=10, probes=1, on_nonfinite="skip")
    opt.step(lambda: (model.weight * torch.arange(64.0)).sum())
    assert opt.skipped == 1 and opt.steps == 1
    for name, after in snapshot(model).items():
        assert ((after - before[name]).abs() <= 1e-5).all()
