"""One step's forwards: losses at points, all from the same random numbers and buffers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import notices
from ..directions import Amounts, Direction, Weight, check_amounts
from ..perturbation import (
    Ambient,
    Autocast,
    ForwardState,
    Perturbation,
    is_called_compiled,
    observing,
    uncompiled,
    uninterrupted,
)
from . import scores
from .signal import Signal

Closure = Callable[[], "Tensor | float"]
# A direction and the radius of each weight; the point is W + radius * direction.
PointSpec = tuple[Direction, Amounts]
_FLAT_STEPS = 10  # steps in a row whose losses do not depend on the point, before it is said


class NonFiniteLossError(RuntimeError):
    """The closure returned NaN or infinity. The weights have been restored to what they were before the step."""


class FlatLosses:
    """Notices that no perturbation reaches the loss: all losses of many steps in a row were bit-equal."""

    def __init__(self) -> None:
        self.steps = 0

    def note(self, losses: Sequence[float], groups: int = 1) -> None:
        """Count a step's losses, and warn once if there were enough such steps; groups have losses of their own."""
        flat = len(losses) > groups and all(loss == losses[i % groups] for i, loss in enumerate(losses))
        self.steps = self.steps + 1 if flat else 0
        if self.steps == _FLAT_STEPS:
            notices.warn(
                f"the losses at all points of each of the last {_FLAT_STEPS} steps were bit-equal: no perturbation "
                "reaches the loss. Is the loss that of the model whose parameters are trained (not of a copy, merged "
                "adapters or functional_call), and is eps large enough for the loss's precision?"
            )


