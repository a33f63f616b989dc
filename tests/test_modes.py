"""Evaluated = applied in every mode: losses and updates against float64, exact weights at lr 0, declared costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from bounds import Bounded
from helpers import bits
from optim_contract import SECOND_ORDER, UNIT, Direction, dense_direction, is_dense, subspace_direction
from torch import Tensor, nn

from pgap_kernels import draw, noise
from pgap_kernels.noise import Role
from pgap_kernels.optim import PGAP, MeZO
from pgap_kernels.perturbation.arena import room
from pgap_kernels.perturbation.residual import joined
from pgap_kernels.subspace import gradient_basis

IDS = torch.arange(24).view(8, 3) % 11
TARGET = draw((8, 3, 11), 9, 9)
MODES_OF = {MeZO: ("inplace", "two_pass", "scratch", "scratch-paired"),
            PGAP: ("inplace", "two_pass", "scratch", "folded", "scratch-paired", "folded-paired")}  # fmt: skip
EXACT = [(MeZO, "scratch"), (MeZO, "scratch-paired"), (PGAP, "scratch"), (PGAP, "folded"), (PGAP, "folded-paired")]


class Words(nn.Module):
    """An embedding that may be the head too, linear layers with and without bias, a norm."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9, bias=False)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 6)
        self.head = nn.Linear(6, 11)
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(0.5 * draw(p.shape, 2, noise.tensor_id(name)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


class Losses:
    """A closure that keeps the losses of its calls; of a stacked batch one loss for each half."""

    def __init__(self, model: nn.Module, paired: bool = False) -> None:
        self.model, self.halves, self.seen, self.calls = model, 2 if paired else 1, [], 0

    def __call__(self) -> Tensor:
        self.calls += 1
        logits = self.model(torch.cat([IDS] * self.halves)).float()
        loss = (logits.view(self.halves, -1) * TARGET.flatten()).mean(1)
        self.seen += loss.tolist()
        return loss


def options_of(mode: str) -> dict:
    """Constructor arguments of a mode of ``MODES_OF``."""
    if mode == "two_pass":
        return {"mode": "inplace", "two_pass": True}
    return {"mode": mode.removesuffix("-paired"), "paired": mode.endswith("-paired")}


def build(method, mode, dtype=torch.float32, tied=True, params=lambda model: model, **options):
    model = Words(tied).to(dtype)
    base = {"lr": 0.05, "eps": 0.02, "seed": 13} | ({"rank": 3, "window": 3, "probes": 2} if method is PGAP else {})
    opt = method(params(model), **(base | options | options_of(mode)), **({"model": model} if params else {}))
    return model, opt, Losses(model, mode.endswith("paired"))


# ---- the float64 reference -------------------------------------------------------------------------------------------


@dataclass
class Value:
    """A weight in float64, a bound on how far a mode's own is off, and the sum of its terms' absolute values."""

    value: Tensor
    error: Tensor
    size: Tensor

    def plus(self, amount: float, d: Direction, unit: float) -> Value:
        """W + a D as a forward sees it: D's own roundings, the sum's, and that of the buffer's dtype."""
        value, size = self.value + amount * d.value, self.size + abs(amount) * d.size
        arithmetic = UNIT * ((d.roundings + 2) * abs(amount) * d.size + 2 * size) + unit * size
        return Value(value, self.error + SECOND_ORDER * arithmetic, size)


def linear(x: Bounded, w: Value, bias: Value | None, rank: int) -> Bounded:
    """Sums of n products, or of n, r and r on the way through U Z V^T, the parts' sum, s and the bias."""
    roundings = w.value.shape[1] + 2 * rank + 10
    reach = (x.value.abs() + x.error) @ w.size.T + (0 if bias is None else bias.size)
    value = x.value @ w.value.T + (0 if bias is None else bias.value)
    error = x.error @ (w.value.abs() + w.error).T + x.value.abs() @ w.error.T + (0 if bias is None else bias.error)
    return Bounded(value, error + SECOND_ORDER * roundings * UNIT * reach)


def layer_norm(x: Bounded, scale: Value, shift: Value, eps: float = 1e-5) -> Bounded:
    """Mean and variance by any stable algorithm (n kappa u, Chan, Golub, LeVeque 1983), then a sum of two products."""
    n = x.value.shape[-1]
    mean = x.value.mean(-1, keepdim=True)
    mean_error = x.error.mean(-1, keepdim=True) + n * UNIT * x.value.abs().mean(-1, keepdim=True)
    off = x.value - mean
    moved = x.error + mean_error
    variance = off.square().mean(-1, keepdim=True)
    variance_error = (2 * off.abs() * moved + moved.square()).mean(-1, keepdim=True)
    variance_error += 4 * n * UNIT * x.value.square().mean(-1, keepdim=True)
    root = (variance + eps).rsqrt()
    root_error = root * (0.5 * variance_error / (variance + eps - variance_error) + 4 * UNIT)
    unit = off * root
    unit_error = moved * root + (off.abs() + moved) * root_error + 4 * UNIT * root * (x.value.abs() + mean.abs())
    error = unit_error * (scale.value.abs() + scale.error) + unit.abs() * scale.error + shift.error
    return Bounded(unit * scale.value + shift.value, error + 4 * UNIT * (unit.abs() * scale.size + shift.size))


def loss_at(weights: dict[str, Value], rank: int, dtype: torch.dtype) -> tuple[float, float]:
    """The loss and a bound on its error; a 16-bit layer rounds its output, and once more where it is folded."""

    def rounded(x: Bounded) -> Bounded:
        return x.stored(dtype).stored(dtype)

    embed, head = weights["embed.weight"], weights.get("head.weight", weights["embed.weight"])
    x = rounded(Bounded(embed.value[IDS], embed.error[IDS] + (2 * rank + 10) * UNIT * embed.size[IDS]))
    x = rounded(linear(x, weights["up.weight"], None, rank))
    x = rounded(layer_norm(x, weights["norm.weight"], weights["norm.bias"]))
    x = rounded(linear(x, weights["down.weight"], weights["down.bias"], rank))
    x = rounded(linear(x, head, weights["head.bias"], rank))
    terms = (x.value * TARGET).abs()
    error = (x.error * TARGET.abs()).mean() + SECOND_ORDER * (terms.numel() + 2) * UNIT * terms.mean()
    return (x.value * TARGET).mean().item(), error.item()


class Reference:
    """What the contract says a method evaluates and applies, in float64, whatever the mode."""

    def __init__(self, model, opt, lr=0.05, eps=0.02, weight_decay=0.0, groups=False, **options) -> None:
        self.opt, self.lr, self.eps, self.decay, self.groups = opt, lr, eps, weight_decay, groups
        self.options = {"rank": 3, "window": 3, "probes": 2, "delta": 2.0} | options
        self.dtype = model.up.weight.dtype
        self.unit = 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps / 2
        self.rank = 0 if isinstance(opt, MeZO) else min(self.options["rank"], 6)  # the short side of most matrices is 6
        self.bound = self.signal = 0.0
        exact = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.weights = {name: Value(w, torch.zeros_like(w), w.abs()) for name, w in exact.items()}

    def rates(self, name: str) -> tuple[float, float, float, float]:
        """lr, eps, decay and the radius of a refresh's probes."""
        share = 1 if not self.groups or name.startswith("up") else 2
        lr, eps = self.lr / share, self.eps * share
        decay = lr * self.decay if self.weights[name].value.dim() > 1 else 0.0
        paper = self.options.get("scale") == "paper"
        probe = self.options.get("eps_probe", 1e-3 if paper else eps)
        if is_dense(self.opt, name, self.weights[name].value):
            eps = self.options.get("eps_dense", eps)
            lr = self.options.get("lr_dense", self.lr) / share
        return lr, eps, decay, probe

    def directions(self, step: int, probe: int) -> dict[str, Direction]:
        found = {}
        for name, w in self.weights.items():
            if is_dense(self.opt, name, w.value):
                found[name] = dense_direction(w.value.shape, 13, step, name, probe=probe)
            else:
                steps = self.options.get("delta_steps")
                delta = self.options["delta"] * (1 if steps is None else max(0.0, 1 - step / steps))
                found[name] = subspace_direction(self.opt, step, name, w.value.shape, delta)
        return found

    def check_pair(self, seen: tuple[float, float], directions: dict[str, Direction], radius) -> float:
        """Both losses are those at W +- eps D; their difference as the optimizer saw it."""
        at = []
        for sign, loss in zip((1, -1), seen, strict=True):
            point = {n: w.plus(sign * radius(n), directions[n], self.unit) for n, w in self.weights.items()}
            value, error = loss_at(point, self.rank, self.dtype)
            assert self.unit or abs(loss - value) <= error  # 16-bit layers are checked one by one
            self.bound += error
            at.append(value)
        self.signal += abs(at[0] - at[1])
        return seen[0] - seen[1]

    def step(self, number: int, seen: list[float]) -> None:
        """Check a step's losses and move on by its update."""
        pairs = list(zip(seen[::2], seen[1::2], strict=True))
        if isinstance(self.opt, PGAP):
            if number % self.options["window"] == 0:
                self.check_refresh(number, [pairs.pop(0) for _ in range(self.options["probes"])])
            assert len(pairs) == 1
        directions = [self.directions(number, probe) for probe in range(len(pairs))]
        differences = [
            self.check_pair(pair, d, lambda n: self.rates(n)[1]) for pair, d in zip(pairs, directions, strict=True)
        ]
        for name in self.weights:
            lr, eps, decay, _ = self.rates(name)
            steps = [(-lr / len(pairs) * difference / (2 * eps)) for difference in differences]
            self.move(name, [(a, d[name]) for a, d in zip(steps, directions, strict=True)], decay, eps)

    def move(self, name: str, terms: list[tuple[float, Direction]], decay: float, eps: float) -> None:
        """The update; its error is that of the most passes which a mode makes, 2 a probe and 2.

        A pass rounds the weight once, and each of its terms (at most all of the step's, one that is left and one that
        is entered) ``roundings`` times and once per term. Cores are rounded as often, and their window's once more in
        the product of the merge.
        """
        w = self.weights[name]
        reach = sum((abs(a) + 4 * eps) * d.size for a, d in terms)
        roundings = terms[0][1].roundings + len(terms) + 3
        size = w.size + sum(abs(a) * d.size for a, d in terms)
        passes = 2 * len(terms) + 2
        error = w.error + SECOND_ORDER * UNIT * (passes * (size + roundings * reach) + roundings * (size - w.size))
        value = (1 - decay) * w.value + sum(a * d.value for a, d in terms)
        self.weights[name] = Value(value, error + 2 * self.rank * UNIT * (size - w.size), size)

    def check_refresh(self, number: int, pairs: list[tuple[float, float]]) -> None:
        """Losses at W +- eps_probe Q_j, and the bases that come of them, bit for bit."""
        differences = []
        for j, pair in enumerate(pairs):
            q = {n: dense_direction(w.value.shape, 13, number, n, Role.PROBE, j) for n, w in self.weights.items()}
            differences.append(self.check_pair(pair, q, lambda n: self.rates(n)[3]))
            for name, w in self.weights.items():
                passes = 2 * (w.size + 8 * self.rates(name)[3] * q[name].size)  # in place the weights go there and back
                w.error += SECOND_ORDER * UNIT * passes
        for name, basis in self.opt.bases.items():
            norm = 2 * self.rates(name)[3] * len(pairs)
            keys = [noise.derive(13, number, Role.PROBE, j) for j in range(len(pairs))]
            shape = self.weights[name].value.shape
            again = gradient_basis(
                shape,
                [(key, d / norm) for key, d in zip(keys, differences, strict=True)],
                min(self.options["rank"], *shape),
                tensor_id=noise.tensor_id(name),
                range_key=noise.derive(13, number, Role.RANGE_FINDER),
                scratch=torch.empty(shape.numel()),
            )
            assert all(torch.equal(a, b) for a, b in zip(basis, again, strict=True))

    def check_weights(self, model) -> None:
        for name, p in model.named_parameters():
            w = self.weights[name]
            assert ((p.detach().double() - w.value).abs() <= w.error).all(), f"{name}: not the contract's update"

    def check_strength(self, start) -> None:
        """The bounds are small beside what they bound."""
        assert self.bound < 0.1 * self.signal
        error = torch.cat([w.error.flatten() for w in self.weights.values()]).norm()
        moved = torch.cat([(w.value - start[n]).flatten() for n, w in self.weights.items()]).norm()
        assert error < 0.01 * moved


def up_apart(model: nn.Module) -> list[dict]:
    """One group for ``up``, one of half the lr and twice the eps for the rest."""
    named = list(model.named_parameters())
    inner = [(n, p) for n, p in named if n.startswith("up")]
    rest = [(n, p) for n, p in named if not n.startswith("up")]
    return [{"params": inner}, {"params": rest, "lr": 0.025, "eps": 0.04}]


MEZO_CASES = [{}, {"probes": 3, "weight_decay": 4.0}, {"probes": 2, "weight_decay": 0.2, "groups": True}]
PGAP_CASES = [
    {},
    {"weight_decay": 4.0},
    {"weight_decay": 4.0, "groups": True, "eps_dense": 0.01, "lr_dense": 0.02},
    {"xi": "global", "delta": 0.5, "eps": 0.05, "exclude": ["embed*"], "weight_decay": 4.0},
    {"xi": "fixed", "delta": 5.0, "delta_steps": 3, "rank": 99, "eps": 0.05, "lr": 0.01},
    {"scale": "paper", "lr": 0.5, "eps": 0.1, "eps_probe": 0.02, "eps_dense": 0.02, "lr_dense": 0.05},
]
CASES = [pytest.param(MeZO, m, c, id=f"mezo-{m}-{i}") for m in MODES_OF[MeZO] for i, c in enumerate(MEZO_CASES)]
CASES += [pytest.param(PGAP, m, c, id=f"pgap-{m}-{i}") for m in MODES_OF[PGAP] for i, c in enumerate(PGAP_CASES)]


@pytest.mark.parametrize("method, mode, options", CASES)
def test_applies_what_it_evaluated(method, mode, options):
    groups = options.get("groups", False)
    given = {key: value for key, value in options.items() if key != "groups"}
    model, opt, closure = build(method, mode, params=up_apart if groups else lambda m: m, **given)
    reference = Reference(model, opt, **options)
    start = {name: w.value for name, w in reference.weights.items()}
    for step in range(5):
        del closure.seen[:]
        mean = opt.step(closure)
        assert mean == pytest.approx(sum(closure.seen[-2 * reference_probes(opt) :]) / (2 * reference_probes(opt)))
        reference.step(step, closure.seen)
        if not opt.perturbation.pending:
            reference.check_weights(model)
    opt.merge()
    assert not opt.perturbation.pending
    reference.check_weights(model)
    reference.check_strength(start)


def reference_probes(opt) -> int:
    return opt.probes if isinstance(opt, MeZO) else 1


def test_a_refresh_across_an_open_window():
    """The step that would have closed a window is skipped: the next one probes at s W + U C V^T + eps Q."""
    options = {"weight_decay": 0.5}
    model, opt, closure = build(PGAP, "folded", on_nonfinite="skip", **options)
    reference = Reference(model, opt, **options)
    start = {name: w.value for name, w in reference.weights.items()}
    for step in range(5):
        del closure.seen[:]
        if step == 2:
            assert math.isnan(opt.step(lambda: closure() * math.nan)) and opt.perturbation.pending
            continue
        opt.step(closure)
        reference.step(step, closure.seen)
    opt.merge()
    reference.check_weights(model)
    reference.check_strength(start)


# ---- 16 bit ----------------------------------------------------------------------------------------------------------


class Layers:
    """Inputs and outputs of a model's layers; of a stacked batch those of its halves, like two forwards."""

    def __init__(self, model: nn.Module, halves: int) -> None:
        self.seen: list[list[tuple[str, Tensor, Tensor]]] = []
        for name in ("embed", "up", "norm", "down", "head"):
            model.get_submodule(name).register_forward_hook(lambda m, args, y, n=name: self.keep(n, halves, args[0], y))

    def keep(self, name: str, halves: int, x: Tensor, y: Tensor) -> None:
        if name == "embed":
            self.seen += [[] for _ in range(halves)]
        for forward, a, b in zip(self.seen[-halves:], x.chunk(halves), y.chunk(halves), strict=True):
            forward.append((name, a.clone(), b.clone()))


def check_layers(point: dict[str, Value], forward, rank: int, dtype) -> tuple[float, float]:
    """Every layer's output is that of the weights at a point, rounded at most twice; norms of bound and output."""
    bound = size = 0.0
    for name, x, y in forward:
        exact = Bounded(x.double(), torch.zeros(x.shape, dtype=torch.float64))
        weight, bias = point.get(f"{name}.weight", point["embed.weight"]), point.get(f"{name}.bias")
        if name == "embed":
            want = Bounded(weight.value[x], weight.error[x] + (2 * rank + 10) * UNIT * weight.size[x])
        elif name == "norm":
            want = layer_norm(exact, weight, bias)
        else:
            want = linear(exact, weight, bias, rank)
        want = want.stored(dtype).stored(dtype)
        assert want.holds(y), name
        bound, size = bound + want.error.norm().item(), size + y.double().norm().item()
    return bound, size


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method, mode", EXACT)
def test_16_bit_evaluations_and_updates(method, mode, dtype, residual):
    """What a layer runs on is rounded to nearest at most, an update rounds a weight once, stochastically.

    With a residual the update is as exact as in float32 (in float16: 2^-15 of an ulp), and the weight is its value.
    """
    model, opt, closure = build(method, mode, dtype, eps=0.5, lr=0.5, residual=residual, weight_decay=0.1)
    layers = Layers(model, closure.halves)
    planes = opt.perturbation.residual.planes if residual else {}
    reference = Reference(model, opt)
    for step in range(6):
        within = reference.weights if step % 3 and mode.startswith("folded") else {}
        within = {name: w for name, w in within.items() if w.value.dim() == 2}  # not in the weights yet
        reference = Reference(model, opt, lr=0.5, eps=0.5, weight_decay=0.1)
        for name, plane in planes.items():
            reference.weights[name].value = joined(model.get_parameter(name).detach(), plane).double()
        reference.weights |= within
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        del closure.seen[:], layers.seen[:]
        opt.step(closure)
        directions = reference.directions(step, 0)
        for sign, forward in zip((1, -1), layers.seen[-2:], strict=True):
            # An evaluation reads no residual.
            seen = {n: within.get(n, Value(before[n].double(), torch.zeros(1), w.size))
                    for n, w in reference.weights.items()}  # fmt: skip
            points = {n: w.plus(sign * 0.5, directions[n], reference.unit) for n, w in seen.items()}
            bound, size = check_layers(points, forward, reference.rank, dtype)
            assert bound < 0.05 * size
        reference.step(step, closure.seen)
        for name, p in model.named_parameters():
            w = reference.weights[name]
            if mode.startswith("folded") and p.dim() == 2 and opt.perturbation.pending:
                assert torch.equal(p, before[name])
            elif residual:
                now = joined(p.detach(), planes[name])
                assert Bounded(w.value, w.error + w.value.abs() * torch.finfo(dtype).eps * 2**-15).holds(now), name
                assert torch.equal(p, now.to(dtype))
            else:
                # A 16-bit product rounds A C and B to 16 bits first.
                error = w.error + 2 * reference.unit * (w.size - before[name].double().abs()) * (reference.rank > 0)
                assert Bounded(w.value, error).stored(dtype, stochastic=True).holds(p), name


# ---- exactness, costs, memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method, mode", EXACT)
def test_learning_rate_zero_leaves_every_bit(method, mode, dtype):
    model, opt, closure = build(method, mode, dtype, lr=0.0, weight_decay=0.5)
    before = {name: bits(p.detach()) for name, p in model.named_parameters()}
    for _ in range(20):
        opt.step(closure)
    opt.merge()
    assert len(set(closure.seen)) > 20  # the forwards did see perturbations
    for name, p in model.named_parameters():
        assert torch.equal(bits(p.detach()), before[name])


COSTS = [(m, mode, options) for m in MODES_OF for mode in MODES_OF[m] for options in ({}, {"probes": 3})]
COSTS += [(PGAP, "folded", {"exclude": ["up*", "embed*"], "window": 4}), (PGAP, "folded", {"window": 1})]


@pytest.mark.parametrize("method, mode, options", COSTS)
def test_cost_is_what_is_declared(method, mode, options):
    """Over two windows; the schedule of two passes enters before its first."""
    _, opt, closure = build(method, mode, tied=False, **options)
    window = getattr(opt, "window", 1)
    begun = 0.0
    if mode == "two_pass":
        for _ in range(window):
            opt.step(closure)
        begun, closure.calls = opt.passes, 0
    for _ in range(2 * window):
        opt.step(closure)
    assert opt.passes - begun == pytest.approx(2 * window * opt.cost().weight_passes, rel=1e-12)
    forwards = 2 * opt.probes if method is MeZO else 2 + 2 * opt.probes / window
    assert closure.calls == pytest.approx(2 * window * forwards / closure.halves)


@pytest.mark.parametrize("method, mode", EXACT)
def test_memory_is_that_of_the_largest_layer(method, mode):
    model, opt, closure = build(method, mode, tied=False)
    arena = opt.perturbation.arena
    largest = max(sum(room(p) for p in layer.parameters()) for layer in model.children())
    assert sum(arena.capacity.values()) == opt.perturbation.scratch_bytes == largest
    highest, take = [], arena.take
    arena.take = lambda like: (take(like), highest.append(arena.top[like.device]))[0]
    for _ in range(3):
        opt.step(closure)
    assert max(highest) == largest and set(arena.top.values()) == {0}
    matrices = max(4 * w.tensor.numel() for w in opt.weights()) if method is PGAP else 0
    assert opt.cost().scratch_bytes == largest >= matrices  # where a refresh assembles G too


@pytest.mark.parametrize("mode", MODES_OF[PGAP])
def test_state_is_what_is_declared(mode):
    """U, S and V, a scaled Z for each matrix that a hook perturbs, and a window's C where updates are folded."""
    _, opt, closure = build(PGAP, mode)
    opt.step(closure)
    kept = [t for basis in opt.bases.values() for t in basis]
    for number, slot in enumerate(getattr(opt.perturbation, "slots", [])):
        kept += slot.subspace[2:] if slot.subspace else ()
        window = getattr(opt.perturbation, "windows", {}).get(number)
        kept += [window.core] if window else []
    assert opt.cost().state_bytes == sum(t.numel() * t.element_size() for t in kept)
