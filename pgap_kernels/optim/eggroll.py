"""EGGROLL (2511.16652): evolution strategies whose members are low-rank perturbations, many in one forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from .. import checks
from ..directions import Direction, product_of_draws
from ..noise import Role
from . import scores
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import at_least_one

UPDATES = ("jax", "llm")
_VARIANCE_FLOOR = 1e-5


class EGGROLL(LowRankOptimizer):
    """Evolution strategies with low-rank members.

    N members, in pairs of either sign unless ``antithetic=False``, F = -L:

        E_k = A_k B_k^T / sqrt(p),  A (m, p) and B (n, p) ~ N(0, 1),  F_i = -L(W + sigma s_i E_i)
        update="jax":  f = (F - mean F) / sqrt(var F + 1e-5),  W <- W + lr sqrt(N) sigma mean_i(f_i s_i E_i)
        update="llm":  f = F - mean F  [/ std F],              W <- W + lr mean_i(f_i s_i E_i)  [* sqrt(N)]

    The two official scales, of HyperscaleES (JAX) and of its transformer experiments. N forwards, or one with
    ``members=N``; 2N - 1 weight passes in place; no state: factors are drawn in the forward. Outside the mode inplace
    the update has the factors of all E_k side by side, up to the rank that a pass takes: one pass until they are more
    than 512 or a matrix's shorter side, then one more for each time as many. For that they are drawn, which takes up to
    (m + n) N p / 2 floats of every matrix.

    The transformer code adds its update to bfloat16 weights to nearest, which loses most of it; here it rounds
    stochastically. It leaves tensors that are not matrices alone: freeze them. The JAX code perturbs them densely,
    unless told not to, and so does this.

    Args:
        params, lr, weight_decay: as in ``MeZO``; the method has no decay.
        eps: smoothing radius (the paper's sigma), per param group.
        population: N, members of a step: 2 or more, an even number if antithetic.
        rank: p, of a member's perturbation, per param group.
        update: scale of the update: of the official "jax" code, or of its "llm" code.
        antithetic: members come in pairs, one at +eps and one at -eps.
        normalise: divide by the standard deviation of the fitness with update="llm" (``normalize_with_std``).
        scale_by_root: multiply by sqrt(N) with update="llm" (``scale_lr_in_grad``).
        noise_reuse: steps that share their members' noise; 0 never draws anew.
        exclude: names of matrices that take dense noise instead.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "EGGROLL"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        population: int = 8,
        rank: int = 1,
        update: str = "llm",
        antithetic: bool = True,
        normalise: bool = False,
        scale_by_root: bool = False,
        noise_reuse: int = 1,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=1, exclude=exclude, **options)
        self.population, self.antithetic = at_least_one("population", population), bool(antithetic)
        if self.population < 2 or (self.antithetic and self.population % 2):
            raise ValueError(f"population: got {population}; accepted: 2 or more, an even number with pairs")
        self.update = checks.choice("update", update, UPDATES)
        self.normalise, self.scale_by_root = bool(normalise), bool(scale_by_root)
        for name in ("normalise", "scale_by_root"):
            if getattr(self, name) and update != "llm":
                raise ValueError(f"{name}: got True with update={update!r}; accepted: with update='llm'")
        self.noise_reuse = 0 if noise_reuse == 0 else at_least_one("noise_reuse", noise_reuse)

    def direction(self, step: int, number: int = 0) -> Direction:
        """E_k on the matrices, dense noise on the rest."""
        step = step // self.noise_reuse * self.noise_reuse if self.noise_reuse else 0
        left, right, dense = (self.key(role, number, step) for role in (Role.LEFT, Role.RIGHT, Role.DENSE))
        parts = [product_of_draws(ws, left, right, self.rank_of(ws[0])) for ws in self.by_rank()]
        return Direction([*parts, *self.noise(dense, self.dense_buckets())])

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        N, signs = self.population, (1.0, -1.0) if self.antithetic else (1.0,)
        E = [self.planned(self.steps), *(self.direction(self.steps, k) for k in range(1, N // len(signs)))]
        radius = self.radius()
        points = [(d, [sign * sigma for sigma in radius]) for d in E for sign in signs]
        losses = evaluate.population(points)
        f = self.fitness(losses)
        amounts = [
            sum(s * v for s, v in zip(signs, f[i : i + len(signs)], strict=True)) for i in range(0, N, len(signs))
        ]
        rates = self.rates()
        if self.update == "jax":
            rates = [lr * math.sqrt(N) * sigma for lr, sigma in zip(rates, radius, strict=True)]
        elif self.scale_by_root:
            rates = [lr * math.sqrt(N) for lr in rates]
        terms = [(d, [lr * a / N for lr in rates]) for d, a in zip(E, amounts, strict=True)]
        self.apply_update(terms, flush=True)  # the next members have other factors: there is nothing to gather
        return sum(losses) / N

    def fitness(self, losses: Sequence[float]) -> list[float]:
        """f of the members; fitness is maximised."""
        if self.update == "jax":
            return [-v for v in scores.standardised(losses, floor=_VARIANCE_FLOOR)]
        return [-v for v in (scores.standardised if self.normalise else scores.centred)(losses)]
