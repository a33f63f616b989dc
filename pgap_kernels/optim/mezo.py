"""MeZO (Malladi et al., 2305.17333): two-sided SPSA along dense seeded noise, n-SPSA with several probes."""

from __future__ import annotations

from typing import Any, ClassVar

from ..directions import Direction
from ..noise import Role
from .base import Evaluation, Params, ZOOptimizer
from .sampling import Sampling


class MeZO(ZOOptimizer):
    """MeZO-SGD:  rho_i = (L(W + eps z_i) - L(W - eps z_i)) / (2 eps),  W <- (1 - lr wd) W - lr/n sum_i rho_i z_i.

    2n forwards and 2n + 1 weight passes a step, 2n with ``two_pass``: the switch from one probe to the next is one
    pass, and so are the last restore and the update. No state but the seed.

    Args:
        params: a model, named parameters or param groups.
        lr: learning rate, >= 0.
        eps: smoothing radius, > 0; a group's own eps gives it its own projected gradient.
        weight_decay: decoupled, on tensors of two or more dimensions.
        probes: n, directions per step (and group of examples).
        baseline: what the loss in a direction is compared with: that in the opposite one ("antithetic", two forwards a
            direction), the mean of the other directions ("loo"), or the loss without perturbation ("clean").
        **options: model, seed, tensor_ids, on_nonfinite, mode and its options, of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "MeZO"
    plans_ahead: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        probes: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.sampling = Sampling.checked(probes, self.groups, self.members, baseline, "probes")

    def direction(self, step: int, number: int = 0) -> Direction:
        return self.noise(self.key(Role.DENSE, number, step))

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        directions, loss = self.estimate(evaluate, self.sampling)
        self.apply_update([(d, self.descent(amount)) for d, amount in directions])
        return loss
