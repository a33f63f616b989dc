"""MeZO (Malladi et al., 2305.17333): two-sided SPSA along dense seeded noise, n-SPSA with several probes."""

from __future__ import annotations

from typing import Any

from ..noise import Role
from ..perturbation import PerWeight
from .base import Closure, Cost, Params, ZOOptimizer, at_least_one, group_eps


class MeZO(ZOOptimizer):
    """MeZO-SGD:  rho_i = (L(W + eps z_i) - L(W - eps z_i)) / (2 eps),  W <- (1 - lr wd) W - lr/n sum_i rho_i z_i.

    2n forwards and 2n + 1 weight passes a step: the switch from one probe to the next is one pass, and so are the
    last restore and the update. No state but the seed.

    Args:
        params: a model, named parameters or param groups.
        lr: learning rate, >= 0.
        eps: smoothing radius, > 0; a group's own eps gives it its own projected gradient.
        weight_decay: decoupled, on tensors of two or more dimensions.
        probes: n, directions per step.
        **options: model, seed, tensor_ids, on_nonfinite, of ``ZOOptimizer``.
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
        return Cost(2 * self.probes + 1, 0, 0)

    def estimate_and_update(self, closure: Closure) -> float:
        keys = [self.key(Role.DENSE, probe) for probe in range(self.probes)]
        moves = self.dense_moves(keys[0])
        losses: list[tuple[float, float]] = []

        def step(probe: int) -> PerWeight:
            plus, minus = losses[probe]
            return lambda w: -w.group["lr"] / self.probes * (plus - minus) / (2 * group_eps(w))

        with self.restoring(moves, group_eps):
            for probe, key in enumerate(keys):
                if probe:
                    self.switch_to(moves, key, group_eps)
                losses.append(self.two_sided(moves, closure, group_eps))
            others = [(key, step(probe)) for probe, key in enumerate(keys[:-1])]
            self.land(moves, step(-1), group_eps, others=others)
        return sum(plus + minus for plus, minus in losses) / (2 * self.probes)
