"""Several directions of several groups of examples: what their losses say of the gradient, and how far to go."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.bounds import UNIT
from support.contract import build
from support.methods import ROWS
from torch import Tensor, nn

from pgap_kernels import draw, noise
from pgap_kernels.noise import Role
from pgap_kernels.optim import MeZO
from pgap_kernels.optim.signal import Signal, SignalRule, signal_of

# ---- an estimate ----------------------------------------------------------------------------------------------------
# Losses are linear, <x_i, W> + b_i, and W = 0, so that with eps = 1 a point is a draw and every loss is exact.

X, B = draw((8, 6), 1, 1).double(), draw(8, 2, 2).double()
GROUPS, RATE = 2, 0.5


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.double().flatten()


def optimizer_and_closure(members: int, means: bool = False, **options):
    model = Slope()
    optimizer = MeZO(model, lr=RATE, eps=1.0, seed=13, mode="scratch", members=members, **options)
    slices = members * options.get("groups", 1)

    def closure() -> Tensor:
        losses = model(torch.cat([X] * members)) + torch.cat([B] * members)
        return losses.view(slices, -1).mean(1) if means else losses

    return model, optimizer, closure


def drawn(number: int) -> Tensor:
    """z of the first step."""
    return draw((2, 3), noise.derive(13, 0, Role.DENSE, number), noise.tensor_id("w")).double()


def rows_and_update(n: int, baseline: str) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (copies, examples), what is added to W, and the sum of its terms' absolute values."""
    z = [[drawn(j * GROUPS + g) for g in range(GROUPS)] for j in range(n)]

    def losses(points: list[Tensor]) -> Tensor:
        own = zip(points, X.chunk(GROUPS), B.chunk(GROUPS), strict=True)
        return torch.cat([x @ point.flatten() + b for point, x, b in own])

    plus = [losses(own) for own in z]
    minus = [losses([-d for d in own]) for own in z]
    if baseline == "antithetic":
        rows = [row for pair in zip(plus, minus, strict=True) for row in pair]
        slopes = [(p - m) / 2 for p, m in zip(plus, minus, strict=True)]
    elif baseline == "clean":
        rows, slopes = [*plus, B], [p - B for p in plus]
    else:
        rows, total = plus, sum(plus)
        slopes = [p - (total - p) / (n - 1) for p in plus]
    terms = [
        -RATE * slope.mean() / (n * GROUPS) * d
        for own, row in zip(z, slopes, strict=True)
        for d, slope in zip(own, row.chunk(GROUPS), strict=True)
    ]
    return torch.stack(rows), sum(terms), sum(term.abs() for term in terms)


@pytest.mark.parametrize("n, baseline, members", [
    (2, "antithetic", 1), (2, "antithetic", 2), (2, "antithetic", 4), (3, "loo", 1), (3, "loo", 3), (2, "clean", 1),
    (2, "clean", 3),
])  # fmt: skip
def test_a_step_of_groups(n, baseline, members):
    """However many forwards the points take, and whether losses come by rows or as the groups' means."""
    rows, update, size = rows_and_update(n, baseline)
    for means in (False, True):
        model, optimizer, closure = optimizer_and_closure(members, means, groups=GROUPS, probes=n, baseline=baseline)
        tried = len(rows) - (baseline == "clean")
        assert optimizer.step(closure) == pytest.approx(rows[:tried].mean().item(), rel=1e-12)
        assert ((model.w.detach() - update).abs() <= (n * GROUPS + 3) * UNIT * size).all()
        if means:  # each passes for the loss of one row
            assert optimizer.last.signal.squared_norm is None and optimizer.last.signal.second_moment is not None
        else:
            assert optimizer.last.signal[:3] == pytest.approx(signal_of(rows, GROUPS, baseline, 1.0)[:3], rel=1e-12)


@pytest.mark.parametrize("id", ["mezo", "pgap", "lozo", "eggroll"])
def test_directions_of_a_step_differ_on_every_weight(id):
    """So do those of its number in the next step, or, where noise is used again, after that."""
    row = next(row for row in ROWS if row.id == id)
    model, optimizer, closure = build(row, "inplace")
    optimizer.step(closure)
    later = row.options.get("noise_reuse", 1)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for step, number in ((0, 0), (0, 1), (0, 2), (later, 0)):
        for part in optimizer.direction(step, number):
            zeros = [torch.zeros_like(t) for t in part.tensors]
            part.select(range(len(zeros)), zeros).apply(zeros)
            for w, moved in zip(part.weights, zeros, strict=True):
                seen[w.name].append(moved)
    for moves in seen.values():
        assert len(moves) == 4 and not any(torch.equal(a, b) for a, b in itertools.combinations(moves, 2))


