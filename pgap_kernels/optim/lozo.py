"""LOZO (2410.07698): directions u v^T of small rank, with a lazily sampled v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..directions import Direction, Factor, Weight
from ..noise import Role
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .sampling import Sampling


class LOZO(LowRankOptimizer):
    """Low-rank zeroth-order steps.

    Each matrix moves along u v^T, u (m, r) new in every step and v (n, r) new in every ``window``-th; everything
    that is not a matrix takes dense noise.

        rho = (L(W + eps u v^T) - L(W - eps u v^T)) / (2 eps),   W <- (1 - lr wd) W - lr rho u v^T  [/ r]

    2n forwards for n directions; 2n + 1 weight passes in place, 1/window folded with a window. State: v, n r floats of
    a matrix.

    The published code does not divide by r (``divide_by_rank=False``), and applies another u than it evaluated in every
    step that changes v; here what was evaluated is applied.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        rank: r, of the perturbation, per param group.
        window: steps between new v.
        divide_by_rank: divide the update by r, as the paper's equation does and its code does not.
        exclude: names of matrices that take dense noise instead.
        directions: n fresh u per step (and group of examples).
        baseline: as in ``MeZO``.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "LOZO"
    plans_ahead: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 2,
        window: int = 50,
        divide_by_rank: bool = False,
        exclude: Sequence[str] = (),
        directions: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=window, exclude=exclude, **options)
        self.divide_by_rank = bool(divide_by_rank)
        self.sampling = Sampling.checked(directions, self.groups, self.members, baseline)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self.refresh_if_due("right", evaluate)
        directions, loss = self.estimate(evaluate, self.sampling)
        self.update_along(directions, flush=self.refreshes_at(self.steps + 1))
        return loss

    def update_along(self, directions: Sequence[tuple[Direction, float]], flush: bool) -> None:
        """The update by the directions that were evaluated, with their amounts."""
        terms = [(d, self.divided_by_rank(self.descent(amount))) for d, amount in directions]
        self.apply_update(terms, flush=flush)

    def direction(self, step: int, number: int = 0) -> Direction:
        """u v^T on the matrices, dense noise on the rest."""
        lists = self.by_rank()
        parts = [part for ws in lists for part in self.low_rank(ws, self.left(ws, step, number), self.right(ws))]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def left(self, weights: Sequence[Weight], step: int, number: int = 0) -> Factor:
        """u of matrices of one rank."""
        return Factor.drawn(self.key(Role.LEFT, number, step), self.rank_of(weights[0]))

    def right(self, weights: Sequence[Weight]) -> Factor:
        """v of matrices of one rank."""
        return Factor.stored(self.stored(weights, "right"))

    def refresh(self, evaluate: Evaluation) -> None:
        """New v of every matrix."""
        self.merge()  # what a window has gathered belongs to the old v
        for weights in self.by_rank():
            drawn = Factor.drawn(self.key(Role.RIGHT), self.rank_of(weights[0]))
            for w, v in zip(weights, drawn.materialised(weights, 1), strict=True):
                self.replace_right(w, v)

    def replace_right(self, weight: Weight, v: Tensor) -> None:
        """Keep a matrix's new v."""
        self.store(weight, right=v)

    def divided_by_rank(self, amounts: list[float]) -> list[float]:
        """Amounts of an update, those of matrices divided by r where the paper's form was asked for."""
        for w in self.matrices() if self.divide_by_rank else ():
            amounts[w.index] /= self.rank_of(w)
        return amounts
