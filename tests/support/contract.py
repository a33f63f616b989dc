"""A run beside its naive method: what was evaluated is what is applied, whatever the method and the mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pgap_kernels.optim import ZOOptimizer
from pgap_kernels.perturbation.residual import joined

from .bounds import Bounded
from .counted import Counted, known, total
from .methods import RATES, Row, Step, Weights, is_exact, matrices, options_of
from .models import Layers, Losses, Words, layer, loss_at, snapshot

# Roundings of a pass beyond those of its terms' formulas: its coefficient, where that is a sum of two, the product with
# the core, the term that joins the others, the decay, and the weight that is written.
PASS = 6
# A pass goes from a point to the next; where parts do not add up two go by way of W, each with both points' terms.
PASSES = 2


def in_groups(model: nn.Module, options: Mapping[str, float], own: Mapping[str, float]) -> list[dict]:
    """One group for ``up``, one of half the lr, twice the eps and hyper-parameters of its own for the rest."""
    named = list(model.named_parameters())
    rest = {"lr": options["lr"] / 2, "eps": options["eps"] * 2, **own}
    up = [(n, p) for n, p in named if n.startswith("up")]
    return [{"params": up}, {"params": [(n, p) for n, p in named if not n.startswith("up")], **rest}]


def build(row: Row, mode: str, model: nn.Module | None = None, **options) -> tuple[nn.Module, ZOOptimizer, Losses]:
    """A model, the row's optimizer in a mode, and a closure."""
    model = Words() if model is None else model
    chosen = {**row.options, **options_of(mode), **options}
    params = model if row.groups is None else in_groups(model, chosen, row.groups)
    return (
        model,
        row.make(params, model=model, **chosen),
        Losses(model, chosen.get("members", 1) > 1),
    )


def losses_of_points(optimizer: ZOOptimizer) -> list[float]:
    """A list that gets the losses of every point; forwards that only try the model out are none."""
    recipe, losses = optimizer.estimate_and_update, []

    def recorded(evaluate) -> float:
        try:
            return recipe(evaluate)
        finally:
            losses.extend(evaluate.losses)

    optimizer.estimate_and_update = recorded
    return losses


