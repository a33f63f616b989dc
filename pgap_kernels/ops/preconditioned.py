"""Updates whose state (momentum, second moment, curvature) is read and written in the pass that writes the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from .. import backends, checks
from ._arguments import Draw, Key, Scalar, Slices, noise_options, pack_draws, rounding_keys, scalar
from ._library import define, define_with_out, table, written

_NOISE = "Tensor decay, Tensor? rounding_key, int[] tensor_ids, int[] slices, str distribution, str tier, str? backend"


def _update_impl(weights, first, second, keys, gradient, restore, scalars, rule, *args):
    backend = backends.select("preconditioned_update_", weights[0].device, weights[0].dtype, args[-1])
    backend.preconditioned_(weights, weights, first, second, keys, gradient, restore, scalars, rule, *args[:-1])
    written(weights, first, second)


def _perturb_impl(weights, curvature, keys, coefficients, *args, out=None):
    out = weights if out is None else out
    backend = backends.select("preconditioned_perturb_", weights[0].device, weights[0].dtype, args[-1])
    none = torch.zeros(0, 1, dtype=torch.float32)
    backend.preconditioned_(weights, out, curvature, [], keys, coefficients, coefficients, none, "perturb", *args[:-1])
    written(out)


define(
    "preconditioned_update_(Tensor(a!)[] weights, Tensor(b!)[] first, Tensor(c!)[] second, Tensor keys, "
    f"Tensor gradient, Tensor restore, Tensor scalars, str rule, {_NOISE}) -> ()",
    _update_impl,
)
define_with_out(
    "preconditioned_perturb_", f"Tensor[] curvature, Tensor keys, Tensor coefficients, {_NOISE}", _perturb_impl
)


def _times(value: Scalar, factor: float | Tensor) -> Scalar:
    return [v * factor for v in value] if isinstance(value, (list, tuple)) else value * factor  # type: ignore[operator]


@dataclass(frozen=True)
class Momentum:
    """m <- beta m + g;  W <- W + b - lr m.  One state, m. A scalar is a float, one per tensor, or a tensor."""

    lr: Scalar
    beta: float | Tensor = 0.9
    rule: ClassVar[str] = "momentum"
    states: ClassVar[int] = 1

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named."""
        return [("lr", self.lr), ("beta", self.beta)]


@dataclass(frozen=True)
class Adam:
    """m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  W <- W + b - lr m^ / (sqrt(v^) + eps).

    m^ and v^ have Adam's bias corrections at ``step``, counted from 1 (Kingma and Ba, 1412.6980). States m, v.
    """

    lr: Scalar
    step: int | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rule: ClassVar[str] = "adam"
    states: ClassVar[int] = 2

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named; the corrections are folded into the learning rate and v."""
        beta1, beta2 = self.betas
        return [
            ("lr", _times(self.lr, 1 / (1 - beta1**self.step))),
            ("beta1", beta1),
            ("1 - beta1", 1 - beta1),
            ("beta2", beta2),
            ("1 - beta2", 1 - beta2),
            ("correction of v", 1 / (1 - beta2**self.step)),
            ("eps", self.eps),
        ]


@dataclass(frozen=True)
class HiZOO:
    """H <- (1 - alpha) H + alpha c H z^2;  W <- W + b / sqrt(H_old) - lr g / sqrt(H_new)          (2402.15173).

    c = |L+ + L- - 2 L0| / (2 eps^2), with the smoothing radius eps. State H > 0, at first 1. Takes exactly one draw.
    """

    lr: Scalar
    curvature: float | Tensor
    alpha: float | Tensor = 1e-8
    rule: ClassVar[str] = "hizoo"
    states: ClassVar[int] = 1

    def scalars(self) -> list[tuple[str, Scalar]]:
        """The kernel's scalars in its order, named."""
        return [("lr", self.lr), ("1 - alpha", 1 - self.alpha), ("alpha curvature", self.alpha * self.curvature)]


@dataclass(frozen=True)
class HELENE:
    """m <- beta1 m + anneal g;  W <- W + b - lr m / (gamma max(h, floor) + eps)                    (2411.10696).

    With ``refresh`` = (beta2, B), h <- beta2 h + (1 - beta2) B g^2 before it is used, B the batch size; without, h is
    read and kept. ``floor`` is per layer where given as a list. States m, h.
    """

    lr: Scalar
    anneal: float | Tensor
    floor: Scalar
    beta1: float | Tensor = 0.9
    gamma: float | Tensor = 1.0
    eps: float | Tensor = 1e-8
    refresh: tuple[float, float] | None = None
    states: ClassVar[int] = 2

    @property
    def rule(self) -> str:
        """The kernel's name of the form."""
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


Rule = Momentum | Adam | HiZOO | HELENE


def _check_rule(rule: Rule, count: int) -> None:
    """Refuse a field by its own name, before arithmetic is done with it."""
    for field in fields(rule):
        name, value = f"rule.{field.name}", getattr(rule, field.name)
        if field.name == "step":
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not isinstance(value, Tensor):
                raise ValueError(f"{name}: got {value!r}; accepted: an integer, 1 for the first step, or a tensor")
        elif field.name in ("betas", "refresh"):
            if value is None and field.name == "refresh":
                continue
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise TypeError(f"{name}: got {value!r}; accepted: two floats")
            for v in value:
                checks.scalar_row(name, v, 1)
                if field.name == "betas" and not 0 <= v < 1:
                    raise ValueError(f"{name}: got {value!r}; accepted: floats from 0 to below 1")
        elif isinstance(value, (list, tuple)) and field.type != "Scalar":
            raise TypeError(f"{name}: got {value!r}; accepted: a float or a tensor")
        else:
            checks.scalar_row(name, value, count)


