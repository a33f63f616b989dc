"""A small model, a closure that records what it is evaluated at, and what the contract says a step does, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgap_kernels import draw, noise
from pgap_kernels.noise import Role
from pgap_kernels.optim import PGAP, MeZO

UNIT = torch.finfo(torch.float32).eps / 2  # a rounding to nearest in float32 moves a value by at most UNIT * |value|
SECOND_ORDER = 1.001  # products of two roundings, and error-free quantities replaced by computed ones
INPUTS = draw((8, 6), 1, 0)
LABELS = torch.arange(8) % 4


class Net(nn.Module):
    """Matrices of different rank limits (one LoRA-sized), vectors, a 3-D tensor and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.filter = nn.Parameter(torch.zeros(3, 2, 2))
        self.adapter = nn.Parameter(torch.zeros(8, 64))
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.outer = nn.Linear(9, 4)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name != "gain":
                    p.copy_(0.3 * draw(p.shape, 2, noise.tensor_id(name)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.inner(x))) * self.gain
        return self.outer(hidden) + self.adapter[:, :4] - self.adapter[:, 60:] + self.filter.sum()


def loss_of(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(INPUTS.to(dtype)).float(), LABELS)


def snapshot(source) -> dict[str, Tensor]:
    """The weights in float64."""
    return {name: p.detach().double().clone() for name, p in source.named_parameters()}


class Recorder:
    """A closure that keeps the weights and losses of its calls; ``fail_at``: what call number i does instead."""

    def __init__(self, model: nn.Module, loss=loss_of, fail_at=None) -> None:
        self.model, self.loss, self.fail_at = model, loss, fail_at or {}
        self.points: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        call = len(self.points)
        self.points.append(snapshot(self.model))
        loss = self.loss(self.model)
        self.losses.append(loss.item())
        return self.fail_at[call]() if call in self.fail_at else loss


class WatchedPGAP(PGAP):
    """Keeps the weights as a refresh left them: the clean weights of the step."""

    clean = None

    def refresh(self, closure) -> None:
        super().refresh(closure)
        self.clean = {w.name: w.tensor.detach().double().clone() for w in self.weights()}


@dataclass
class Direction:
    """What is added to a weight per unit of coefficient.

    ``size`` bounds the terms that the sum is made of, elementwise; a kernel rounds each at most ``roundings`` times.
    """

    value: Tensor
    size: Tensor
    roundings: int


def dense_direction(shape, seed: int, step: int, name: str, role: Role = Role.DENSE, probe: int = 0) -> Direction:
    """z, bit for bit; coefficient and product are rounded."""
    z = draw(shape, noise.derive(seed, step, role, probe), noise.tensor_id(name)).double()
    return Direction(z, z.abs(), 2)


def aligned_core(s: Tensor, seed: int, step: int, name: str, xi: str, delta: float) -> tuple[Tensor, float]:
    """Z and xi, from P-GAP's formulas (2510.18228) with the contract's draws."""
    tid, r = noise.tensor_id(name), len(s)
    z = draw((r, r), noise.derive(seed, step, Role.CORE), tid).double()
    sign = 1.0
    if xi != "fixed":
        sign_id = tid if xi == "per_matrix" else 0
        sign = draw(1, noise.derive(seed, step, Role.SIGN), sign_id, distribution="rademacher").item()
    alpha = (s @ z.diagonal() - sign * math.sqrt(delta) * s.norm()) / s.norm() ** 2
    return z - alpha * s.diag(), sign


def subspace_direction(opt: PGAP, step: int, name: str, shape, delta: float) -> Direction:
    """scale * U Z V^T. Roundings: r terms in each of two products, Z itself, scale times coefficient, the product."""
    u, s, v = (t.double() for t in opt.bases[name])
    z, _ = aligned_core(s, opt.seed, step, name, opt.xi, delta)
    scale = math.sqrt(math.prod(shape)) / len(s) if opt.scale == "subzero" else 1.0
    value, size = scale * u @ z @ v.T, scale * u.abs() @ z.abs() @ v.abs().T
    return Direction(value, size, 2 * len(s) + 3)


def is_dense(opt, name: str, tensor: Tensor) -> bool:
    if not isinstance(opt, PGAP):
        return True
    return tensor.dim() != 2 or any(fnmatchcase(name, pattern) for pattern in opt.exclude)


def pass_error(after: Tensor, *terms: tuple[float, Direction], decayed: Tensor | float = 0.0) -> Tensor:
    """Bound of what one fused pass  W <- round(W + round(sum_j a_j D_j - d W))  rounds away, elementwise.

    The final rounding moves W by at most UNIT * |after|; every term of the increment is rounded ``roundings`` times
    within its direction and once more per term that follows in the fma chain.
    """
    moved = sum(abs(a) * (d.roundings + len(terms) + 1) * d.size for a, d in terms)
    return SECOND_ORDER * UNIT * (after.abs() + moved + (len(terms) + 2) * decayed)


def restored_bound(weights: Tensor, passes: int, eps: float, largest: float = 40.0, roundings: int = 13) -> Tensor:
    """Bound of the drift of clean weights over so many passes of at most 2 eps * direction each, for any method.

    No direction in these tests has an element above ``largest`` (|z| < 5.7682 for dense noise; asserted for subspaces
    by the tests of the direction).
    """
    return SECOND_ORDER * UNIT * passes * (weights.abs() + eps * largest * (1 + 2 * 2 * (roundings + 3)))


SMALL_PGAP = {"rank": 2, "window": 2, "probes": 2}
METHODS = [pytest.param(MeZO, {"probes": 2}, id="mezo"), pytest.param(PGAP, SMALL_PGAP, id="pgap")]


def make(method, options, model=None, **more):
    model = Net() if model is None else model
    return model, method(model, **({"lr": 0.05, "eps": 1e-3, "seed": 11, "mode": "inplace"} | options | more))


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


def failing(kind):
    """What a closure does at the moment it fails."""
    if isinstance(kind, float):
        return lambda: torch.tensor(kind)
    if kind == "vector":
        return lambda: torch.zeros(2)

    def fail():
        raise kind("deliberate")

    return fail