# ---- what losses say of the gradient --------------------------------------------------------------------------------

G = torch.tensor([[1.0, 2, -1], [0, 1, 3], [-2, 1, 1], [1, 1, 0]], dtype=torch.float64)  # of the examples
SIGNS = [torch.tensor(s, dtype=torch.float64) for s in itertools.product((1.0, -1.0), repeat=3)]
EPS = 0.5


@pytest.mark.parametrize("baseline", ["antithetic", "loo", "clean"])
@pytest.mark.parametrize("groups", [1, 2])
def test_signal_is_unbiased(groups, baseline):
    """Over all pairs of vectors of signs, whose covariance is the identity: to rounding."""
    found, base = [], 3 * torch.arange(4).double()
    for a, b in itertools.product(SIGNS, repeat=2):
        tried = torch.stack([base + EPS * G @ z for z in ((a, -a, b, -b) if baseline == "antithetic" else (a, b))])
        clean = 7 * torch.arange(4).double() ** 2  # of a curved loss: covariances do not need it
        found.append(signal_of(torch.cat([tried, clean[None]]) if baseline == "clean" else tried,
                               groups, baseline, EPS))  # fmt: skip
    squared_norm, trace, second_moment = (sum(s[i] for s in found) / len(found) for i in range(3))
    products = torch.stack([own @ own.T for own in G.chunk(groups)])
    size = 4 // groups
    apart = (products.sum() - products.diagonal(dim1=1, dim2=2).sum()) / (groups * size * (size - 1))
    assert second_moment == pytest.approx(G.square().sum(1).mean().item(), rel=1e-12)
    assert squared_norm == pytest.approx(apart.item(), rel=1e-12)
    assert trace == pytest.approx(second_moment - squared_norm, rel=1e-12)


def test_signal_of_points_that_do_not_tell():
    rows = EPS * torch.stack([G @ SIGNS[0], -G @ SIGNS[0]])
    alone = signal_of(rows, 4, "antithetic", EPS)
    assert alone.squared_norm is None and alone.second_moment is not None
    assert signal_of(rows, 1, "clean", EPS) == Signal()


# ---- the step size --------------------------------------------------------------------------------------------------


def test_signal_rule_by_hand():
    """Means of the first two steps, then moving ones; the ratio to the first, from a tenth to 1."""
    rule, factors = SignalRule(window=2), []
    for squared_norm in (6.0, 2.0, 1.0, 8.5, -90.0):
        rule.note(Signal(squared_norm, 8.0 - squared_norm, 8.0))
        factors.append(rule.factor)
        rule.note(Signal())  # tells nothing
    assert factors == [1.0, 1.0, 2.5 / 4, 1.0, 0.1]
    rule.floor = 0.25
    assert rule.factor == 0.25
    late = SignalRule(window=2)
    for squared_norm in (-1.0, -3.0, 10.0, -90.0):
        late.note(Signal(squared_norm, 8.0 - squared_norm, 8.0))
        assert late.factor == (1.0 if squared_norm > -90 else 0.1), "noise alone at first, which is no measure"
    again = SignalRule()
    again.load(rule.state())
    assert vars(again) == vars(rule)


def test_the_step_size_follows_the_signal():
    weights = []
    for lr_rule in (None, "signal"):
        model, optimizer, closure = optimizer_and_closure(2, lr_rule=lr_rule)
        optimizer.signal_rule.load({"window": 1, "steps": 1, "first": 1.0})
        optimizer.signal_rule.note = lambda signal: None
        optimizer.signal_rule.squared_norm, optimizer.signal_rule.second_moment = 0.5, 2.0
        optimizer.param_groups[0]["weight_decay"] = 0.1
        assert optimizer.decay() == [0.1 * rate for rate in optimizer.rates()]
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step(closure)
        weights.append(model.w.detach())
    assert weights[0].any() and torch.equal(weights[1], weights[0] / 4)


def test_a_signal_is_noted_and_saved():
    _, optimizer, closure = optimizer_and_closure(2, lr_rule="signal")
    assert optimizer.last.signal == Signal()
    assert optimizer.cost().forwards == 1  # although a dry run's losses tell nothing
    optimizer.step(closure)
    rule = optimizer.signal_rule
    assert (rule.steps, rule.squared_norm, rule.second_moment) == (
        1,
        optimizer.last.signal.squared_norm,
        optimizer.last.signal[2],
    )
    _, other, closure = optimizer_and_closure(2, lr_rule="signal")
    other.load_state_dict(optimizer.state_dict())
    assert vars(other.signal_rule) == vars(rule)
