"""FZOO (2506.09034): one-sided steps along random signs, normalised by the spread of their losses."""

from __future__ import annotations

from typing import Any, ClassVar

from ..directions import Direction
from ..noise import Role
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import at_least_one


class FZOO(ZOOptimizer):
    """Fast zeroth-order steps.

        l_0 = L(W),   l_i = L(W + eps u_i),  u_i of random signs, i = 1..N
        W <- W - lr sum_i (l_i - l_0) u_i / (N std(l_1..l_N))

    The standard deviation is about |g| eps, so the expected step has the length lr whatever the gradient's; where it is
    0 there is no step. N + 1 forwards, or one with ``members=N + 1``; N + 1 weight passes in place. No state, and a bit
    of random numbers per element.

    The published code divides by the standard deviation of a population (``ddof=0``), the paper by that of a sample;
    the paper's lr is eps times the code's, which is meant here.

    Args:
        params, eps: as in ``MeZO``.
        lr: learning rate, on the scale of the published code.
        weight_decay: as in ``MeZO``; the method has no decay.
        probes: N, one-sided directions per step, 2 or more.
        ddof: the standard deviation of the losses divides by N - ddof: 0 or 1.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "FZOO"

    def __init__(
        self,
        params: Params,
        lr: float = 5e-5,
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        probes: int = 8,
        ddof: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.probes = at_least_one("probes", probes)
        if self.probes < 2:
            raise ValueError(f"probes: got {probes}; accepted: 2 or more, as their losses' spread is what counts")
        if ddof not in (0, 1):
            raise ValueError(f"ddof: got {ddof!r}; accepted: 0 (the published code) or 1 (the paper)")
        self.ddof = int(ddof)

    def direction(self, step: int, number: int = 0) -> Direction:
        return self.noise(self.key(Role.DENSE, number, step), distribution="rademacher")

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        tried = [self.direction(self.steps, number) for number in range(self.probes)]
        clean, *losses = evaluate.population([(Direction(), self.radius()), *((u, self.radius()) for u in tried)])
        shares = scores.standardised(losses, base=clean, ddof=self.ddof)
        rates = self.rates()
        self.apply_update([(u, [-lr * s / self.probes for lr in rates]) for u, s in zip(tried, shares, strict=True)])
        return sum(losses) / len(losses)
