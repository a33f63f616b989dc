"""LOZO-M (2410.07698): LOZO with a momentum that lives in the small factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..directions import Direction, Factor, LowRank, Term, Weight, bucket
from ..noise import Role
from ..perturbation import StateRule
from .base import Params
from .lozo import LOZO
from .options import fraction
from .sampling import Sampling


class LOZOM(LOZO):
    """Low-rank zeroth-order steps with momentum.

    Directions and rho are those of ``LOZO``; the update goes along a moment N (m, r) of u:

        N <- beta N + (1 - beta) rho u, at first N = rho u;   W <- (1 - lr wd) W - lr N v^T  [/ r]
        where v changes:  N <- N (v_old^T v_new) / n  before that

    Everything that is not a matrix takes dense noise, with a dense moment of the same rule. State: v and N, (m + n) r
    floats of a matrix; a moment of the size of other weights, all float32. Where ``window`` is 1 the published code
    starts N anew in every step; here it is projected.

    Args:
        params, lr, eps, weight_decay, **options: as in ``LOZO``.
        beta: decay rate of the moments, per param group.
    """

    method: ClassVar[str] = "LOZOM"
    takes_residual: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False

    def __init__(self, params: Params, lr: float = 1e-6, *args: Any, beta: float = 0.9, **options: Any) -> None:
        self._default_beta = beta
        super().__init__(params, lr, *args, **options)
        if self.sampling != Sampling(1, 1, "antithetic"):
            raise ValueError(
                f"directions, baseline: got {self.sampling.directions} and {self.sampling.baseline!r}; accepted: 1 and "
                "'antithetic' with LOZOM, whose moment follows one direction a step"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        fraction("beta", group.setdefault("beta", self._default_beta))

    def update_along(self, directions: Sequence[tuple[Direction, float]], flush: bool) -> None:
        ((_, amount),) = directions
        fresh = self._fresh(amount)
        moved: list[tuple[Weight, Tensor]] = []
        parts: list[LowRank] = []
        for weights in self.by_rank():
            moments = self._moments(weights, fresh)
            moved += zip(weights, moments, strict=True)
            one = Term(None, [1.0] * len(weights))
            parts.append(LowRank(weights, Factor.stored(moments), self.right(weights), [one]))
        others = bucket(
            [w for same in self.dense_buckets() for w in same], also=lambda w: w.group["beta"]
        )  # a rule has one
        terms = [
            (Direction(parts), self.divided_by_rank([-lr for lr in self.rates()])),
            (self.noise(self.key(Role.DENSE), others), fresh),
        ]
        dense = {w.index: self.moment(w) for same in others for w in same}
        rule = StateRule(self._rule_of, lambda weights: [[dense[w.index] for w in weights]], dense)
        self.apply_update(terms, flush=flush, rule=rule)
        # Only now, as a first step is known by the moment that is not there: a failed one leaves none behind.
        for w, moment in moved:
            self.store(w, momentum=moment)
        for w in (w for same in others for w in same):
            self.state[w.tensor].setdefault("momentum", dense[w.index])

    def _fresh(self, amount: float) -> list[float]:
        """The share of a step's own direction in each moment: rho at first, then (1 - beta) rho."""
        share = [1.0 - beta for beta in self.amounts("beta")]
        share = [s if "momentum" in self.state[w.tensor] else 1.0 for w, s in zip(self.weights(), share, strict=True)]
        return [s * amount / eps for s, eps in zip(share, self.radius(), strict=True)]

    def _moments(self, weights: list[Weight], fresh: list[float]) -> list[Tensor]:
        """N of matrices of one rank after this step."""
        moments, betas = [], self.amounts("beta")
        for w, u in zip(weights, self.left(weights, self.steps).materialised(weights, 0), strict=True):
            before = self.state[w.tensor].get("momentum")
            new = u * fresh[w.index]
            moments.append(new if before is None else new.add_(before, alpha=betas[w.index]))
        return moments

    def replace_right(self, weight: Weight, v: Tensor) -> None:
        state = self.state[weight.tensor]
        if "momentum" in state:
            self.store(weight, momentum=state["momentum"] @ (state["right"].T @ v) / len(v))
        super().replace_right(weight, v)

    def _rule_of(self, weights: Sequence[Weight]) -> ops.MomentumRule:
        rates = self.rates()
        return ops.MomentumRule(lr=[rates[w.index] for w in weights], beta=fraction("beta", weights[0].group["beta"]))
