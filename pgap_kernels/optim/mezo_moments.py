"""MeZO with momentum and with Adam's moments (Malladi et al., 2305.17333)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..directions import Weight, bucket
from ..noise import Role
from ..perturbation import StateRule
from .base import Evaluation, Params, ZOOptimizer
from .options import fraction, number, positive
from .sampling import Sampling


class _MomentMeZO(ZOOptimizer):
    """What both share: MeZO's estimate of the gradient goes into moments, which make the update in the same pass."""

    takes_residual: ClassVar[bool] = False
    moments: ClassVar[tuple[str, ...]]
    of_a_rule: ClassVar[tuple[str, ...]]  # hyper-parameters that are the same for all weights of a pass

    def __init__(self, params: Params, defaults: dict[str, Any], *, probes: int, baseline: str, **options: Any) -> None:
        super().__init__(params, defaults, **options)
        self.sampling = Sampling.checked(probes, self.groups, self.members, baseline, "probes")

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        for name in self.of_a_rule:
            self.hyper_parameter(name, group)

    def hyper_parameter(self, name: str, group: dict[str, Any]) -> float:
        """One of a group, checked."""
        return positive(name, group[name], zero=True) if name == "e" else fraction(name, group[name])

    def direction(self, step: int, number: int = 0) -> Any:
        return self.noise(self.key(Role.DENSE, number, step), self._by_rule())

    def _by_rule(self) -> list[list[Weight]]:
        return bucket(self.weights(), also=self.rule_key)

    def rule_key(self, weight: Weight) -> tuple:
        """What weights have to share to be updated in one pass."""
        return tuple(self.hyper_parameter(name, weight.group) for name in self.of_a_rule)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        directions, loss = self.estimate(evaluate, self.sampling)
        gradient = [(d, [amount / eps for eps in self.radius()]) for d, amount in directions]
        self.apply_update(gradient, rule=StateRule(self.rule_of, self.state_of))
        return loss

    def rule_of(self, weights: Sequence[Weight]) -> ops.Rule:
        """The rule of this step for weights of one pass."""
        raise NotImplementedError

    def state_of(self, weights: Sequence[Weight]) -> list[list[Tensor]]:
        """The moments of weights."""
        states = [self.state[w.tensor] for w in weights]
        for w, state in zip(weights, states, strict=True):
            state.update({name: self.moment(w, name) for name in self.moments})
        return [[state[name] for state in states] for name in self.moments]


class MeZOMomentum(_MomentMeZO):
    """MeZO with heavy-ball momentum:  m <- beta m + g,  W <- (1 - lr wd) W - lr m,  g = 1/n sum_i rho_i z_i.

    2n forwards; 2n + 1 weight passes in place, the last of which reads and writes m too. State: m, float32, of the
    weight's size. Of the paper alone: neither of its code bases has momentum.

    Args:
        params, lr, eps, weight_decay, probes, baseline: as in ``MeZO``.
        beta: decay rate of the momentum m, per param group; new gradients are not multiplied by 1 - beta.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "MeZOMomentum"
    moments: ClassVar[tuple[str, ...]] = ("momentum",)
    of_a_rule: ClassVar[tuple[str, ...]] = ("beta",)
    elementwise_state: ClassVar[tuple[str, ...]] = moments

    def __init__(
        self,
        params: Params,
        lr: float = 1e-7,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        beta: float = 0.9,
        probes: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "beta": beta}
        super().__init__(params, defaults, probes=probes, baseline=baseline, **options)

    def rule_of(self, weights: Sequence[Weight]) -> ops.MomentumRule:
        rates = self.rates()
        return ops.MomentumRule(lr=[rates[w.index] for w in weights], beta=fraction("beta", weights[0].group["beta"]))


class MeZOAdam(_MomentMeZO):
    """MeZO with Adam's moments.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,   g = 1/n sum_i rho_i z_i
        W <- (1 - lr wd) W - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + e),   t updates of W, this one included

    2n forwards; 2n + 1 weight passes in place, the last of which reads and writes the state too. State: m and v,
    float32, each of the weight's size, and t, which does not count steps that were skipped or in which W was frozen.
    The published code (medium_models) hands g to AdamW as the gradient, which takes up to four times the weights'
    memory.

    Args:
        params, lr, eps, weight_decay, probes, baseline: as in ``MeZO``.
        beta1: decay rate of the first moment m, per param group.
        beta2: decay rate of the second moment v, per param group.
        e: added to the denominator, which keeps it away from 0; per param group.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "MeZOAdam"
    moments: ClassVar[tuple[str, ...]] = ("momentum", "second_moment")
    of_a_rule: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "e")
    elementwise_state: ClassVar[tuple[str, ...]] = moments

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        e: float = 1e-8,
        probes: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "e": e}
        super().__init__(params, defaults, probes=probes, baseline=baseline, **options)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        loss = super().estimate_and_update(evaluate)
        for w in self.weights():
            self.state[w.tensor]["updates"] = self._updates(w) + 1
        return loss

    def rule_key(self, weight: Weight) -> tuple:
        return (*super().rule_key(weight), self._updates(weight))

    def _updates(self, weight: Weight) -> int:
        return self.state[weight.tensor].get("updates", 0)

    def rule_of(self, weights: Sequence[Weight]) -> ops.AdamRule:
        rates, group = self.rates(), weights[0].group
        return ops.AdamRule(
            lr=[rates[w.index] for w in weights],
            step=self._updates(weights[0]) + 1,
            betas=(fraction("beta1", group["beta1"]), fraction("beta2", group["beta2"])),
            eps=number("e", group["e"]),
        )
