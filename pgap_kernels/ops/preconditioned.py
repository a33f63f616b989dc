"""Updates whose state (momentum, second moment, curvature) is read and written in the pass that writes the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from .. import backends, checks
from ..arguments import CurvatureArguments, PreconditionedArguments, schema
from ._library import bump_versions, call_pass, define, define_with_out, placed, torch_ops, traceable
from ._packing import Draw, Key, Scalar, Slices, noise_options, outputs, pack_draws, rounding_keys, scalar


def _update(weights, state0, state1, **arguments):
    serving = backends.select("preconditioned_update_", weights[0].device, weights[0].dtype)
    serving.preconditioned_(weights, weights, state0, state1, PreconditionedArguments(**arguments))
    bump_versions(weights, state0, state1)


def _perturb(weights, *, curvature, coefficients, around=None, out=None, **arguments):
    out = weights if out is None else out
    serving = backends.select("preconditioned_perturb_", weights[0].device, weights[0].dtype)
    scalars = torch.zeros(0, 1, dtype=torch.float32, device="cpu") if around is None else around
    rule = "perturb" if around is None else "around"
    as_update = {"gradient": coefficients, "restore": coefficients, "scalars": scalars, "rule": rule}
    serving.preconditioned_(weights, out, curvature, [], PreconditionedArguments(**as_update, **arguments))
    bump_versions(out)


define(
    "preconditioned_update_(Tensor(a!)[] weights, Tensor(b!)[] state0, Tensor(c!)[] state1, *, "
    f"{schema(PreconditionedArguments)}) -> ()",
    _update,
)
define_with_out("preconditioned_perturb_", CurvatureArguments, _perturb)


def _times(value: Scalar, factor: float | Tensor) -> Scalar:
    return [v * factor for v in value] if isinstance(value, (list, tuple)) else value * factor  # type: ignore[operator]


@dataclass(frozen=True)
class MomentumRule:
    """m <- beta m + g;  W <- W + b - lr m.  One state, m. A scalar is a float, one per tensor, or a tensor."""

    lr: Scalar
    beta: float | Tensor = 0.9
    rule: ClassVar[str] = "momentum"
    states: ClassVar[int] = 1
    per_tensor: ClassVar[tuple[str, ...]] = ("lr",)

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named."""
        return [("lr", self.lr), ("beta", self.beta)]


@dataclass(frozen=True)
class AdamRule:
    """m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  W <- W + b - lr m^ / (sqrt(v^) + eps).

    m^ and v^ have Adam's bias corrections at ``step``, counted from 1 (Kingma and Ba, 1412.6980). States m, v.
    """

    lr: Scalar
    step: int | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rule: ClassVar[str] = "adam"
    states: ClassVar[int] = 2
    per_tensor: ClassVar[tuple[str, ...]] = ("lr",)

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named; the corrections are folded into the learning rate and v."""
        beta1, beta2 = self.betas
        step = self.step.double() if isinstance(self.step, Tensor) else self.step  # in float32 1 - 0.999 is 1e-5 off
        return [
            ("lr", _times(self.lr, 1 / (1 - beta1**step))),
            ("beta1", beta1),
            ("1 - beta1", 1 - beta1),
            ("beta2", beta2),
            ("1 - beta2", 1 - beta2),
            ("correction of v", 1 / (1 - beta2**step)),
            ("eps", self.eps),
        ]


@dataclass(frozen=True)
class HiZOORule:
    """H <- (1 - alpha) H + alpha c H z^2;  W <- W + b / sqrt(H_old) - lr g / sqrt(H_new)          (2402.15173).

    c = |L+ + L- - 2 L0| / (2 eps^2), with the smoothing radius eps. State H > 0, at first 1. Takes exactly one draw.
    """

    lr: Scalar
    curvature: float | Tensor
    alpha: float | Tensor = 1e-8
    rule: ClassVar[str] = "hizoo"
    states: ClassVar[int] = 1
    per_tensor: ClassVar[tuple[str, ...]] = ("lr",)

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named."""
        return [("lr", self.lr), ("1 - alpha", 1 - self.alpha), ("alpha curvature", self.alpha * self.curvature)]


