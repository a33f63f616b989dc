"""HELENE (2411.10696): annealed momentum over a diagonal curvature with a floor for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..directions import Weight, bucket
from ..noise import Role
from ..perturbation import StateRule
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import at_least_one, fraction, patterns, positive


class HELENE(ZOOptimizer):
    """SPSA with annealed momentum, divided by a clipped curvature estimate.

        g = rho z,   a_t = beta1 + (1 - beta1) exp(-t / T),   m <- beta1 m + a_t g        (no bias correction, a_0 = 1)
        every k steps, the first included:  h <- beta2 h + (1 - beta2) B g^2
        W <- (1 - lr wd) W - lr m / (gamma max(h, floor) + e)

    2 forwards, 3 weight passes in place, the last of which reads and writes the state too. State: m and h, float32,
    each of the weight's size.

    No code is public. The equations are second-hand, and two points are inferred: ``h`` before the first refresh, and
    the estimate of the curvature, which is Sophia's Gauss-Newton-Bartlett form B g^2 with the minibatch estimate g.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        beta1: decay rate of the momentum m, per param group.
        beta2: decay rate of the curvature h, per param group.
        gamma: factor of the curvature in the denominator, per param group.
        floor: the least that the curvature counts as in the denominator, per param group. h starts at
            about (1 - beta2) B rho^2, so a small floor leaves steps that hardly grow with the slope: with the default,
            which is ours, SmolLM2 learnt nothing, with 100 it did (docs/finetune.md).
        floors: floors by name pattern, which take precedence over ``floor``: "layer-wise clipping".
        e: added to the denominator, which keeps it away from 0.
        anneal_steps: T, time constant, in steps, of the annealing of the newest gradient's weight.
        refresh_every: k, steps between estimates of the curvature.
        batch_size: B, examples in the closure's minibatch.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "HELENE"
    takes_residual: ClassVar[bool] = False
    elementwise_state: ClassVar[tuple[str, ...]] = ("momentum", "curvature")
    saved_attributes: ClassVar[dict[str, Any]] = {"refreshed_at": None}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        batch_size: int,
        beta1: float = 0.9,
        beta2: float = 0.99,
        gamma: float = 1.0,
        floor: float = 1.0,
        floors: Mapping[str, float] | None = None,
        e: float = 1e-8,
        anneal_steps: float = 1000.0,
        refresh_every: int = 10,
        **options: Any,
    ) -> None:
        self.refreshed_at: int | None
        given = {"beta1": beta1, "beta2": beta2, "gamma": gamma, "floor": floor}
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, **given}, **options)
        self.floors = {p: positive(f"floors[{p!r}]", v) for p, v in (floors or {}).items()}
        patterns("floors", list(self.floors), [name for w in self.weights() for name in w.names])
        self.e, self.anneal_steps = positive("e", e), positive("anneal_steps", anneal_steps)
        self.refresh_every = self.period = at_least_one("refresh_every", refresh_every)
        self.batch_size = at_least_one("batch_size", batch_size)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        for name in ("beta1", "beta2"):
            fraction(name, group[name])
        for name in ("gamma", "floor"):
            positive(name, group[name])

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        # A part for each set of hyper-parameters: a pass has one rule.
        same = bucket(self.weights(), also=lambda w: tuple(w.group[name] for name in ("beta1", "beta2", "gamma")))
        z = self.noise(self.key(Role.DENSE), same)
        plus, minus = evaluate.two_sided(z)
        rho = [scores.spsa(plus, minus, eps) for eps in self.radius()]
        evaluate.refreshed = self._refreshes()
        self.apply_update([(z, rho)], rule=StateRule(self.rule_of, self.state_of))
        if evaluate.refreshed:
            self.refreshed_at = self.steps - 1  # the update has counted this step already
        return (plus + minus) / 2

    def rule_of(self, weights: Sequence[Weight]) -> ops.HELENERule:
        """The rule of this step for weights of one pass."""
        group = weights[0].group
        beta1, beta2 = fraction("beta1", group["beta1"]), fraction("beta2", group["beta2"])
        rates = self.rates()
        return ops.HELENERule(
            lr=[rates[w.index] for w in weights],
            anneal=beta1 + (1 - beta1) * math.exp(-self.steps / self.anneal_steps),
            floor=[self.floor_of(w) for w in weights],
            beta1=beta1,
            gamma=positive("gamma", group["gamma"]),
            eps=self.e,
            refresh=(beta2, float(self.batch_size)) if self._refreshes() else None,
        )

    def _refreshes(self) -> bool:
        """Whether the curvature is estimated in this step: by the schedule, or as the step that was to was skipped."""
        scheduled = self.steps - self.steps % self.refresh_every
        return self.refreshed_at is None or self.refreshed_at < scheduled

    def floor_of(self, weight: Weight) -> float:
        """The floor of a weight's curvature."""
        return next((v for p, v in self.floors.items() if weight.matches(p)), positive("floor", weight.group["floor"]))

    def state_of(self, weights: Sequence[Weight]) -> list[list[Tensor]]:
        """m and h of weights."""
        states = [self.state[w.tensor] for w in weights]
        for w, state in zip(weights, states, strict=True):
            state.update({name: self.moment(w, name) for name in ("momentum", "curvature")})
        return [[state[name] for state in states] for name in ("momentum", "curvature")]