class Contract:
    """Runs steps, each beside the naive one, and keeps what the bounds are small beside.

    The stored weights are where the next naive step starts, unless the mode has deferred an update or left a point on
    them: then it goes on from its own, with the bound so far.
    """

    def __init__(self, row: Row, mode: str, model: nn.Module | None = None, **options) -> None:
        self.row, self.mode = row, mode
        self.options = {**row.options, **options}
        self.model, self.optimizer, self.closure = build(row, mode, model, **options)
        self.closure.at = self.look
        self.losses = losses_of_points(self.optimizer)
        self.weights: Weights = {name: known(p) for name, p in self.model.named_parameters()}
        self.seen: list[dict[str, Tensor]] = []  # stored weights at each call of the closure
        self.states: list[dict] = [{} for _ in self.optimizer.param_groups]
        self.loss_error = self.loss_signal = self.point_error = self.point_signal = 0.0
        self.weight_error = self.weight_signal = 0.0

    def look(self, call: int) -> None:
        with torch._C.DisableTorchFunction():  # the hooks' search for weights that are read elsewhere
            self.seen.append(snapshot(self.model))

    def step(self) -> None:
        """One step of the optimizer, and all that the contract says about it."""
        number, before, gathered = self.optimizer.steps, snapshot(self.model), self.deferred()
        del self.seen[:], self.losses[:]
        returned = self.optimizer.step(self.closure)
        losses, reported = list(self.losses), self.row.reported
        mean = sum(losses[-reported:]) / reported
        assert math.isclose(returned, mean, rel_tol=1e-12, abs_tol=1e-12), "not the mean of the losses"
        self.start = self.weights
        points, new = self.naive(number, losses)
        self.points = points
        if is_exact(self.mode):
            for name, w in before.items():  # a refresh writes what was gathered along the old factors
                assert name in gathered or all(torch.equal(seen[name], w) for seen in self.seen), "a forward wrote"
            self.check_points(points, losses)
            # What a window gathers is rounded as it is, and once more as it is written.
            passes = {n: (1 + (n in gathered)) * w.arithmetic(PASS) for n, w in new.items()}
        else:
            passes = self.check_walk([*points, new])
        self.weights = {n: w.settled(total(w.error, passes[n])) for n, w in new.items()}
        self.check_weights(before)
        self.check_state()

    def skip(self) -> None:
        """A step that a loss which is not finite keeps from being made."""
        before = snapshot(self.model)
        assert math.isnan(self.optimizer.step(lambda: self.closure() * math.nan))
        assert not is_exact(self.mode) or all(torch.equal(p, before[n]) for n, p in self.model.named_parameters())

    def deferred(self) -> set[str]:
        """Names of the weights that may not be what the model is."""
        if not self.optimizer.pending:
            return set()
        return {*self.weights} if self.mode == "two_pass" else {*matrices(self.options, self.weights)}

    def naive(self, number: int, losses: list[float]) -> tuple[list[Weights], Weights]:
        """The points of a step and the weights after it; of each param group what a step with its options gives."""
        points: list[Weights] = [{} for _ in losses]
        new: Weights = {}
        tensors = dict(self.model.named_parameters())
        for i, group in enumerate(self.optimizer.param_groups):
            own = {name: group[name] for name in self.options if name in (*RATES, *(self.row.groups or ()))}
            names = group["param_names"]
            step = Step(number, self.weights, names, self.states[i], losses, self.options, own,
                        lambda name, entry: self.optimizer.state[tensors[name]][entry])  # fmt: skip
            after, self.states[i] = self.row.naive(step)
            assert len(step.points) == len(losses), "not the method's forwards"
            for point, its in zip(points, step.points, strict=True):
                point |= {name: its[name] for name in names}
            new |= {name: after[name] for name in names}
        return points, new

    def check_points(self, points: Sequence[Weights], losses: Sequence[float]) -> None:
        """Every loss is that of its point."""
        values = []
        for point, loss in zip(points, losses, strict=True):
            value, error = loss_at({n: w.settled(w.bound(PASS)) for n, w in point.items()})
            assert abs(loss - value) <= error, f"{loss} is not the loss of a point, {value} +- {error}"
            values.append(value)
            self.loss_error += error
        self.loss_signal += sum(abs(value - sum(values) / len(values)) for value in values)

    def check_walk(self, stops: Sequence[Weights]) -> dict[str, Tensor]:
        """In place every forward sees its point, but for the passes that have led there; how far off the last is."""
        off = {n: torch.zeros_like(w.value) for n, w in self.weights.items()}
        last = self.weights
        for number, stop in enumerate(stops):
            for name, w in stop.items():
                off[name] = off[name] + PASSES * (w.arithmetic(PASS) + last[name].arithmetic(PASS))
                if number < len(self.seen):
                    error = total(off[name], w.error)
                    assert ((self.seen[number][name] - w.value).abs() <= error).all(), f"{name}: not at its point"
                    self.point_error += error.norm().item()
                    self.point_signal += (w.value - self.weights[name].value).norm().item()
            last = stop
        return off

    def way_back(self) -> dict[str, Tensor]:
        """How far the weights may be off after the last step's points and a return to where it began."""
        self.seen, self.weights, now = [], self.start, self.weights
        off = self.check_walk([*self.points, self.start])
        self.weights = now
        return {name: total(error, self.start[name].error) for name, error in off.items()}

    def check_weights(self, before: Mapping[str, Tensor]) -> None:
        """The stored weights are the naive method's, but for those whose updates are deferred."""
        deferred = self.deferred()
        for name, p in self.model.named_parameters():
            w = self.weights[name]
            if name in deferred:
                continue
            assert ((p.detach() - w.value).abs() <= w.off).all(), f"{name}: not the method's update"
            self.weight_error += w.off.norm().item()
            self.weight_signal += (w.value - before[name]).norm().item()
            self.weights[name] = known(p)

    def check_state(self) -> None:
        """What the optimizer keeps is what the naive method keeps."""
        for theirs, ours in self.row.state.items():
            for i, group in enumerate(self.optimizer.param_groups):
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    if name in self.states[i][theirs]:
                        kept = self.states[i][theirs][name]
                        got = self.optimizer.state[p][ours]
                        assert ((got - kept.value).abs() <= kept.bound()).all(), f"{name}: not its {ours}"
                        self.states[i][theirs][name] = known(got)

    def finish(self) -> None:
        """Nothing is pending any more, and the bounds are small beside what they bound."""
        self.merge()
        self.check_strength()

    def merge(self, how: Callable[[], object] | None = None) -> None:
        """Merge, or do what shall merge: the stored weights are the naive method's then."""
        before = snapshot(self.model)
        if self.optimizer.pending:
            stops = [self.weights, self.next_point()] if self.mode == "two_pass" else [self.weights]
            passes = [{n: PASSES * w.arithmetic(PASS) for n, w in stop.items()} for stop in stops]
            self.weights = {n: w.settled(total(w.error, sum(p[n] for p in passes))) for n, w in self.weights.items()}
        (how or self.optimizer.merge)()
        assert not self.optimizer.pending
        self.check_weights(before)

    def check_evaluation(self) -> None:
        """Whoever calls the model between steps sees what was learnt."""
        value, error = loss_at({n: w.settled(w.bound(PASS)) for n, w in self.weights.items()})
        assert abs(Losses(self.model)().item() - value) <= error
        untrained = Losses(Words())().item()
        assert abs(untrained - value) > 2 * error

    def next_point(self) -> Weights:
        """Where the two-pass schedule has left the weights: it does not hang on losses."""
        states = [dict(state) for state in self.states]
        points, _ = self.naive(self.optimizer.steps, [0.0] * self.row.reported)
        self.states = states
        return points[0]

    def check_strength(self) -> None:
        if is_exact(self.mode):
            assert self.loss_error < 0.1 * self.loss_signal, "the losses' bound would let wrong points pass"
        else:
            assert self.point_error < 0.01 * self.point_signal, "the points' bound would let wrong ones pass"
        assert self.weight_error < 0.01 * self.weight_signal, "the weights' bound would let a wrong update pass"


