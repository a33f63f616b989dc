"""Arguments of several public functions, checked and packed into the small tensors that ops take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import checks

Scalar = float | Sequence[float] | Tensor
Key = int | Tensor
Draw = tuple[Key, Scalar]
Slices = Sequence[tuple[int, int]]

_DISTRIBUTIONS = ("normal", "rademacher")
_TIERS = ("exact", "fast")
_ROUNDINGS = ("nearest", "stochastic")


def noise_options(distribution: str, tier: str) -> None:
    """Check distribution and tier."""
    checks.choice("distribution", distribution, _DISTRIBUTIONS)
    checks.choice("tier", tier, _TIERS)


def rounding_keys(rounding: str, rounding_key: Key | None) -> Tensor | None:
    """The key of stochastic rounding as a tensor (1,), or None for nearest."""
    checks.choice("rounding", rounding, _ROUNDINGS)
    if rounding == "nearest":
        return None
    if rounding_key is None:
        raise ValueError("rounding_key: got None; accepted: a key of role 7 (noise.Role.ROUNDING) with 'stochastic'")
    return checks.key_tensor("rounding_key", [rounding_key])


def pack_draws(draws: Sequence[Draw], count: int) -> tuple[Tensor, Tensor]:
    """(key, coefficient) pairs as keys (J,) and coefficients (J, 1 or ``count``)."""
    if not isinstance(draws, (list, tuple)) or not draws:
        raise ValueError(f"draws: got {draws!r}; accepted: a list of at least one (key, coefficient)")
    if isinstance(draws, tuple) and not isinstance(draws[0], (list, tuple)):
        raise TypeError(f"draws: got {draws!r}; accepted: a list of pairs, as in [(key, coefficient)]")
    for i, draw in enumerate(draws):
        if not isinstance(draw, (list, tuple)) or len(draw) != 2:
            raise TypeError(f"draws[{i}]: got {draw!r}; accepted: (key, coefficient)")
    keys = checks.pack_keys([checks.key_bits(f"draws[{i}] key", key) for i, (key, _) in enumerate(draws)])
    rows = [checks.scalar_row(f"draws[{i}] coefficient", a, count) for i, (_, a) in enumerate(draws)]
    return keys, checks.scalar_table("draws coefficient", rows)


def scalar(name: str, value: Scalar, count: int) -> Tensor:
    """One scalar as a table of one row, (1, 1 or ``count``)."""
    return checks.scalar_table(name, [checks.scalar_row(name, value, count)])


def outputs(out: Sequence[Tensor] | None, weights: list[Tensor]) -> list[Tensor] | None:
    """What is written instead of the weights, if anything."""
    return None if out is None else checks.companions("out", out, weights, (weights[0].dtype,))
