"""MeZO (Malladi et al., 2305.17333): two-sided SPSA along dense seeded noise, n-SPSA with several probes."""

from __future__ import annotations

from typing import Any, ClassVar

from ..directions import Direction
from ..noise import Role
from .base import Evaluation, Params, ZOOptimizer
from .options import at_least_one


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

    method: ClassVar[str] = "MeZO"

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
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.probes = at_least_one("probes", probes)

    def first_point(self, step: int) -> Direction:
        return self.noise(self.key(Role.DENSE, 0, step))

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        rest = [self.noise(self.key(Role.DENSE, probe)) for probe in range(1, self.probes)]
        directions = [self.planned(self.steps), *rest]
        losses = [evaluate.two_sided(direction) for direction in directions]
        self.apply_update(
            [(d, self.sgd(plus - minus, self.probes)) for d, (plus, minus) in zip(directions, losses, strict=True)]
        )
        return sum(plus + minus for plus, minus in losses) / (2 * self.probes)
