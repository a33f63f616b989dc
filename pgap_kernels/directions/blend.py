"""Draws around a stored tensor:  c (a_1 z(key_1) + a_2 z(key_2) + ... + b T)."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops
from .part import Operands, Part, add_rows, pick, scale_row
from .weight import Amounts, Weight


class Blend(Part):
    """A combination of seeded normal noise and a stored tensor of each weight, times a factor of each.

    Args:
        weights: of one device and dtype.
        draws: a_j by key.
        tensors: T of each weight, float32, of its shape.
        share: b.
        factors: c of each weight.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        draws: Mapping[int, float],
        tensors: Sequence[Tensor],
        share: float,
        factors: Sequence[float],
    ) -> None:
        super().__init__(weights)
        self.draws, self.stored, self.share, self.factors = dict(draws), list(tensors), share, list(factors)

    def _with(self, factors: Sequence[float]) -> Blend:
        other = copy.copy(self)
        other.factors = list(factors)
        return other

    def coefficients(self) -> list[Sequence[float]]:
        return [self.factors]

    def scaled(self, amounts: Amounts) -> Blend:
        return self._with(scale_row(self.factors, self.indices, amounts))

    def plus(self, other: Part) -> Blend | None:
        if not isinstance(other, Blend) or self._vector() != other._vector():
            return None
        return self._with(add_rows(self.factors, other.factors))

    def _vector(self) -> Hashable:
        """Equal for parts that differ in their factors alone."""
        return self.indices, tuple(self.draws.items()), tuple(map(id, self.stored)), self.share

    def rows(self) -> list[tuple[int, list[float]]]:
        """Keys with a coefficient for each weight."""
        return [(key, [a * c for c in self.factors]) for key, a in self.draws.items()]

    def amounts(self) -> list[float]:
        """What T of each weight is multiplied by."""
        return [self.share * c for c in self.factors]

    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        ops.preconditioned_perturb_(
            tensors, self.rows(), self.stored, around=self.amounts(), tensor_ids=self.ids, slices=self.slices, **options
        )

    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Blend:
        weights = self._chosen(chosen, tensors)
        return Blend(weights, self.draws, pick(self.stored, chosen), self.share, pick(self.factors, chosen))

    def layout(self) -> Hashable:
        return "blend", self.indices, len(self.draws), tuple(map(id, self.stored))

    def operands(self) -> BlendOperands:
        return BlendOperands(self)


class BlendOperands(Operands):
    """Keys (J,), coefficients (T, J, 1) and amounts (T, 1, 1) of a part of T weights and J draws."""

    def __init__(self, part: Blend) -> None:
        device, count = part.weights[0].tensor.device, len(part.draws)
        self.keys = torch.zeros(count, dtype=torch.int64, device=device)
        self.coefficients = torch.zeros(len(part.weights), count, 1, dtype=torch.float32, device=device)
        self.amounts = torch.zeros(len(part.weights), 1, 1, dtype=torch.float32, device=device)
        self.options = [
            dict[str, Any](
                curvature=[stored],
                keys=self.keys,
                coefficients=row,
                around=amount,
                tensor_ids=[w.id],
                slices=list(w.span or ()),
            )
            for w, stored, row, amount in zip(
                part.weights, part.stored, self.coefficients.unbind(), self.amounts.unbind(), strict=True
            )
        ]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.coefficients.nbytes + self.amounts.nbytes

    def load(self, part: Part) -> None:
        assert isinstance(part, Blend)
        keys = [checks.key_bits("key", key) for key in part.draws]
        rows = torch.tensor([row for _, row in part.rows()], dtype=torch.float32, device="cpu")  # (J, T)
        self.keys.copy_(torch.tensor(keys, dtype=torch.int64, device="cpu"))
        self.coefficients.copy_(rows.T[..., None])
        self.amounts.copy_(torch.tensor(part.amounts(), dtype=torch.float32, device="cpu")[:, None, None])

    def fill(self, position: int, tensor: Tensor, out: Tensor, decay: Tensor) -> None:
        ops.write_into("preconditioned_perturb_", [tensor], [out], decay=decay, **self.options[position])
