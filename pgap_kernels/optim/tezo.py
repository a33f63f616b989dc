"""TeZO (2501.19057): factors drawn once, and a diagonal core in every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..directions import Direction, Factor, LowRank, Part, Quotient, Ratio, Term, Weight
from ..noise import Role
from . import scores
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import fraction, positive

RULES = ("sgd", "momentum", "adam")


class TeZO(LowRankOptimizer):
    """Temporal low-rank zeroth-order steps.

        D = U diag(tau) V^T / sqrt(r),   U (m, r) and V (n, r) ~ N(0, 1) once,  tau ~ N(0, 1)^r in every step
        rho = (L(W + eps D) - L(W - eps D)) / (2 eps)
        rule="sgd":       W <- (1 - lr wd) W - lr rho D
        rule="momentum":  m <- beta m + (1 - beta) rho tau,   W <- (1 - lr wd) W - lr U diag(m) V^T / sqrt(r)
        rule="adam":      v <- beta2 v + (1 - beta2) rho^2 tau^2,   W <- (1 - lr wd) W
                          - lr (U diag(m) V^T / sqrt(r)) / sqrt((U U) diag(v) (V V)^T / r + e), element by element

    Everything that is not a matrix takes dense noise, and a step of MeZO along it, under every rule: no moments, and
    the same ``lr`` (freeze such tensors where that is the rate of "adam"). 2 forwards; 3 weight passes in place, none
    in mode folded with a window; with "adam" 4 in place, as restoring and updating cannot share a pass. State: U and V,
    (m + n) r floats of a matrix, and r of each moment.

    The paper has no public code; its scale and whether its moments are corrected are not known. 1/sqrt(r) gives D the
    norm of dense noise; ``scale="paper"`` leaves it out. Its choice of a rank for each layer is not here.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        rank: r, of the perturbation, per param group.
        rule: "sgd", "momentum" (TeZO-m) or "adam" (TeZO-Adam).
        beta: decay rate of the first moment m.
        beta2: decay rate of the second moment v.
        e: added to the denominator, which keeps it away from 0.
        scale: "norm": 1/sqrt(r), the norm of dense noise; "paper": 1.
        exclude: names of matrices that take dense noise instead.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "TeZO"
    plans_ahead: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 32,
        rule: str = "sgd",
        beta: float = 0.9,
        beta2: float = 0.999,
        e: float = 1e-8,
        scale: str = "norm",
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=1, exclude=exclude, **options)
        self.rule = checks.choice("rule", rule, RULES)
        self.beta, self.beta2, self.e = fraction("beta", beta), fraction("beta2", beta2), positive("e", e)
        if self.rule == "adam" and self.residual:
            raise ValueError("residual: got True with rule='adam'; accepted: False, as its update is no direction")
        self.scale = checks.choice("scale", scale, ("norm", "paper"))

    def scale_of(self, weight: Weight) -> float:
        return 1.0 / math.sqrt(self.rank_of(weight)) if self.scale == "norm" else 1.0

    def refreshes_at(self, step: int) -> bool:
        return step == 0

    def refresh_is_due(self, name: str) -> bool:
        return any(self.lacks(w, name) for w in self.matrices())

    def refresh(self, evaluate: Evaluation) -> None:
        """U and V of the matrices that have none of their rank: they are drawn once, whatever the step."""
        self.merge()
        for weights in self.by_rank():
            missing = [w for w in weights if self.lacks(w, "left")]
            if not missing:
                continue
            for w in missing:  # moments are along the factors
                for name in ("momentum", "second_moment"):
                    self.state[w.tensor].pop(name, None)
            rank = self.rank_of(weights[0])
            for side, (name, role) in enumerate((("left", Role.LEFT), ("right", Role.RIGHT))):
                factor = Factor.drawn(self.key(role, step=0), rank)
                for w, tensor in zip(missing, factor.materialised(missing, side), strict=True):
                    self.store(w, **{name: tensor})

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self.refresh_if_due("left", evaluate)
        direction = self.planned(self.steps)
        plus, minus = evaluate.two_sided(direction)
        if self.rule == "sgd":
            self.apply_update([(direction, self.descent((plus - minus) / 2))])
        else:
            self._step_with_momentum(plus, minus)
        return (plus + minus) / 2

    def direction(self, step: int, number: int = 0) -> Direction:
        """U diag(tau) V^T on the matrices, dense noise on the rest."""
        parts = [self._along(ws, self._tau(ws, step), [self.scale_of(w) for w in ws]) for ws in self.by_rank()]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def _tau(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        rank, key = self.rank_of(weights[0]), self.key(Role.DIAGONAL_CORE, step=step)
        return [ops.draw((rank,), key, w.id, device=w.tensor.device) for w in weights]

    def _along(self, weights: Sequence[Weight], cores: Sequence[Tensor], row: Sequence[float]) -> LowRank:
        left, right = (Factor.stored(self.stored(weights, side)) for side in ("left", "right"))
        return LowRank(weights, left, right, [Term(list(cores), list(row))])

    def _step_with_momentum(self, plus: float, minus: float) -> None:
        """By the moments along the factors; the rest moves along its noise."""
        radius = self.radius()
        moments: dict[Weight, dict[str, Tensor]] = {}
        parts: list[Part] = []
        for weights in self.by_rank():
            for w, tau in zip(weights, self._tau(weights, self.steps), strict=True):
                rho = scores.spsa(plus, minus, radius[w.index])
                moments[w] = {"momentum": self._averaged(w, "momentum", rho * tau, self.beta)}
                if self.rule == "adam":
                    moments[w]["second_moment"] = self._averaged(w, "second_moment", (rho * tau) ** 2, self.beta2)
            parts += self._moved(weights, moments)
        dense = self.noise(self.key(Role.DENSE), self.dense_buckets())
        step = [(Direction(parts), [-lr for lr in self.rates()]), (dense, self.descent((plus - minus) / 2))]
        self.apply_update(step)
        for w, own in moments.items():  # only now: a step that failed leaves none behind
            self.store(w, **own)

    def _averaged(self, weight: Weight, name: str, value: Tensor, beta: float) -> Tensor:
        before = self.state[weight.tensor].get(name)
        return (1 - beta) * value if before is None else torch.add((1 - beta) * value, before, alpha=beta)

    def _moved(self, weights: Sequence[Weight], moments: Mapping[Weight, Mapping[str, Tensor]]) -> list[Part]:
        """What -lr multiplies, on matrices of one rank."""
        if self.rule == "momentum":
            first = [moments[w]["momentum"] for w in weights]
            return [self._along(weights, first, [self.scale_of(w) for w in weights])]
        ratios = []
        for w in weights:
            state, own, scale = self.state[w.tensor], moments[w], self.scale_of(w)
            below = own["second_moment"] * scale**2
            ratios.append(Ratio(state["left"], state["right"], own["momentum"] * scale, below))
        return [Quotient(weights, ratios, self.e, [1.0] * len(weights))]
