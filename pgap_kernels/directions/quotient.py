"""A low-rank matrix over the root of another, element by element:  c (A diag(m) B^T) / sqrt((A A) diag(v) (B B)^T + e).

TeZO-Adam's update (2501.19057). It has no kernel of its own: both products are made by PyTorch, one weight at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from .part import Operands, Part, scale_row
from .weight import Amounts, Weight


class Ratio(NamedTuple):
    """What a quotient is made of: factors A (m, r) and B (n, r), moments m and v (r,), and e."""

    left: Tensor
    right: Tensor
    first: Tensor
    second: Tensor
    e: float

    def matrix(self) -> Tensor:
        """The quotient, float32 (m, n)."""
        below = (self.left.square() * self.second) @ self.right.square().T
        return ((self.left * self.first) @ self.right.T).div_(below.add_(self.e).sqrt_())


class Quotient(Part):
    """A quotient on one weight, of an update: it cannot be shown to a forward.

    Args:
        weight: a matrix (m, n).
        ratio: what it is made of.
        factor: c.
    """

    def __init__(self, weight: Weight, ratio: Ratio, factor: float = 1.0) -> None:
        super().__init__([weight])
        self.ratio, self.factor = ratio, factor

    def coefficients(self) -> list[Sequence[float]]:
        return [[self.factor]]

    def scaled(self, amounts: Amounts) -> Quotient:
        other = copy.copy(self)
        (other.factor,) = scale_row([self.factor], self.indices, amounts)
        return other

    def plus(self, other: Part) -> None:
        return None

    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        # The op takes draws; one whose coefficient is 0 leaves the stored matrix alone.
        ops.preconditioned_perturb_(
            tensors,
            [(0, 0.0)],
            [self.ratio.matrix()],
            around=self.factor,
            tensor_ids=self.ids,
            slices=self.slices,
            **options,
        )

    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Quotient:
        (weight,) = self._chosen(chosen, tensors)
        return Quotient(weight, self.ratio, self.factor)

    def layout(self) -> Hashable:
        return "quotient", self.indices

    def operands(self) -> Operands:
        raise NotImplementedError("a quotient is an update; a forward cannot be shown it")
