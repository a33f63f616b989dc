"""Numbers that count their roundings: a formula run on them bounds what float32 arithmetic may make of it.

A sum of products, computed in whatever order, differs from its exact value by at most depth * UNIT * size, where no
term is rounded more often than ``depth`` times and size is the same formula on absolute values (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1). Quotients and roots are bounded likewise, by relative errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bounds import UNIT, Bounded

SECOND_ORDER = 1.001  # products of roundings


class Counted:
    """A float64 value of float32 arithmetic.

    Attributes:
        value: what exact arithmetic gives.
        size: the sum of its terms' absolute values.
        error: how far the inputs may be off, carried to here; None for inputs that are exact.
        depth: the most roundings of a term. A product with a float counts two, as the float is rounded too.
    """

    def __init__(self, value: Tensor, size: Tensor | None = None, error: Tensor | None = None, depth: int = 0) -> None:
        self.value, self.depth = value, depth
        self.size = value.abs() if size is None else size
        self.error = error

    @property
    def off(self) -> Tensor:
        """``error``, zero where there is none."""
        return torch.zeros_like(self.size) if self.error is None else self.error

    def bound(self, more: int = 0) -> Tensor:
        """How far the computed value may be off after so many roundings more."""
        return SECOND_ORDER * total(self.error, (self.depth + more) * UNIT * self.size)

    def arithmetic(self, more: int = 0) -> Tensor:
        """The part of ``bound`` that the inputs' errors have no part in."""
        return SECOND_ORDER * (self.depth + more) * UNIT * self.size

    def settled(self, error: Tensor) -> Counted:
        """The same value as an input of what follows, off by at most so much."""
        return Counted(self.value, self.size, error)

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def __add__(self, other: Counted | float) -> Counted:
        if not isinstance(other, Counted):
            return Counted(self.value + other, self.size + abs(other), self.error, self.depth + 2)
        depth = max(self.depth, other.depth) + 1
        return Counted(self.value + other.value, self.size + other.size, total(self.error, other.error), depth)

    def __neg__(self) -> Counted:
        return Counted(-self.value, self.size, self.error, self.depth)

    def __sub__(self, other: Counted | float) -> Counted:
        return self + -other

    def __mul__(self, other: Counted | float) -> Counted:
        if isinstance(other, Counted):
            return self._product(other, torch.mul, 1)
        amount = abs(other)
        error = None if self.error is None else self.error * amount
        return Counted(self.value * other, self.size * amount, error, self.depth + 2)

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: Counted) -> Counted:
        return self._product(other, torch.matmul, 1 + other.value.shape[0])

    def _product(self, other: Counted, product, roundings: int) -> Counted:
        error = None
        if other.error is not None:
            error = product(total(self.size, self.error), other.error)
        if self.error is not None:
            error = total(error, product(self.error, other.size))
        depth = self.depth + other.depth + roundings
        return Counted(product(self.value, other.value), product(self.size, other.size), error, depth)

    def __truediv__(self, other: Counted | float) -> Counted:
        if not isinstance(other, Counted):
            return self * (1 / other)
        denominator = other.value.abs()
        size = self.size * other.size / denominator**2
        error = None if self.error is None else self.error / denominator
        if other.error is not None:
            error = total(error, self.size * other.error / denominator**2)
        return Counted(self.value / other.value, size, error, self.depth + other.depth + 1)

    def __pow__(self, power: int) -> Counted:
        assert power == 2
        return self * self

    def sqrt(self) -> Counted:
        """Of what is positive; a relative error is halved."""
        root = self.value.sqrt()
        error = None if self.error is None else self.error / root
        return Counted(root, root * self.size / self.value, error, self.depth + 1)

    def clamp(self, min: float) -> Counted:
        size = torch.maximum(self.size, torch.tensor(min, dtype=self.size.dtype))
        return Counted(self.value.clamp(min=min), size, self.error, self.depth + 1)

    def sum(self, *dim: int) -> Counted:
        terms = self.value.shape[dim[0]] if dim else self.value.numel()
        summed = self._each(lambda t: t.sum(*dim))
        return Counted(summed.value, summed.size, summed.error, self.depth + terms)

    def norm(self) -> Counted:
        return (self * self).sum().sqrt()

    def __float__(self) -> float:
        return float(self.value)

    # ---- shape ------------------------------------------------------------------------------------------------------

    def _each(self, change) -> Counted:
        parts = (None if t is None else change(t) for t in (self.value, self.size, self.error))
        return Counted(*parts, self.depth)

    def __getitem__(self, key) -> Counted:
        return self._each(lambda t: t[key])

    def __len__(self) -> int:
        return len(self.value)

    @property
    def T(self) -> Counted:
        return self._each(lambda t: t.T)

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def dim(self) -> int:
        return self.value.dim()

    def numel(self) -> int:
        return self.value.numel()

    def view(self, shape: tuple[int, ...]) -> Counted:
        return self._each(lambda t: t.view(shape))

    def diag(self) -> Counted:
        return self._each(torch.diag)

    def diagonal(self) -> Counted:
        return self._each(torch.diagonal)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Counted:
        assert function is torch.stack, function
        numbers = args[0]
        assert all(n.error is None for n in numbers)
        each = (torch.stack([getattr(n, name) for n in numbers]) for name in ("value", "size"))
        return Counted(*each, None, max(n.depth for n in numbers))


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of two errors, either of which may be none."""
    if a is None or b is None:
        return a if b is None else b
    return a + b


def known(tensor: Tensor) -> Counted:
    """A tensor, exactly."""
    return Counted(tensor.detach().double())


# ---- layers ---------------------------------------------------------------------------------------------------------
# Of an activation the value and how far it may be off; its own terms no longer matter.

# Roundings of a term beyond its layer's sum of products: the parts of a direction that moves the output, s, the bias.
LAYER = 10


def activation(y: Counted, dtype: torch.dtype, more: int = LAYER) -> Counted:
    """What a layer hands on: in a 16-bit dtype rounded as often as twice, as a direction moves the stored output."""
    kept = Bounded(y.value, y.bound(more)).stored(dtype).stored(dtype)
    return Counted(kept.value, error=kept.error)


def linear(x: Counted, weight: Counted, bias: Counted | None, dtype: torch.dtype) -> Counted:
    """x W^T + b, whether W is one tensor or a sum on its way through U Z V^T."""
    y = x @ weight.T
    return activation(y if bias is None else y + bias, dtype)


def layer_norm(x: Counted, scale: Counted, shift: Counted, dtype: torch.dtype, eps: float = 1e-5) -> Counted:
    """Mean and variance by any stable algorithm (n kappa u, Chan, Golub, LeVeque 1983), then a sum of two products."""
    n = x.value.shape[-1]
    mean = x.value.mean(-1, keepdim=True)
    mean_error = x.off.mean(-1, keepdim=True) + n * UNIT * x.size.mean(-1, keepdim=True)
    off, moved = x.value - mean, x.off + mean_error
    variance = off.square().mean(-1, keepdim=True)
    variance_error = (2 * off.abs() * moved + moved.square()).mean(-1, keepdim=True)
    variance_error += 4 * n * UNIT * x.value.square().mean(-1, keepdim=True)
    root = (variance + eps).rsqrt()
    root_error = root * (0.5 * variance_error / (variance + eps - variance_error) + 4 * UNIT)
    unit_error = moved * root + (off.abs() + moved) * root_error + 4 * UNIT * root * (x.size + mean.abs())
    return activation(Counted(off * root, error=unit_error) * scale + shift, dtype, 4)