@dataclass(frozen=True)
class HELENERule:
    """m <- beta1 m + anneal g;  W <- W + b - lr m / (gamma max(h, floor) + eps)                    (2411.10696).

    With ``refresh`` = (beta2, B), B the batch size, h <- beta2 h + (1 - beta2) B g^2 before it is used; without, h is
    only read. ``floor`` may be a list, with one value per tensor. States m, h.
    """

    lr: Scalar
    anneal: float | Tensor
    floor: Scalar
    beta1: float | Tensor = 0.9
    gamma: float | Tensor = 1.0
    eps: float | Tensor = 1e-8
    refresh: tuple[float, float] | None = None
    states: ClassVar[int] = 2
    per_tensor: ClassVar[tuple[str, ...]] = ("lr", "floor")

    @property
    def rule(self) -> str:
        """The kernel's name of this form of the rule."""
        return "helene" if self.refresh is None else "helene_refresh"

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named."""
        beta2, batch = self.refresh or (1.0, 0.0)
        return [
            ("lr", self.lr),
            ("beta1", self.beta1),
            ("anneal", self.anneal),
            ("gamma", self.gamma),
            ("floor", self.floor),
            ("eps", self.eps),
            ("beta2", beta2),
            ("(1 - beta2) B", (1 - beta2) * batch),
        ]


@dataclass(frozen=True)
class AdaMURule:
    """m around a stored tensor h, and a step by what this step's draws say of its size                (2312.15184).

        y = h + b,   m = beta1 g + (1 - beta1) y,   v = beta2 g^2 + (1 - beta2) y^2
        W <- W + back m - step m / sqrt(v + eps);   h <- sign m

    Takes exactly two draws, of which the first makes g and the second b: restore[0] and c_2 are 0. ``back`` is what
    takes off a perturbation along m; ``step`` is lr rho. State h.
    """

    step: Scalar
    sign: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    back: Scalar = 0.0
    eps: float | Tensor = 1e-8
    rule: ClassVar[str] = "adamu"
    states: ClassVar[int] = 1
    per_tensor: ClassVar[tuple[str, ...]] = ("step", "back")

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named."""
        return [
            ("step", self.step),
            ("back", self.back),
            ("sign", self.sign),
            ("beta1", self.beta1),
            ("1 - beta1", 1 - self.beta1),
            ("beta2", self.beta2),
            ("1 - beta2", 1 - self.beta2),
            ("eps", self.eps),
        ]


Rule = MomentumRule | AdamRule | HiZOORule | HELENERule | AdaMURule
for _kind in (MomentumRule, AdamRule, HiZOORule, HELENERule, AdaMURule):
    register_dataclass(_kind)  # so that compiled functions can pass them on
_COUNTS = {"hizoo": (1, "one with HiZOORule"), "adamu": (2, "two with AdaMURule")}


def _checked(rule: Rule, count: int) -> Rule:
    """The rule in Python numbers, so that ``scalars`` computes in float64; errors name the field."""
    return replace(rule, **{f.name: _checked_field(rule, f.name, count) for f in fields(rule)})


def _checked_field(rule: Rule, field: str, count: int) -> Any:
    name, value = f"rule.{field}", getattr(rule, field)
    if field == "step" and isinstance(rule, AdamRule):
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise TypeError(f"{name}: got {value.dtype} of shape {tuple(value.shape)}; accepted: one integer")
            known = value.device.type == "cpu" and not torch.compiler.is_compiling()
            if known and value.item() < 1:
                raise ValueError(f"{name}: got {value.item()}; accepted: 1 for the first step, or more")
            return value.reshape(())
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: got {value!r}; accepted: an integer, 1 for the first step, or a tensor")
        return int(value)
    if field == "refresh" and value is None:
        return None
    if field in ("betas", "refresh"):
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise TypeError(f"{name}: got {value!r}; accepted: two floats")
        pair = [_checked_number(name, v) for v in value]
        if field == "betas" and not all(0 <= v < 1 for v in pair):
            raise ValueError(f"{name}: got {value!r}; accepted: floats from 0 to below 1")
        return pair
    several = isinstance(value, (list, tuple))
    if several and field not in rule.per_tensor:
        raise TypeError(f"{name}: got {value!r}; accepted: a float or a tensor")
    checks.scalar_row(name, value, count)
    if isinstance(value, Tensor):
        return value
    return [_checked_number(name, v) for v in value] if several else checks.number(name, value)


def _checked_number(name: str, value: Any) -> Any:
    """One number; a tensor stays on its device."""
    if isinstance(value, Tensor):
        checks.scalar_row(name, value, 1)
        return value
    return checks.number(name, value)


