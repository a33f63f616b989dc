"""What all low-rank methods share: which matrices, their rank and scale, factors in the state, the refresh schedule."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import checks, noise, ops
from ..directions import Direction, Factor, LowRank, Term, Weight, bucket
from ..noise import Role
from .base import Evaluation, Params, ZOOptimizer
from .checkpoint import keep_memory
from .options import at_least_one, patterns
from .sampling import Sampling

SCALES = ("subzero", "paper")


class LowRankOptimizer(ZOOptimizer):
    """Base of the methods that move matrices along A C B^T, and everything else along dense noise.

    Factors are state of their weight (``optimizer.state[p]``), float32, and keep their memory from refresh to refresh:
    captured forwards read them there.

    Args:
        params, defaults: as in ``ZOOptimizer``; groups have a ``rank``.
        window: steps between refreshes of the factors; the first step refreshes.
        scale: "subzero": sqrt(m n)/r, the norm of dense noise, so that MeZO's eps and lr carry over; "paper": 1.
        exclude: names (fnmatch patterns, e.g. "*embed*") of matrices that take dense noise instead; each has to match.
        **options: of ``ZOOptimizer``.

    Attributes:
        refreshed_at: the step of the last refresh; None before the first.
        dense_lr_ratio: the learning rate of tensors that take dense noise over that of their group. The ratio, not the
            value, is kept: a scheduler then moves both.
    """

    saved_attributes: ClassVar[dict[str, Any]] = {"refreshed_at": None, "dense_lr_ratio": 1.0}
    sampling: Sampling  # of methods with ``sampled_step``

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        window: int,
        scale: str = "paper",
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.refreshed_at: int | None
        self.dense_lr_ratio: float
        self._found: tuple[list[Weight], tuple[list[Weight], list[list[Weight]], list[int]]] | None = None
        super().__init__(params, defaults, **options)
        self.window = self.period = at_least_one("window", window)
        self.scale = checks.choice("scale", scale, SCALES)
        self.exclude = patterns("exclude", exclude, self._known_names())

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        _check_rank(group["rank"])

    def check_schedule(self) -> None:
        super().check_schedule()
        for group in self.param_groups:
            _check_rank(group["rank"])

    def check_state(self, weight: Weight, state: Mapping[str, Any]) -> None:
        super().check_state(weight, state)
        for side, name in enumerate(("left", "right")):
            factor = state.get(name)
            if factor is None:
                continue
            if weight.index not in self.lowrank_indices():
                raise ValueError(
                    f"state_dict: got a subspace of {weight.name!r}, which takes dense noise here; accepted: the state "
                    "of an optimizer with the same exclude"
                )
            if len(factor) != self.shape_of(weight)[side]:
                raise ValueError(
                    f"state_dict: got a {name} factor of shape {tuple(factor.shape)} for {weight.name!r} of shape "
                    f"{self.shape_of(weight)}; accepted: the state of weights of the same shapes"
                )

    # ---- which weights ----------------------------------------------------------------------------------------------

    def _known_names(self) -> list[str]:
        """Every name of the weights, and the names of the model's frozen parameters, which may be trained later."""
        known = {name: None for w in self.weights() for name in w.names}
        if self.model is not None:
            known |= dict.fromkeys(noise.canonical_name(name) for name, _ in self.model.named_parameters())
        return list(known)

    def _split(self) -> tuple[list[Weight], list[list[Weight]], list[int]]:
        """Matrices with low-rank directions, the other weights in buckets, and the matrices' indices; found once."""
        weights = self.weights()
        if self._found is None or self._found[0] is not weights:
            excluded = {w.index for w in weights if any(map(w.matches, self.exclude))}
            chosen = self.may_be_lowrank([w for w in weights if w.index not in excluded])
            indices = [w.index for w in chosen]
            rest = [w for w in weights if w.index not in {*indices}]
            self._found = (weights, (chosen, bucket(rest), indices))
        return self._found[1]

    def may_be_lowrank(self, weights: Sequence[Weight]) -> list[Weight]:
        """Those of some weights that have low-rank directions."""
        return [w for w in weights if w.tensor.dim() == 2 and w.tensor.numel()]

    def matrices(self) -> list[Weight]:
        """The weights with low-rank directions."""
        return self._split()[0]

    def dense_buckets(self) -> list[list[Weight]]:
        """The weights that take dense noise, no matrices or excluded by name, in lists that can share an op call."""
        return self._split()[1]

    def lowrank_indices(self) -> list[int]:
        return self._split()[2]

    def shape_of(self, weight: Weight) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        rows, columns = weight.tensor.shape
        return rows, columns

    def rank_of(self, weight: Weight) -> int:
        """r of a matrix: the group's, or its shorter side (LoRA factors)."""
        return min(operator.index(weight.group["rank"]), *self.shape_of(weight))

    def scale_of(self, weight: Weight) -> float:
        """What multiplies a direction of a matrix."""
        return math.sqrt(weight.tensor.numel()) / self.rank_of(weight) if self.scale == "subzero" else 1.0

    def rates(self) -> list[float]:
        rates = super().rates()
        if self.dense_lr_ratio == 1:
            return rates
        lowrank = {*self.lowrank_indices()}
        return [lr if i in lowrank else lr * self.dense_lr_ratio for i, lr in enumerate(rates)]

    # ---- factors ----------------------------------------------------------------------------------------------------

    def stored(self, weights: Sequence[Weight], name: str) -> list[Tensor]:
        """An entry of the state of some matrices."""
        return [self.state[w.tensor][name] for w in weights]

    def store(self, weight: Weight, **tensors: Tensor) -> None:
        """Set entries of a matrix's state."""
        for name, tensor in tensors.items():
            keep_memory(self.state[weight.tensor], name, tensor)

    def by_rank(self) -> list[list[Weight]]:
        """The matrices in lists that can share an op call."""
        weights, ranks = self.weights(), [operator.index(group["rank"]) for group in self.param_groups]
        if getattr(self, "_by_rank", (None, None))[:2] != (weights, ranks):
            self._by_rank = (weights, ranks, bucket(self.matrices(), also=self.rank_of))
        return self._by_rank[2]

    def low_rank(
        self, weights: Sequence[Weight], left: Factor, right: Factor, cores: Sequence[Tensor] | None = None
    ) -> Direction:
        """scale * A C B^T on matrices of one rank."""
        return Direction([LowRank(weights, left, right, [Term(cores, [self.scale_of(w) for w in weights])])])

    def drawn_cores(self, weights: Sequence[Weight], number: int, step: int) -> list[Tensor]:
        """Z (r, r) ~ N(0, 1) of matrices of one rank, the n-th of a step."""
        rank, key = self.rank_of(weights[0]), self.key(Role.CORE, number, step)
        return [ops.draw((rank, rank), key, w.id, device=w.tensor.device) for w in weights]

    # ---- the schedule -----------------------------------------------------------------------------------------------

    def refreshes_at(self, step: int) -> bool:
        """Whether the schedule has a refresh in a step."""
        return step % self.window == 0

    def refresh_is_due(self, name: str) -> bool:
        """Whether factors are to be made now: by the schedule, as one was missed, or as a matrix has none."""
        scheduled = self.steps - self.steps % self.window
        missed = self.refreshed_at is None or self.refreshed_at < scheduled
        matrices = self.matrices()
        return (missed and bool(matrices)) or any(self.lacks(w, name) for w in matrices)

    def lacks(self, weight: Weight, name: str) -> bool:
        """Whether a matrix has no such factor, or one of a rank that its group has no longer."""
        factor = self.state[weight.tensor].get(name)
        return factor is None or factor.shape[1] != self.rank_of(weight)

    def refresh(self, evaluate: Evaluation) -> None:
        """New factors of every matrix."""
        raise NotImplementedError

    def refresh_if_due(self, name: str, evaluate: Evaluation) -> None:
        """Refresh, with what a window has gathered in the weights first: it belongs to its own factors."""
        if not self.refresh_is_due(name):
            return
        with self.timed("refresh"):
            self.refresh(evaluate)
        evaluate.refreshed = True
        self._planned = None
        self.refreshed_at = self.steps

    def sampled_step(self, evaluate: Evaluation, factor: str) -> float:
        """A step along fresh directions in the subspaces of the last refresh; returns the loss to report.

        Args:
            evaluate: of the step.
            factor: the entry of the state by which a refresh is known to have been.
        """
        self.refresh_if_due(factor, evaluate)
        with self.timed("perturb"):  # made here to be timed; ``estimate`` then finds it
            self.planned(self.steps)
        directions, loss = self.estimate(evaluate, self.sampling)
        terms = [(d, self.descent(amount)) for d, amount in directions]
        # A refresh replaces the factors that deferred updates and next points depend on: nothing may wait past it.
        self.apply_update(terms, flush=self.refreshes_at(self.steps + 1))
        return loss


def _check_rank(value: Any) -> None:
    if at_least_one("rank", value) > ops.MAX_RANK:
        raise ValueError(f"rank: got {value}; accepted: 1 to {ops.MAX_RANK}, the most the kernels take")
