"""ZO-AdaMU (2312.15184): noise around the momentum, and a step divided by what the noise says of its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..directions import Blend, Direction, Part, Weight
from ..noise import Role
from ..perturbation import StateRule
from .base import Evaluation, Params, ZOOptimizer
from .options import at_least_one, positive

FINALS = ("text", "freeze")
_LAST = (0.5, 0.9, 0.01)  # alpha, beta1, beta2 of the last phase, as the text has them
_PACE = (1.0, 0.1, 1.5)  # of their annealing


class ZOAdaMU(ZOOptimizer):
    """Adaptive momentum with uncertainty.

        p = sqrt(alpha) n1,   q = h + sqrt(1 - alpha) n2,   n1, n2 ~ N(0, 1);   h = 0 at first
        m = beta1 p + (1 - beta1) q,   v = beta2 p^2 + (1 - beta2) q^2
        rho = (L(W + eps m) - L(W - eps m)) / (2 eps)
        W <- (1 - lr wd) W - lr rho m / sqrt(v + e),   h <- sign(rho) m

    alpha, beta1 and beta2 are 1 for the first steps, where m and the noise are the same and a step goes along the
    noise's sign; they fall along cosines of their own until 0.8 of ``total_steps``. What is applied is what was
    evaluated, divided by the root of v. 2 forwards; 3 weight passes in place, which read h, the last of which writes
    it too. State: h, float32, of the weight's size.

    The published code stops with a TypeError; this is the paper's Algorithm 1, with the code's sign of rho in h,
    without which (the paper has h <- m) h may point uphill. Of the last phase text and equation say different things:
    ``final``.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        warmup_steps: steps at the beginning with alpha, beta1 and beta2 at 1.
        total_steps: steps of the run, more than 1.25 times ``warmup_steps``.
        final: alpha, beta1 and beta2 in the last phase: "text": 0.5, 0.9 and 0.01, as in the paper's text; "freeze":
            those reached when it begins, as in the published code.
        e: added to the denominator, which keeps it away from 0.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "ZOAdaMU"
    takes_residual: ClassVar[bool] = False
    elementwise_state: ClassVar[tuple[str, ...]] = ("history",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 1024,
        total_steps: int = 20000,
        final: str = "text",
        e: float = 1e-8,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.warmup_steps, self.total_steps = at_least_one("warmup_steps", warmup_steps), int(total_steps)
        if not self.warmup_steps < 0.8 * at_least_one("total_steps", total_steps):
            raise ValueError(
                f"total_steps: got {total_steps} with warmup_steps={warmup_steps}; accepted: more than 1.25 times that"
            )
        self.final, self.e = checks.choice("final", final, FINALS), positive("e", e)
        self._rho = 0.0

    def annealed(self, step: int) -> tuple[float, float, float]:
        """alpha, beta1 and beta2 of a step."""
        first, last = self.warmup_steps, 0.8 * self.total_steps
        if step >= last and self.final == "text":
            return _LAST
        alpha, beta1, beta2 = (anneal(min(step, last), first, last, self.total_steps, pace) for pace in _PACE)
        return alpha, beta1, beta2

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        alpha, beta1, _ = self.annealed(self.steps)
        keys = [self.key(Role.DENSE, number) for number in (0, 1)]
        shares = dict(zip(keys, (math.sqrt(alpha), math.sqrt(1 - alpha)), strict=True))
        blended = dict(zip(keys, (beta1 * shares[keys[0]], (1 - beta1) * shares[keys[1]]), strict=True))
        parts: list[Part] = []
        for weights in self.buckets():
            parts.append(Blend(weights, blended, self.state_of(weights)[0], 1 - beta1, [1.0] * len(weights)))
        plus, minus = evaluate.two_sided(Direction(parts))
        self._rho = (plus - minus) / 2
        draws = Direction.sum([(self.noise(key), [share] * len(self.weights())) for key, share in shares.items()])
        self.apply_update(
            [(draws, [1.0] * len(self.weights()))], rule=StateRule(self.rule_of, self.state_of, takes_off=around_it)
        )
        return (plus + minus) / 2

    def rule_of(self, weights: Sequence[Weight]) -> ops.AdaMURule:
        """The rule of this step for weights of one pass."""
        _, beta1, beta2 = self.annealed(self.steps)
        rates, radius = self.rates(), self.radius()
        steps = [rates[w.index] * self._rho / radius[w.index] for w in weights]
        sign = math.copysign(1.0, self._rho) if self._rho else 0.0
        return ops.AdaMURule(steps, sign, beta1, beta2, eps=self.e)

    def state_of(self, weights: Sequence[Weight]) -> list[list[Tensor]]:
        """h of weights."""
        for w in weights:
            if "history" not in self.state[w.tensor]:
                self.state[w.tensor]["history"] = torch.zeros_like(w.tensor, dtype=torch.float32)
        return [[self.state[w.tensor]["history"] for w in weights]]


def around_it(before: Part, state: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the rule takes off a part: draws around its state."""
    return isinstance(before, Blend) and list(map(id, before.stored)) == list(map(id, state[0]))


def anneal(step: float, first: int, last: float, total: int, pace: float) -> float:
    """1 until the first phase ends, then half a cosine, of which ``pace`` stretches the time."""
    if step < first:
        return 1.0
    gone = step - first
    return 0.5 * (1 + math.cos(math.pi * gone / (total - pace * gone * (total - last) / (last - first))))
