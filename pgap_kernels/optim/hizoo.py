"""HiZOO (2402.15173): noise and update scaled by an estimated diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..directions import Direction, Noise, Part, Weight, bucket
from ..noise import Role
from ..perturbation import StateRule
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import fraction


class HiZOO(ZOOptimizer):
    """Hessian-informed zeroth-order steps.

        D = z / sqrt(H),   rho = (L(W + eps D) - L(W - eps D)) / (2 eps)
        H <- (1 - alpha) H + alpha |L(W + eps D) + L(W - eps D) - 2 L(W)| H z^2 / (2 eps^2)         H at first 1
        W <- (1 - lr wd) W - lr rho z / sqrt(H)                                                     with the new H

    3 forwards; 3 weight passes in place, which read H, the last of which writes it too. What is applied is reshaped:
    it is scaled by the new H, what was evaluated by the old. State: H, float32, of the weight's size.

    The published code keeps H in the weights' dtype, where with fp16 and its alpha of 1e-8 it never changes: then this
    is MeZO. Its decay reaches all tensors; here, as in other methods, those of two or more dimensions.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        alpha: weight of the newest curvature in H, per param group, from 0 to below 1; with the paper's 1e-8 common
            losses move H by only about 1e-5 of its value a step; from 1e-6 on the change matters.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "HiZOO"
    takes_residual: ClassVar[bool] = False
    elementwise_state: ClassVar[tuple[str, ...]] = ("curvature",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        alpha: float = 1e-6,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
        super().__init__(params, defaults, **options)
        self._bend = 0.0

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        fraction("alpha", group["alpha"])

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        # A part for each set of hyper-parameters: a pass has one rule.
        same = bucket(self.weights(), also=lambda w: (float(w.group["alpha"]), float(w.group["eps"])))
        key, radius = self.key(Role.DENSE), self.radius()
        probe = Direction([Noise(ws, {key: [1.0] * len(ws)}, curvature=self.state_of(ws)[0]) for ws in same])
        back = [-eps for eps in radius]
        clean, plus, minus = evaluate.population([(Direction(), radius), (probe, radius), (probe, back)])
        self._bend = abs(plus + minus - 2 * clean) / 2
        rho = [scores.spsa(plus, minus, eps) for eps in radius]
        evaluate.slopes.append(rho[0])
        rule = StateRule(self.rule_of, self.state_of, takes_off=over_its_root)
        self.apply_update([(self.noise(key, same), rho)], rule=rule)
        return (plus + minus) / 2

    def rule_of(self, weights: Sequence[Weight]) -> ops.HiZOORule:
        """The rule of this step for weights of one pass."""
        rates, first = self.rates(), weights[0]
        return ops.HiZOORule(
            lr=[rates[w.index] for w in weights],
            curvature=self._bend / self.radius()[first.index] ** 2,
            alpha=fraction("alpha", first.group["alpha"]),
        )

    def state_of(self, weights: Sequence[Weight]) -> list[list[Tensor]]:
        """H of weights."""
        for w in weights:
            if "curvature" not in self.state[w.tensor]:
                self.state[w.tensor]["curvature"] = torch.ones_like(w.tensor, dtype=torch.float32)
        return [[self.state[w.tensor]["curvature"] for w in weights]]


def over_its_root(before: Part, state: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the rule takes off a part: noise over the root of its state."""
    return before.draws_over(state[0]) is not None