@dataclass
class Evaluation:
    """The forwards of one step; exists inside it only.

    Attributes:
        step: its number.
        closure: runs one forward and returns its loss, or one loss for each slice of a stacked batch.
        perturbation: the mode.
        weights, model: of the optimizer.
        eps: the smoothing radius of each weight.
        state, autocast, ambient: what each forward starts from, and runs under.
        timed: adds the wall seconds of a block to a part of the step.
        reduce: makes one loss of those of several processes.
        members, groups: copies of the minibatch in the closure's batch, and slices of each.
        checked_slices: by training flags, the weights that moved when the slices were seen to be apart.
        losses: of every point so far, in order.
        slopes: along the step's directions, by the radius of the first weight, where the method takes them.
        refreshed: whether the step has made new subspaces, or a new estimate of curvature.
        signal: what the losses of the step say about the gradient.
        rows: where the closure returned one loss per row, those of the last points, (points, rows of a slice) of every
            forward.
    """

    step: int
    closure: Closure
    perturbation: Perturbation
    weights: list[Weight]
    model: nn.Module | None
    eps: Amounts
    state: ForwardState
    autocast: Autocast
    ambient: Ambient
    timed: Callable[[str], contextlib.AbstractContextManager]
    reduce: Callable[[Tensor], Tensor]
    members: int
    groups: int
    checked_slices: dict[tuple[bool, ...], set[int]]
    losses: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    refreshed: bool = False
    signal: Signal = field(default_factory=Signal)
    rows: list[Tensor] = field(default_factory=list)

    def loss(self, direction: Direction | None = None, radius: Amounts | None = None) -> float:
        """The loss at W + radius * direction; at W without a direction."""
        return self.population([(direction or Direction(), radius or self.eps)])[0]

    def two_sided(self, direction: Direction, radius: Amounts | None = None) -> tuple[float, float]:
        """Losses at W + radius * direction and W - radius * direction; the radius is ``eps`` by default."""
        eps = radius or self.eps
        check_amounts(eps)
        plus, minus = self.population([(direction, eps), (direction, [-e for e in eps])])
        self.slopes.append(scores.spsa(plus, minus, eps[0]))
        return plus, minus

    def population(self, points: Sequence[PointSpec]) -> list[float]:
        """Losses at several points: as many in one forward as the closure's batch holds copies of the minibatch, else
        one each.

        Raises:
            NonFiniteLossError: a loss is not finite.
        """
        losses = self.group_losses([point for point in points for _ in range(self.groups)])
        return [sum(losses[i : i + self.groups]) / self.groups for i in range(0, len(losses), self.groups)]

    def group_losses(self, points: Sequence[PointSpec]) -> list[float]:
        """The mean loss of each group of each copy of the minibatch at a point of its own, all groups of a copy before
        the next. Copies that are left over see what the last one does.

        Raises:
            NonFiniteLossError: a loss is not finite.
        """
        per_forward = self.members * self.groups
        assert len(points) % self.groups == 0
        for point in points:
            if not (isinstance(point, tuple) and isinstance(point[0], Direction)):
                raise TypeError(f"points: got {point!r}; accepted: pairs of a Direction and an amount for each weight")
        filled = list(points)
        while len(filled) % per_forward:
            filled += points[-self.groups :]
        self.rows = []
        found: list[Tensor] = []
        scaled = {id(point): point[0].scaled(point[1]) for point in points}  # what is the same stays so
        for first in range(0, len(filled), per_forward):
            together = [scaled[id(point)] for point in filled[first : first + per_forward]]
            if per_forward > 1:
                self._check_slices(together)
            found.append(self._forward_at(together))
        losses = [value for vector in found for value in vector.tolist()]  # only now, so that no forward waits
        del losses[len(points) :]
        self.losses += losses
        for i, value in enumerate(losses):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"loss at point {i + 1} of {len(losses)} is {value} in step {self.step}; the weights are "
                    "restored. Lower lr or eps, look at the batch, or pass on_nonfinite='skip'"
                )
        return losses

    def observed(self, see: Callable[[Weight, Tensor], None]) -> float | None:
        """The loss at W, while ``see`` gets the inputs of every linear layer and embedding with its weight.

        None if compiled layers ran as the Python code that they were made from: other losses may be rounded otherwise,
        and cannot be compared with this one.
        """
        if self.perturbation.dry:
            for w in self.weights:
                if w.tensor.dim() == 2:
                    see(w, w.tensor.new_empty(w.tensor.shape[1], w.tensor.shape[1]))
            return self.loss()
        compiled = False

        def asking(weight: Weight, x: Tensor) -> None:
            nonlocal compiled
            compiled = compiled or is_called_compiled()
            see(weight, x)

        # Compiled code of a forward that nobody observed would be found again, without the hooks.
        with observing(self.model, self.weights, asking), uncompiled():
            self.perturbation.watched = True
            try:
                loss = self.loss()
            finally:
                self.perturbation.watched = False
        return None if compiled else loss

    def clear(self) -> None:
        """Show W itself again, before the memory of the forwards is used for something else."""
        self._show([Direction()])

    # ---- one forward ------------------------------------------------------------------------------------------------

    def _show(self, points: Sequence[Direction]) -> None:
        with self.timed("perturb"), uninterrupted():
            self.perturbation.perturb_to(points)

    def _forward_at(self, points: Sequence[Direction]) -> Tensor:
        self._show(points)
        with self.timed("forward"):
            value = self._run_closure()
            if self.state.track_changed_buffers():
                value = self._run_closure()
            while self.perturbation.must_repeat:  # at most twice: after a search, and after code without hooks
                value = self._run_closure()
        known = len(self.rows)
        losses = self.reduce(self._checked(value, len(points)))
        # What they say of the gradient sets a learning rate, which has to be the same in all processes.
        self.rows[known:] = [self.reduce(rows) for rows in self.rows[known:]]
        return losses

    def _run_closure(self) -> Tensor | float:
        self.state.restore()
        with self.autocast.inside(), self.ambient.inside():
            return self.perturbation.forward(self.closure)

    def _checked(self, value: Tensor | float, count: int) -> Tensor:
        if not isinstance(value, (Tensor, int, float)):
            raise TypeError(f"closure: returned {type(value).__name__}; accepted: a scalar tensor or a float")
        # A copy: losses are read when all forwards are over, and a closure may return the same tensor each time, as one
        # that replays a CUDA graph does.
        if isinstance(value, Tensor):
            loss = value.detach().clone()
        else:
            loss = torch.tensor(value, dtype=torch.float64, device="cpu")
        several = count > 1 and loss.numel() and loss.numel() % count == 0
        if loss.is_complex() or not (several or loss.numel() == count):
            accepted = "a real scalar loss"
            if count > 1:
                accepted = (
                    f"with members={self.members} and groups={self.groups} the {count} real losses of as many slices, "
                    f"or one of each row of torch.cat([batch] * {self.members}) (reduction='none', per_example_loss)"
                )
            raise ValueError(f"closure: returned {loss.dtype} of shape {tuple(loss.shape)}; accepted: {accepted}")
        if loss.dtype in (torch.float16, torch.bfloat16):
            notices.warn_once(
                f"closure: returned a {loss.dtype} loss, whose rounding is large beside the difference of two losses; "
                "reduce the loss in float32"
            )
        if loss.numel() == count and self.groups == 1:
            return loss.reshape(count)
        self.rows.append(loss.reshape(count, -1))  # with groups, of one row each if not of several
        return self.rows[-1].double().mean(1)  # in float64: differences of these means are what counts

    def _check_slices(self, points: Sequence[Direction]) -> None:
        """Refuse a model that mixes the slices of a stacked batch: moving one slice may not move another's loss.

        The number of rows cannot tell (a sequence-first layer may have as many), so the first forward that moves some
        weight is tried out: with the first slice moved, and with the last, as what comes first may be all that others
        see, or all unseen. A method that moves other layers in each step may at first move those behind the mixing.
        Both start from other random numbers, so that a forward that draws is refused, too.
        """
        flags, count = self.state.flags(), len(points)
        checked = self.checked_slices.setdefault(flags, set())
        moved = next((point for point in points if not checked.issuperset(_indices(point))), None)
        if self.perturbation.dry or moved is None:
            return
        # At W, by the same computation as at the point, to the last bit; each of the three has a run of its own.
        first, inner, last = (moved.scaled([0.0] * len(self.weights)) for _ in range(3))
        rest = [inner] * (count - 2)
        known = len(self.rows)
        before = self._forward_at([first, *rest, last])
        with self.state.other_random_numbers():  # dropout would be noise in the difference of two losses
            first_moved = self._forward_at([moved, *rest, last])
            last_moved = self._forward_at([first, *rest, moved])
        del self.rows[known:]
        if not torch.stack((before, first_moved, last_moved)).isfinite().all():
            return  # the evaluation itself will say so
        if not torch.equal(before[1:], first_moved[1:]) or not torch.equal(before[:-1], last_moved[:-1]):
            with self.state.other_random_numbers():
                again = self._forward_at([first, *rest, last])
            if not torch.equal(before, again):
                raise RuntimeError(
                    "closure: draws random numbers, so that slices at the same weights have other losses; accepted: "
                    "forwards that draw none with members or groups (model.eval() switches dropout off)"
                )
            raise RuntimeError(
                "members: a point of one slice of the batch moved the loss of another slice; accepted: models whose "
                "layers keep rows apart, with the batch as leading dimension, and nothing averaged over it. Choose "
                "members=1"
            )
        self._check_copies(before.view(self.members, self.groups))
        checked |= _indices(moved)

    def _check_copies(self, losses: Tensor) -> None:
        """Refuse a batch whose copies, all seen by the same weights, have different losses.

        Where they lie in a batch may change the rounding of a product, and that the loss; another order of the rows
        changes it by much more than these tolerances.
        """
        rounded = self.autocast.dtypes or any(w.tensor.dtype != torch.float32 for w in self.weights)
        tolerance = 5e-2 if rounded else 1e-3
        if not torch.allclose(losses[1:], losses[:1].expand_as(losses[1:]), rtol=tolerance, atol=tolerance):
            other = int((losses - losses[:1]).abs().max(1).values.argmax())
            raise RuntimeError(
                f"closure: the {self.members} copies of the minibatch have different losses at the same weights, "
                f"{losses[0].mean().item():.4g} and {losses[other].mean().item():.4g}; accepted: with members="
                f"{self.members} a batch torch.cat([batch] * {self.members})"
            )


def _indices(point: Direction) -> set[int]:
    """Of the weights that a point moves."""
    return {index for part in point for index in part.indices}