class Contract16(Contract):
    """The same of 16-bit weights: each layer runs on its point, rounded to nearest, and every part of an update rounds
    a weight once.

    The update is stochastic, or with residual planes as exact as in float32 (in float16: 2^-15 of an ulp). No forward
    reads a plane.
    """

    def __init__(self, row: Row, mode: str, dtype: torch.dtype, residual: bool, **options) -> None:
        super().__init__(row, mode, Words().to(dtype), residual=residual, **options)
        self.dtype, self.unit = dtype, torch.finfo(dtype).eps / 2
        self.layers = Layers(self.model, self.closure.halves)
        self.start = {name: known(p) for name, p in self.model.named_parameters()}

    def step(self) -> None:
        del self.layers.forwards[:]
        self.stored = snapshot(self.model)
        self.plane = {name: self.master(name, p).double() - p.double() for name, p in self.stored.items()}
        super().step()

    def master(self, name: str, p: Tensor) -> Tensor:
        """A weight with its plane."""
        residual = self.optimizer.perturbation.residual
        return p.detach() if residual is None else joined(p.detach(), residual.planes[name])

    def seen_at(self, name: str, w: Counted) -> Counted:
        """A weight as a forward sees it: without its plane, and rounded, as P and B of a 16-bit product are."""
        rounded = self.row.parts * self.unit * w.size + 2 * self.unit * self.moved(name, w)
        return Counted(w.value - self.plane[name], error=w.bound(PASS) + rounded)

    def moved(self, name: str, w: Counted) -> Tensor:
        """What of a weight's terms is not what was stored."""
        return (w.size - self.stored[name].double().abs()).clamp(min=0)

    def check_points(self, points: Sequence[Weights], losses: Sequence[float]) -> None:
        for point, forward in zip(points, self.layers.forwards[-len(points) :], strict=True):
            at = {name: self.seen_at(name, w) for name, w in point.items()}
            for name, x, y in forward:
                want = layer(name, at, x if name == "embed" else known(x), self.dtype)
                assert Bounded(want.value, want.off).holds(y), f"{name}: not at its point"
                self.loss_error += want.off.norm().item()
                self.loss_signal += y.double().norm().item()

    def check_weights(self, before: Mapping[str, Tensor]) -> None:
        deferred = self.deferred()
        for name, p in self.model.named_parameters():
            w, now = self.weights[name], self.master(name, p)
            if name in deferred:
                assert torch.equal(p, before[name])
                continue
            if self.optimizer.residual:
                off = w.off + w.value.abs() * torch.finfo(self.dtype).eps * 2**-15
                assert ((now - w.value).abs() <= off).all(), f"{name}: not the method's update"
                nearest = now.to(self.dtype)  # or as near on the other side
                assert torch.equal((now - p).abs(), (now - nearest).abs()), f"{name}: not its own value's rounding"
            else:
                earlier = (self.row.parts - 1) * 2 * self.unit * w.size  # roundings, of up to an ulp each
                bound = Bounded(w.value, w.off + earlier + 2 * self.unit * self.moved(name, w))
                assert bound.stored(self.dtype, stochastic=True).holds(p), f"{name}: not the method's update"
            self.weights[name] = known(now)

    def check_strength(self) -> None:
        assert self.loss_error < 0.05 * self.loss_signal, "the layers' bound would let wrong points pass"
