"""float64 values beside bounds on what float32 arithmetic may be off by (running error analysis)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-24  # half an ulp of float32
TINY = 2.0**-150  # half the smallest float32


@dataclass
class Bounded:
    """A value and a bound on the error of the same operations in float32, each result rounded once.

    An fma drops a rounding and a folded scalar moves one, so they stay within the bound of the plain formula.
    """

    value: Tensor
    error: Tensor

    def rounded(self, unit: float = UNIT, tiny: float = TINY) -> Bounded:
        return Bounded(self.value, self.error + unit * (self.value.abs() + self.error) + tiny)

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other: Bounded) -> Bounded:
        return self + -other

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return Bounded(self.value * other.value, error).rounded()

    def __truediv__(self, other: Bounded) -> Bounded:
        value = self.value / other.value
        return Bounded(value, (self.error + value.abs() * other.error) / (other.value.abs() - other.error)).rounded()

    def sqrt(self) -> Bounded:
        root = self.value.sqrt()
        return Bounded(root, torch.where(self.value > 0, self.error / root, self.error.sqrt())).rounded()

    def maximum(self, other: Bounded) -> Bounded:
        return Bounded(self.value.maximum(other.value), self.error.maximum(other.error))

    def stored(self, dtype: torch.dtype, stochastic: bool = False) -> Bounded:
        """Rounded to a weight's dtype: by half an ulp, or stochastically by one."""
        if dtype == torch.float32:
            return self
        info, ulps = torch.finfo(dtype), 2 if stochastic else 1
        return self.rounded(ulps * info.eps / 2, ulps * info.smallest_normal * info.eps / 2)

    def holds(self, got: Tensor) -> bool:
        """Whether a result is within the bound everywhere."""
        return bool(((got.double() - self.value).abs() <= self.error).all())


def known(x: Tensor) -> Bounded:
    """A float32 tensor, exactly."""
    return Bounded(x.double(), torch.zeros(x.shape, dtype=torch.float64))


def scalar(x: float) -> Bounded:
    """A float that the op rounds to float32."""
    return Bounded(torch.tensor(x, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).rounded()
