"""LOZO and LOZO-M (2410.07698): directions u v^T with a lazily sampled v, and momentum in the small factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..directions import Direction, Factor, LowRank, Term, Weight
from ..noise import Role
from ..perturbation import StateRule
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import fraction


class LOZO(LowRankOptimizer):
    """Low-rank zeroth-order steps, with momentum as LOZO-M.

    Each matrix moves along u v^T, u (m, r) new in every step and v (n, r) new in every ``window``-th:

        rho = (L(W + eps u v^T) - L(W - eps u v^T)) / (2 eps),   W <- (1 - lr wd) W - lr rho u v^T  [/ r]

    With ``beta`` (LOZO-M):  N <- beta N + (1 - beta) rho u, at first N = rho u;  W <- (1 - lr wd) W - lr N v^T  [/ r];
    when v changes, N <- N (v_old^T v_new) / n first. Everything that is not a matrix takes dense noise, with a dense
    momentum of the same rule. 2 forwards; 3 weight passes in place. State: v, and with ``beta`` N and m.

    The published code does not divide by r (``divide_by_rank=False``), applies another u than it evaluated in every
    step that changes v, and at window 1 never projects N; here what was evaluated is applied.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        rank: r, of a group.
        window: steps between new v.
        beta: decay rate of the momentum; None is LOZO without.
        divide_by_rank: as the paper's equation does, and its code does not.
        exclude: names of matrices that take dense noise instead.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "LOZO"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 2,
        window: int = 50,
        beta: float | None = None,
        divide_by_rank: bool = False,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=window, exclude=exclude, **options)
        self.beta = None if beta is None else fraction("beta", beta)
        self.divide_by_rank = bool(divide_by_rank)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self.refresh_if_due("right", evaluate)
        direction = self.planned(self.steps)
        plus, minus = evaluate.two_sided(direction)
        self._apply(direction, plus - minus, flush=self.refreshes_at(self.steps + 1))
        return (plus + minus) / 2

    def first_point(self, step: int) -> Direction:
        """u v^T on the matrices, dense noise on the rest."""
        key = self.key(Role.LEFT, step=step)
        parts = [part for ws in self.by_rank() for part in self._along(ws, Factor.drawn(key, self.rank_of(ws[0])))]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, step=step), self.others())])

    def _along(self, weights: list[Weight], left: Factor) -> Direction:
        return self.low_rank(weights, left, Factor.stored(self.stored(weights, "right")))

    def refresh(self, evaluate: Evaluation) -> None:
        """New v of every matrix; N goes on in its coordinates."""
        self.merge()  # what a window has gathered belongs to the old v
        for weights in self.by_rank():
            new = Factor.drawn(self.key(Role.RIGHT), self.rank_of(weights[0])).materialised(weights, 1)
            for w, v in zip(weights, new, strict=True):
                state = self.state[w.tensor]
                if "momentum" in state:
                    state["momentum"].copy_(state["momentum"] @ (state["right"].T @ v) / len(v))
                self.store(w, right=v)

    # ---- the update -------------------------------------------------------------------------------------------------

    def _apply(self, direction: Direction, difference: float, flush: bool) -> None:
        if self.beta is None:
            self.apply_update([(direction, self._shared(self.sgd(difference)))], flush=flush)
            return
        moved: list[tuple[Weight, Tensor]] = []
        parts: list[LowRank] = []
        for weights in self.by_rank():
            moments = self._moments(weights, difference)
            moved += zip(weights, moments, strict=True)
            right = Factor.stored(self.stored(weights, "right"))
            parts.append(LowRank(weights, Factor.stored(moments), right, [Term(None, [1.0] * len(weights))]))
        steps = self._shared([-lr for lr in self.rates()])
        dense = self.noise(self.key(Role.DENSE), self.others())
        rule = StateRule(self._rule_of, self._state_of, {w.index for w in self.others()})
        self.apply_update([(Direction(parts), steps), (dense, self._fresh(difference))], flush=flush, rule=rule)
        for w, moment in moved:
            self.store(w, momentum=moment)

    def _shared(self, amounts: list[float]) -> list[float]:
        """Amounts of the update, those of matrices divided by r if asked for."""
        if self.divide_by_rank:
            for w in self.matrices():
                amounts[w.index] /= self.rank_of(w)
        return amounts

    def _fresh(self, difference: float) -> list[float]:
        """What the step's own direction weighs in a moment: rho at first, then (1 - beta) rho."""
        assert self.beta is not None
        share = [1.0 - self.beta if "momentum" in self.state[w.tensor] else 1.0 for w in self.weights()]
        return [s * difference / (2 * eps) for s, eps in zip(share, self.radius(), strict=True)]

    def _moments(self, weights: list[Weight], difference: float) -> list[Tensor]:
        """N of matrices of one rank after this step."""
        fresh = self._fresh(difference)
        u = Factor.drawn(self.key(Role.LEFT), self.rank_of(weights[0])).materialised(weights, 0)
        moments = []
        for w, left in zip(weights, u, strict=True):
            before = self.state[w.tensor].get("momentum")
            new = left * fresh[w.index]
            moments.append(new if before is None else new.add_(before, alpha=self.beta))
        return moments

    def _rule_of(self, weights: Sequence[Weight]) -> ops.Momentum:
        rates = self.rates()
        assert self.beta is not None
        return ops.Momentum(lr=[rates[w.index] for w in weights], beta=self.beta)

    def _state_of(self, weights: Sequence[Weight]) -> list[list[Tensor]]:
        for w in weights:
            if "momentum" not in self.state[w.tensor]:
                self.state[w.tensor]["momentum"] = torch.zeros_like(w.tensor, dtype=torch.float32)
        return [self.stored(weights, "momentum")]
