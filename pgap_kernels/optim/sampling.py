"""How a step tries its directions: which points, in which slices of the batch, and what their losses say of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .. import checks
from ..directions import Amounts, Direction
from . import scores
from .options import at_least_one

BASELINES = ("antithetic", "loo", "clean")


class Sampling(NamedTuple):
    """n directions of each group of examples.

        antithetic   L(W + eps D_j) - L(W - eps D_j),   2 n points
        loo          L(W + eps D_j) against the mean of the others (leave-one-out),   n points
        clean        L(W + eps D_j) - L(W),   n + 1 points

    With several groups a forward's batch holds copies of the minibatch, and each group, an equal slice of a copy, has
    directions of its own: the sum over groups is an estimate of the whole gradient all the same, with less noise than
    one direction shared by all.

    Attributes:
        directions: n.
        groups: slices of a copy of the minibatch.
        baseline: see above.
    """

    directions: int
    groups: int
    baseline: str

    @classmethod
    def checked(cls, directions: int, groups: int, members: int, baseline: str, name: str = "directions") -> Sampling:
        """The sampling that these options of an optimizer ask for; ``name`` is its own of ``directions``.

        Raises:
            ValueError: naming the option.
        """
        checks.choice("baseline", baseline, BASELINES)
        sampling = cls(at_least_one(name, directions), groups, baseline)
        if baseline == "loo" and sampling.directions < 2:
            raise ValueError(f"{name}: got {directions} with baseline='loo'; accepted: 2 or more")
        if sampling.copies % members:
            raise ValueError(
                f"members: got {members} for {sampling.copies} points of each group ({name}={directions}, "
                f"baseline={baseline!r}); accepted: a number that divides them"
            )
        return sampling

    @property
    def copies(self) -> int:
        """Points of each group."""
        return self.directions * 2 if self.baseline == "antithetic" else self.directions + (self.baseline == "clean")

    def points(
        self, directions: Sequence[Sequence[Direction]], radius: Sequence[float]
    ) -> list[tuple[Direction, Amounts]]:
        """The points of a step, all groups of a copy before the next; directions are n lists of one for each group."""
        back = [-eps for eps in radius]
        found: list[tuple[Direction, Amounts]] = []
        for own in directions:
            found += [(d, radius) for d in own]
            if self.baseline == "antithetic":
                found += [(d, back) for d in own]
        if self.baseline == "clean":
            found += [(Direction(), radius)] * self.groups
        return found

    def differences(self, losses: Sequence[float]) -> list[list[float]]:
        """c of the mean losses, with  gradient ~ sum_jg c_jg D_jg / eps:  n lists of one for each group."""
        size = self.groups
        f = [[loss / size for loss in losses[i : i + size]] for i in range(0, len(losses), size)]
        columns = [self._of_group([copy[g] for copy in f]) for g in range(size)]
        return [list(row) for row in zip(*columns, strict=True)]

    def _of_group(self, losses: Sequence[float]) -> list[float]:
        if self.baseline == "antithetic":
            pairs = zip(losses[::2], losses[1::2], strict=True)
            return [(plus - minus) / (2 * self.directions) for plus, minus in pairs]
        if self.baseline == "loo":
            return scores.leave_one_out(losses)
        *tried, base = losses
        return [(loss - base) / self.directions for loss in tried]

    def reported(self, losses: Sequence[float]) -> float:
        """The loss to report: the mean at the perturbed points."""
        tried = losses[: len(losses) - (self.groups if self.baseline == "clean" else 0)]
        return sum(tried) / len(tried)
