"""A low-rank matrix over the root of another, element by element:  c (A diag(m) B^T) / sqrt((A A) diag(v) (B B)^T + e).

TeZO-Adam's update (2501.19057).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from .part import Operands, Part, pick, scale_row
from .weight import Amounts, Weight, scalar_if_equal


class Ratio(NamedTuple):
    """What a weight's quotient is made of: factors A (m, r) and B (n, r), moments m and v (r,)."""

    left: Tensor
    right: Tensor
    first: Tensor
    second: Tensor


class Quotient(Part):
    """Quotients of one rank, of an update: they cannot be shown to a forward.

    Args:
        weights: matrices (m, n).
        ratios: what the quotient of each is made of.
        e: of all.
        row: c of each weight.
    """

    def __init__(self, weights: Sequence[Weight], ratios: Sequence[Ratio], e: float, row: Sequence[float]) -> None:
        super().__init__(weights)
        self.ratios, self.e, self.row = list(ratios), e, list(row)

    def coefficients(self) -> list[Sequence[float]]:
        return [self.row]

    def scaled(self, amounts: Amounts) -> Quotient:
        other = copy.copy(self)
        other.row = scale_row(self.row, self.indices, amounts)
        return other

    def plus(self, other: Part) -> None:
        return None

    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        left, right, first, second = (list(each) for each in zip(*self.ratios, strict=True))
        ops.lowrank_perturb_(
            tensors,
            left,
            right,
            core=first,
            below=second,
            e=self.e,
            coefficient=scalar_if_equal(self.row),
            tensor_ids=self.ids,
            slices=self.slices,
            **options,
        )

    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Quotient:
        return Quotient(self._chosen(chosen, tensors), pick(self.ratios, chosen), self.e, pick(self.row, chosen))

    def layout(self) -> Hashable:
        return "quotient", self.indices

    def operands(self) -> Operands:
        raise NotImplementedError("a quotient is an update; a forward cannot be shown it")
