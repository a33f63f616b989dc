"""PIZO, or MeZO-GV and MeZO-Greedy (2601.04710): a two-sided step along a combination of noises that losses chose."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .. import checks, noise
from ..directions import Direction
from ..noise import Role
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import number


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
        pool: M, 2 or more.
        alpha: share of the pool that counts as best; 1 <= floor(alpha M) < M.
        guide: "gv" or "greedy".
        history: the pool is the best noise of the step before, tried anew on this batch, and M - 1 new ones.
        normalise_v: divide v by its standard deviation per element, so that eps and lr mean what they mean in MeZO;
            the paper does not.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "PIZO"
    saved_attributes: ClassVar[dict[str, Any]] = {"best_key": None}

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
        self.best_key: int | None
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.guide = checks.choice("guide", guide, ("gv", "greedy"))
        self.top = math.floor(number("alpha", alpha) * noise.check_uint("pool", pool, 16))
        if not 1 <= self.top < pool:
            raise ValueError(
                f"alpha, pool: got {alpha} and {pool}, floor(alpha * pool) = {self.top} best; accepted: 1 or more, and "
                "fewer than the pool"
            )
        self.pool, self.history, self.normalise_v = pool, bool(history), bool(normalise_v)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        keys = [self.key(Role.DENSE, probe) for probe in range(self.pool)]
        if self.history and self.best_key is not None:
            keys = [self.best_key, *keys[:-1]]
        pool = [self.noise(key) for key in keys]
        losses = evaluate.population([(z, self.radius()) for z in pool])
        weights = scores.best_only(losses) if self.guide == "greedy" else scores.top_minus_rest(losses, self.top)
        if self.normalise_v:
            weights = [c / math.sqrt(sum(w * w for w in weights)) for c in weights]
        every = len(self.weights())
        v = Direction.sum([(z, [c] * every) for z, c in zip(pool, weights, strict=True) if c])
        plus, minus = evaluate.two_sided(v)
        self.apply_update([(v, self.descent((plus - minus) / 2))])
        self.best_key = keys[losses.index(min(losses))] if self.history else None
        return (plus + minus) / 2
