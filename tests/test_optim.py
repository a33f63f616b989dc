"""MeZO and P-GAP: what was evaluated is what is applied, at the declared cost, and it learns."""

from __future__ import annotations

import math

import pytest
import torch
from optim_contract import (
    METHODS,
    SMALL_PGAP,
    UNIT,
    Net,
    Recorder,
    WatchedPGAP,
    aligned_core,
    assert_same_bits,
    check_applied,
    dense_direction,
    is_dense,
    loss_of,
    make,
    pass_error,
    restored_bound,
    snapshot,
    subspace_direction,
    two_groups,
)
from torch import nn

from pgap_kernels import cpu, noise, ops
from pgap_kernels.noise import Role
from pgap_kernels.optim import PGAP, MeZO
from pgap_kernels.subspace import gradient_basis

# ---- evaluated = applied --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("groups", [False, True])
def test_mezo_applies_what_it_evaluated(probes, weight_decay, groups):
    model = Net()
    params = two_groups(model) if groups else model
    opt = MeZO(params, lr=0.05, eps=1e-3, weight_decay=weight_decay, probes=probes, seed=3, mode="inplace")
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
    {"eps_probe": 1e-2, "probes": 1, "window": 2, "seed": 5},
]


@pytest.mark.parametrize("options", PGAP_CASES, ids=lambda o: "-".join(map(str, o)) or "default")
@pytest.mark.parametrize("groups", [False, True])
def test_pgap_applies_what_it_evaluated(options, groups):
    model = Net()
    options = {"lr": 0.05, "eps": 1e-3, "rank": 3, "window": 3, "probes": 2, "delta": 2.0} | options
    params = two_groups(model, options["lr"], options["eps"]) if groups else model
    seed = options.setdefault("seed", 4)
    opt = WatchedPGAP(params, **options, mode="inplace")
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
                direction = dense_direction(tensor.shape, seed, step, name)
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
               eps_probe=1.0, seed=5, mode="inplace")  # fmt: skip
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
