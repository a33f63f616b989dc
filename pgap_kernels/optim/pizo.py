"""PIZO, or MeZO-GV and MeZO-Greedy (2601.04710): a two-sided step along a combination of directions that losses chose.

Of dense noise (`PIZO`), or in SubZero's subspaces (`PIZOSubZero`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from .. import checks, noise
from ..directions import Direction
from ..noise import Role
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import number
from .sampling import Sampling
from .subzero import SubZero

Tried = tuple[int, int]  # the step and the number of a direction


class Guide(NamedTuple):
    """How a pool of directions makes the one of a step; see ``PIZO``.

    Attributes:
        top: how many of the pool count as best.
    """

    pool: int
    top: int
    guide: str
    history: bool
    normalise_v: bool

    @classmethod
    def checked(cls, pool: int, alpha: float, guide: str, history: bool, normalise_v: bool) -> Guide:
        """The guide that these options of an optimizer ask for.

        Raises:
            ValueError: naming the option.
        """
        checks.choice("guide", guide, ("gv", "greedy"))
        top = math.floor(number("alpha", alpha) * noise.check_uint("pool", pool, 16))
        if not 1 <= top < pool:
            raise ValueError(
                f"alpha, pool: got {alpha} and {pool}, floor(alpha * pool) = {top} best; accepted: 1 or more, and "
                "fewer than the pool"
            )
        return cls(pool, top, guide, bool(history), bool(normalise_v))

    def step(
        self, optimizer: ZOOptimizer, evaluate: Evaluation, best: Tried | None
    ) -> tuple[float, float, Direction, Tried]:
        """The pool is tried, and v two-sided; returns both losses of v, v and the best of the pool.

        Args:
            best: of the step before, for ``history``.
        """
        tried: list[Tried] = [(optimizer.steps, n) for n in range(self.pool)]
        if self.history and best is not None:
            tried = [best, *tried[:-1]]
        pool = [optimizer.direction(*each) for each in tried]
        losses = evaluate.population([(d, optimizer.radius()) for d in pool])
        weights = scores.best_only(losses) if self.guide == "greedy" else scores.top_minus_rest(losses, self.top)
        if self.normalise_v:
            weights = [c / math.sqrt(sum(w * w for w in weights)) for c in weights]
        every = len(optimizer.weights())
        v = Direction.sum([(d, [c] * every) for d, c in zip(pool, weights, strict=True) if c])
        plus, minus = evaluate.two_sided(v)
        return plus, minus, v, tried[losses.index(min(losses))]


class PIZO(ZOOptimizer):
    """Prior-informed zeroth-order steps.

    A pool of M noises is tried one-sided, F_i = L(W + eps z_i), and n_top = floor(alpha M) of them are the best:

        guide="gv":      v = mean of the n_top best z_i - mean of the others           guide="greedy":  v = the best z_i
        g = (L(W + eps v) - L(W - eps v)) / (2 eps),   W <- (1 - lr wd) W - lr g v

    Ties go to the lower index. v is a vector like any other: it is never stored. M + 2 forwards; M + 3 weight passes in
    place. State: none; one key with ``history``.

    The published code (stan-anony/MeZO-GV) runs ``history=True`` with M = 2, and draws v from other streams than the
    noises that it evaluated; here v is what was evaluated.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        pool: M, directions that are tried in a step, 2 or more.
        alpha: share of the pool that counts as best; 1 <= floor(alpha M) < M.
        guide: the step goes along the mean of the best of the pool minus that of the rest ("gv"), or along the best
            alone ("greedy").
        history: the pool is the best noise of the step before, tried anew on this batch, and M - 1 new ones.
        normalise_v: divide v by its standard deviation per element, so that eps and lr mean what they mean in MeZO;
            the paper does not.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "PIZO"
    saved_attributes: ClassVar[dict[str, Any]] = {"best": None}

    def __init__(
        self,
        params: Params,
        lr: float = 2e-7,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        pool: int = 4,
        alpha: float = 0.5,
        guide: str = "gv",
        history: bool = False,
        normalise_v: bool = False,
        **options: Any,
    ) -> None:
        self.best: Tried | None
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.guide = Guide.checked(pool, alpha, guide, history, normalise_v)

    def direction(self, step: int, number: int = 0) -> Direction:
        return self.noise(self.key(Role.DENSE, number, step))

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        plus, minus, v, best = self.guide.step(self, evaluate, self.best)
        self.apply_update([(v, self.descent((plus - minus) / 2))])
        self.best = best if self.guide.history else None
        return (plus + minus) / 2


class PIZOSubZero(SubZero):
    """PIZO in SubZero's subspaces: the pool consists of D_i = sqrt(m n)/r U Z_i V^T, which v combines.

    v is of the same rank, with the cores' combination for its core: M + 2 forwards; M + 3 weight passes in place, none
    in mode folded with a window. State: U and V, (m + n) r floats of a matrix. With ``history`` the best core is tried
    again, in the current subspace.

    Args:
        params, lr, eps, weight_decay, rank, window, scale, reshape, exclude: as in ``SubZero``.
        pool, alpha, guide, history, normalise_v: as in ``PIZO``.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "PIZOSubZero"
    plans_ahead: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False
    saved_attributes: ClassVar[dict[str, Any]] = {**SubZero.saved_attributes, "best": None}

    def __init__(
        self,
        params: Params,
        lr: float = 2e-7,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 64,
        window: int = 1000,
        scale: str = "subzero",
        reshape: Sequence[str] = (),
        exclude: Sequence[str] = (),
        pool: int = 4,
        alpha: float = 0.5,
        guide: str = "gv",
        history: bool = False,
        normalise_v: bool = False,
        **options: Any,
    ) -> None:
        self.best: Tried | None
        super().__init__(
            params,
            lr,
            eps,
            weight_decay,
            rank=rank,
            window=window,
            scale=scale,
            reshape=reshape,
            exclude=exclude,
            **options,
        )
        self.guide = Guide.checked(pool, alpha, guide, history, normalise_v)

    def sampling_of(self, directions: int, baseline: str) -> Sampling:
        if (directions, baseline) != (1, "antithetic"):
            raise ValueError(
                f"directions, baseline: got {directions!r} and {baseline!r}; accepted: 1 and 'antithetic' with "
                "PIZOSubZero, whose pool is what it samples"
            )
        return Sampling(1, 1, baseline)  # members are of the pool: any number

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self.refresh_if_due("left", evaluate)
        plus, minus, v, best = self.guide.step(self, evaluate, self.best)
        self.apply_update([(v, self.descent((plus - minus) / 2))], flush=self.refreshes_at(self.steps + 1))
        self.best = best if self.guide.history else None
        return (plus + minus) / 2