@traceable
def preconditioned_update_(
    weights: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    draws: Sequence[Draw],
    rule: Rule,
    *,
    tensor_ids: Sequence[int],
    restore: Sequence[Scalar] | None = None,
    decay: Scalar = 0.0,
    distribution: str = "normal",
    tier: str = "exact",
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
) -> None:
    """Restore, update the state and step, in one pass that reads and writes weights and state once.

        g = sum_j c_j z_j,  b = sum_j r_j z_j  (fma in list order);  the rule gives the state and delta
        delta = fma(-d, W, delta) if d != 0;   W <- round(W + delta)

    With c = rho (the projected gradient) g is the gradient estimate; with r = eps, b undoes the perturbation W - eps z
    that the last forward saw. The exact tier gives the same bits on every backend.

    Args:
        weights: as in ``dense_perturb_``.
        state: the rule's states, each a list of float32 tensors of the weights' shapes; written, sharing nothing.
        draws: (key, c_j) pairs.
        rule: ``MomentumRule``, ``AdamRule``, ``HiZOORule``, ``HELENERule`` or ``AdaMURule``.
        restore: r_j, one scalar per draw; by default 0.
        tensor_ids, decay, distribution, tier, rounding, rounding_key, slices: as in ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    if not isinstance(rule, (MomentumRule, AdamRule, HiZOORule, HELENERule, AdaMURule)):
        raise TypeError(f"rule: got {rule!r}; accepted: MomentumRule, AdamRule, HiZOORule, HELENERule or AdaMURule")
    if isinstance(state, Tensor) or not isinstance(state, (list, tuple)) or len(state) != rule.states:
        got = len(state) if isinstance(state, (list, tuple)) else type(state).__name__
        raise ValueError(f"state: got {got}; accepted: {rule.states} list(s) of tensors, as {rule.rule} keeps")
    states = [checks.companions(f"state[{i}]", s, weights, (torch.float32,)) for i, s in enumerate(state)]
    if len(states) == 2:
        checks.disjoint({"state[0]": states[0], "state[1]": states[1]})
    noise_options(distribution, tier)
    keys, gradient = pack_draws(draws, len(weights))
    count, accepted = _COUNTS.get(rule.rule, (len(draws), ""))
    if len(draws) != count:
        raise ValueError(f"draws: got {len(draws)}; accepted: {accepted}")
    rows = [0.0] * len(draws) if restore is None else restore
    if not isinstance(rows, (list, tuple)) or len(rows) != len(draws):
        raise ValueError(f"restore: got {restore!r}; accepted: {len(draws)} scalar(s), one per draw")
    back = checks.scalar_table(
        "restore", [checks.scalar_row(f"restore[{i}]", r, len(weights)) for i, r in enumerate(rows)]
    )
    rule = _checked(rule, len(weights))
    named = [checks.scalar_row(f"rule.{name}", value, len(weights)) for name, value in rule.scalars()]
    arguments = PreconditionedArguments(
        keys=keys,
        gradient=gradient,
        restore=back,
        scalars=checks.scalar_table("rule", named),
        rule=rule.rule,
        decay=scalar("decay", decay, len(weights)),
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(weights), may_repeat=slices is not None),
        rounding_key=rounding_keys(rounding, rounding_key),
        slices=checks.slices("slices", slices, weights),
        distribution=distribution,
        tier=tier,
    )
    state0, state1 = states[0], states[1] if len(states) == 2 else []
    arguments = placed(arguments, weights[0].device)
    with torch.no_grad():
        torch_ops.preconditioned_update_(weights, state0, state1, **arguments._asdict())


@traceable
def preconditioned_perturb_(
    weights: Sequence[Tensor],
    draws: Sequence[Draw],
    curvature: Sequence[Tensor],
    *,
    tensor_ids: Sequence[int],
    around: Scalar | None = None,
    decay: Scalar = 0.0,
    out: Sequence[Tensor] | None = None,
    distribution: str = "normal",
    tier: str = "exact",
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
) -> None:
    """``dense_perturb_`` along noise divided by the root of a stored tensor, or around it; the tensor is only read.

        delta = (sum_j a_j z_j) / sqrt(H), or sum_j a_j z_j + c H with ``around`` = c
        delta = fma(-d, W, delta) if d != 0;   W <- round(W + delta)

    HiZOO (2402.15173) perturbs in the first way, ZO-AdaMU (2312.15184) in the second.

    Args:
        curvature: H, float32 tensors of the weights' shapes; H > 0 in the first way.
        around: c, a float, one per tensor, or a tensor; None for the first way.
        weights, draws, tensor_ids, decay, out, distribution, tier, rounding, rounding_key, slices: as in
            ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    diagonal = checks.companions("curvature", curvature, weights, (torch.float32,), written=False)
    noise_options(distribution, tier)
    keys, coefficients = pack_draws(draws, len(weights))
    arguments = CurvatureArguments(
        curvature=diagonal,
        keys=keys,
        coefficients=coefficients,
        decay=scalar("decay", decay, len(weights)),
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(weights), may_repeat=slices is not None),
        around=None if around is None else scalar("around", around, len(weights)),
        rounding_key=rounding_keys(rounding, rounding_key),
        slices=checks.slices("slices", slices, weights),
        distribution=distribution,
        tier=tier,
    )
    targets = outputs(out, weights)
    checks.apart("weights" if targets is None else "out", targets or weights, {"curvature": diagonal})
    call_pass(torch_ops.preconditioned_perturb_, weights, arguments, targets)
