"""Weights on the line through an anchor:  W <- W0 + (1 + a) Delta,  Delta = W - W0 as it was when it was stored.

As a displacement this is a Delta, a vector like any other. It is computed from the anchor, so that many amounts can be
tried one after another without accumulating rounding (DiZO, 2502.03304).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .direction import Direction
from .part import Operands, Part, add_rows, pick, scale_row
from .weight import Amounts, Weight, bucket, scalar_if_equal


class Anchored(Part):
    """a Delta of each weight.

    Args:
        weights: of one device and dtype.
        anchors: W0, in the weights' dtype or float32.
        deltas: Delta, likewise.
        row: a of each weight.
        start: the amount at which the weights that a pass reads already are.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        anchors: Sequence[Tensor],
        deltas: Sequence[Tensor],
        row: Sequence[float],
        start: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weights)
        self.anchors, self.deltas, self.row = list(anchors), list(deltas), list(row)
        self.start = [0.0] * len(self.row) if start is None else list(start)

    def _with(self, row: Sequence[float], start: Sequence[float] | None = None) -> Anchored:
        return Anchored(self.weights, self.anchors, self.deltas, row, start)

    def coefficients(self) -> list[Sequence[float]]:
        return [self.row]

    def scaled(self, amounts: Amounts) -> Anchored:
        return self._with(scale_row(self.row, self.indices, amounts))

    def plus(self, other: Part) -> Anchored | None:
        if not isinstance(other, Anchored) or self._line() != other._line():
            return None
        return self._with(add_rows(self.row, other.row), add_rows(self.start, other.start))

    def removal(self, keep: Sequence[float]) -> Anchored:
        return self.reverted([-k for k in keep])

    def reverted(self, back: Amounts) -> Anchored:
        return self._with(scale_row(self.row, self.indices, back), add_rows(self.start, self.row))

    def _line(self) -> Hashable:
        return self.indices, tuple(map(id, self.anchors)), tuple(map(id, self.deltas))

    def _factors(self) -> list[float]:
        """1 + a."""
        return [1.0 + a + s for a, s in zip(self.row, self.start, strict=True)]

    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        decay = options.pop("decay", 0.0)
        if any(decay) if isinstance(decay, (list, tuple)) else decay:
            raise ValueError("weight_decay: got a decay on weights that move along an anchor; accepted: 0 for those")
        options |= {"deltas": self.deltas, "tensor_ids": self.ids, "slices": self.slices}
        ops.anchor_affine_(tensors, self.anchors, scalar_if_equal(self._factors()), **options)

    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Anchored:
        rows = (pick(values, chosen) for values in (self.anchors, self.deltas, self.row, self.start))
        return Anchored(self._chosen(chosen, tensors), *rows)

    def layout(self) -> Hashable:
        return "anchored", self.indices

    def operands(self) -> AnchoredOperands:
        return AnchoredOperands(self)


def line_through(weights: Sequence[Weight], anchors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Direction:
    """Delta of each weight, whatever its device and dtype: W + a Delta is W0 + (1 + a) Delta."""
    origin = {w.index: pair for w, *pair in zip(weights, anchors, deltas, strict=True)}
    parts = []
    for same in bucket(weights):
        own_anchors, own_deltas = zip(*(origin[w.index] for w in same), strict=True)
        parts.append(Anchored(same, own_anchors, own_deltas, [1.0] * len(same)))
    return Direction(parts)


class AnchoredOperands(Operands):
    """1 + a of each weight, (T, 1, 1)."""

    def __init__(self, part: Anchored) -> None:
        device = part.weights[0].tensor.device
        self.anchors: list[Tensor] = []
        self.deltas: list[Tensor] = []
        self.coefficients = torch.ones(len(part.weights), 1, 1, dtype=torch.float32, device=device)
        self.options = [
            dict[str, Any](coefficient=row, tensor_ids=[w.id], slices=list(w.span or ()))
            for w, row in zip(part.weights, self.coefficients.unbind(), strict=True)
        ]

    @property
    def nbytes(self) -> int:
        return self.coefficients.nbytes

    def load(self, part: Part) -> None:
        assert isinstance(part, Anchored)
        self.anchors, self.deltas = part.anchors, part.deltas
        values = torch.tensor(part._factors(), dtype=torch.float32, device="cpu")
        self.coefficients.copy_(values[:, None, None])

    def unload(self) -> None:
        self.anchors, self.deltas = [], []

    def fill(self, position: int, tensor: Tensor, out: Tensor, decay: Tensor) -> None:
        ops.write_into(
            "anchor_affine_",
            [tensor],
            [out],
            anchors=[self.anchors[position]],
            deltas=[self.deltas[position]],
            **self.options[position],
        )

    def outside(self) -> Sequence[Tensor | None]:
        return [*self.anchors, *self.deltas]