@torch.compiler.disable
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
    backend: str | None = None,
) -> None:
    """Restore, update the state and step, in one pass that reads and writes weights and state once.

        g = sum_j c_j z_j,  b = sum_j r_j z_j  (fma in list order);  the rule gives the state and delta
        delta = fma(-d, W, delta) if d != 0;   W <- round(W + delta)              (K3s of the kernel algebra)

    With c = rho (the projected gradient) g is the gradient estimate; with r = the smoothing radius b takes back the
    perturbation W - eps z that the last forward saw. The exact tier gives the same bits on every backend.

    Args:
        weights: as in ``dense_perturb_``.
        state: the rule's states, each a list of float32 tensors of the weights' shapes; written, sharing nothing.
        draws: (key, c_j) pairs.
        rule: ``Momentum``, ``Adam``, ``HiZOO`` or ``HELENE``.
        restore: r_j, one scalar per draw; by default 0.
        tensor_ids, decay, distribution, tier, rounding, rounding_key, slices, backend: as in ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    if not isinstance(rule, (Momentum, Adam, HiZOO, HELENE)):
        raise TypeError(f"rule: got {rule!r}; accepted: Momentum, Adam, HiZOO or HELENE")
    if isinstance(state, Tensor) or not isinstance(state, (list, tuple)) or len(state) != rule.states:
        got = len(state) if isinstance(state, (list, tuple)) else type(state).__name__
        raise ValueError(f"state: got {got}; accepted: {rule.states} list(s) of tensors, as {rule.rule} keeps")
    states = [checks.companions(f"state[{i}]", s, weights, (torch.float32,)) for i, s in enumerate(state)]
    if len(states) == 2:
        both = states[0] + states[1]
        checks.disjoint("state[0] + state[1]", both)
    noise_options(distribution, tier)
    keys, gradient = pack_draws(draws, len(weights))
    if rule.rule == "hizoo" and len(draws) != 1:
        raise ValueError(f"draws: got {len(draws)}; accepted: one with HiZOO")
    rows = [0.0] * len(draws) if restore is None else restore
    if not isinstance(rows, (list, tuple)) or len(rows) != len(draws):
        raise ValueError(f"restore: got {restore!r}; accepted: {len(draws)} scalar(s), one per draw")
    back = checks.scalar_table(
        "restore", [checks.scalar_row(f"restore[{i}]", r, len(weights)) for i, r in enumerate(rows)]
    )
    _check_rule(rule, len(weights))
    named = [checks.scalar_row(f"rule.{name}", value, len(weights)) for name, value in rule.scalars()]
    scalars = checks.scalar_table("rule", named)
    decays = scalar("decay", decay, len(weights))
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(weights))
    spans = checks.slices("slices", slices, weights)
    keys_rounding = rounding_keys(rounding, rounding_key)
    first, second = states[0], states[1] if len(states) == 2 else []
    args = (keys, gradient, back, scalars, rule.rule, decays, keys_rounding, ids, spans, distribution, tier, backend)
    with torch.no_grad():
        table.preconditioned_update_(weights, first, second, *args)


@torch.compiler.disable
def preconditioned_perturb_(
    weights: Sequence[Tensor],
    draws: Sequence[Draw],
    curvature: Sequence[Tensor],
    *,
    tensor_ids: Sequence[int],
    decay: Scalar = 0.0,
    out: Sequence[Tensor] | None = None,
    distribution: str = "normal",
    tier: str = "exact",
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
    backend: str | None = None,
) -> None:
    """``dense_perturb_`` along noise divided by the root of a diagonal curvature, which is only read.

        delta = (sum_j a_j z_j) / sqrt(H);   delta = fma(-d, W, delta) if d != 0;   W <- round(W + delta)

    K3 of the kernel algebra; HiZOO (2402.15173) perturbs so.

    Args:
        curvature: H > 0, float32 tensors of the weights' shapes.
        weights, draws, tensor_ids, decay, out, distribution, tier, rounding, rounding_key, slices, backend: as in
            ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    diagonal = checks.companions("curvature", curvature, weights, (torch.float32,))
    noise_options(distribution, tier)
    keys, coefficients = pack_draws(draws, len(weights))
    decays = scalar("decay", decay, len(weights))
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(weights))
    spans = checks.slices("slices", slices, weights)
    keys_rounding = rounding_keys(rounding, rounding_key)
    args = (diagonal, keys, coefficients, decays, keys_rounding, ids, spans, distribution, tier, backend)
    with torch.no_grad():
        if out is None:
            table.preconditioned_perturb_(weights, *args)
        else:
            outputs = checks.companions("out", out, weights, (weights[0].dtype,))
            both = outputs + diagonal
            checks.disjoint("out + curvature", both)
            table.preconditioned_perturb_.out(weights, *args, out=outputs)
