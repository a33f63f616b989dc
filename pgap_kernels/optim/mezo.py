"""MeZO (Malladi et al., 2305.17333): two-sided SPSA along dense seeded noise, n-SPSA with several probes."""

from __future__ import annotations

from typing import Any

from ..noise import Role
from ..perturbation import Direction, PerWeight
from .base import Closure, Cost, Params, ZOOptimizer, at_least_one


class MeZO(ZOOptimizer):
    """MeZO-SGD:  rho_i = (L(W + eps z_i) - L(W - eps z_i)) / (2 eps),  W <- (1 - lr wd) W - lr/n sum_i rho_i z_i.

    2n forwards and 2n + 1 weight passes a step, 2n with ``two_pass``: the switch from one probe to the next is one
    pass, and so are the last restore and the update. No state but the seed.

    Args:
        params: a model, named parameters or param groups.
        lr: learning rate, >= 0.
        eps: smoothing radius, > 0; a group's own eps gives it its own projected gradient.
        weight_decay: decoupled, on tensors of two or more dimensions.
        probes: n, directions per step.
        **options: model, seed, tensor_ids, on_nonfinite, mode and its options, of ``ZOOptimizer``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        probes: int = 1,
        **options: Any,
    ) -> None:
        self.probes = at_least_one("probes", probes)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)

    def cost(self) -> Cost:
        return Cost(2 * self.probes + (0 if self.two_pass else 1), 0, self.perturbation.scratch_bytes)

    def directions(self, step: int) -> list[Direction]:
        return [self.dense(self.key(Role.DENSE, probe, step)) for probe in range(self.probes)]

    def estimate_and_update(self, closure: Closure) -> float:
        directions = self.plan(self.steps)
        losses = [self.two_sided(direction, closure) for direction in directions]

        def step(plus: float, minus: float) -> PerWeight:
            return lambda w: -w.group["lr"] / self.probes * (plus - minus) / (2 * self.radius(w))

        self.land([(direction, step(*pair)) for direction, pair in zip(directions, losses, strict=True)])
        return sum(plus + minus for plus, minus in losses) / (2 * self.probes)
