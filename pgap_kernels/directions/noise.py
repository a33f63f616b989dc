"""Dense seeded noise, plain, masked or preconditioned.

sum_j c_j z(key_j)          times a mask of 0 and 1, or times H^(-1/2) of a diagonal curvature H
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, ops
from .part import Operands, Part, add_rows, pick, scale_row
from .weight import Amounts, Weight, scalar_if_equal


class Mask(NamedTuple):
    """Which elements noise reaches; exactly one is given, as in ``ops.masked_perturb_``.

    A threshold is compared with the weights that the pass reads, so it suits modes that do not write perturbations. In
    place the mask has to be stored as ``bits``.
    """

    threshold: list[float] | None = None
    share: tuple[int, float] | None = None
    bits: list[Tensor] | None = None

    def select(self, chosen: Sequence[int]) -> Mask:
        """The mask of some of the weights."""
        threshold, bits = (None if v is None else pick(v, chosen) for v in (self.threshold, self.bits))
        return Mask(threshold, self.share, bits)


class Noise(Part):
    """A combination of seeded draws on the weights.

    Args:
        weights: of one device and dtype.
        draws: coefficients by key, a row with one number for each weight.
        distribution: "normal" or "rademacher".
        mask: of the elements that move.
        curvature: H > 0 of each weight, float32; the noise is divided by its root.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        draws: Mapping[int, Sequence[float]],
        distribution: str = "normal",
        mask: Mask | None = None,
        curvature: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(weights)
        if mask is not None and curvature is not None:
            raise ValueError("mask, curvature: got both; accepted: one of them")
        self.draws = dict(draws)
        self.distribution, self.mask = distribution, mask
        self.curvature = None if curvature is None else list(curvature)

    def _with(self, draws: Mapping[int, Sequence[float]]) -> Noise:
        other = copy.copy(self)
        other.draws = dict(draws)
        return other

    def coefficients(self) -> list[Sequence[float]]:
        return list(self.draws.values())

    def scaled(self, amounts: Amounts) -> Noise:
        return self._with({key: scale_row(row, self.indices, amounts) for key, row in self.draws.items()})

    def plus(self, other: Part) -> Noise | None:
        if not isinstance(other, Noise) or self._stream() != other._stream():
            return None
        total = dict(self.draws)
        for key, row in other.draws.items():  # a key that both have takes one draw
            total[key] = add_rows(total[key], row) if key in total else row
        return self._with(total)

    def _stream(self) -> Hashable:
        """Equal for parts whose draws one pass can add up."""
        mask = self.mask and (self.mask.share, _identity(self.mask.bits), tuple(self.mask.threshold or ()))
        return self.indices, self.distribution, mask, _identity(self.curvature)

    def plain_draws(self) -> Mapping[int, Sequence[float]] | None:
        plain = self.mask is None and self.curvature is None and self.distribution == "normal"
        return self.draws if plain else None

    def draws_over(self, curvature: Sequence[Tensor]) -> Mapping[int, Sequence[float]] | None:
        """Draws of plain noise divided by the root of that curvature; None if it is something else."""
        same = self.curvature is not None and _identity(self.curvature) == _identity(curvature)
        return self.draws if same and self.distribution == "normal" else None

    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        draws = [(key, scalar_if_equal(row)) for key, row in self.draws.items()]
        options |= {"tensor_ids": self.ids, "distribution": self.distribution, "slices": self.slices}
        if self.mask is not None:
            ops.masked_perturb_(tensors, draws, **self.mask._asdict(), **options)
        elif self.curvature is not None:
            ops.preconditioned_perturb_(tensors, draws, self.curvature, **options)
        else:
            ops.dense_perturb_(tensors, draws, **options)

    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Noise:
        draws = {key: pick(row, chosen) for key, row in self.draws.items()}
        mask = self.mask and self.mask.select(chosen)
        curvature = self.curvature and pick(self.curvature, chosen)
        return Noise(self._chosen(chosen, tensors), draws, self.distribution, mask, curvature)

    def layout(self) -> Hashable:
        return "noise", self._stream(), len(self.draws)

    def operands(self) -> NoiseOperands:
        return NoiseOperands(self)


class NoiseOperands(Operands):
    """Keys (J,) and coefficients (T, J, 1) of a part of T weights and J draws."""

    def __init__(self, part: Noise) -> None:
        device, count = part.weights[0].tensor.device, len(part.draws)
        self.keys = torch.zeros(count, dtype=torch.int64, device=device)
        self.coefficients = torch.zeros(len(part.weights), count, 1, dtype=torch.float32, device=device)
        self.op = "dense_perturb_"
        # Built once, because fill runs before every layer.
        self.options = [
            dict[str, Any](
                keys=self.keys,
                coefficients=row,
                tensor_ids=[w.id],
                slices=list(w.span or ()),
                distribution=part.distribution,
            )
            for w, row in zip(part.weights, self.coefficients.unbind(), strict=True)
        ]
        for i, options in enumerate(self.options):
            if part.mask is not None:
                self.op = "masked_perturb_"
                options |= _mask_options(part.weights[i].tensor, part.mask.select([i]))
            elif part.curvature is not None:
                self.op = "preconditioned_perturb_"
                options["curvature"] = [part.curvature[i]]
            else:
                options["stages"] = [count]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.coefficients.nbytes

    def load(self, part: Part) -> None:
        assert isinstance(part, Noise)
        keys = [checks.key_bits("key", key) for key in part.draws]
        self.host_keys = torch.tensor(keys, dtype=torch.int64, device="cpu")
        self.rows = torch.tensor(list(part.draws.values()), dtype=torch.float32, device="cpu")  # (J, T)
        self.keys.copy_(self.host_keys)
        self.coefficients.copy_(self.rows.T[..., None])

    def fill(self, position: int, tensor: Tensor, out: Tensor, decay: Tensor) -> None:
        ops.write_into(self.op, [tensor], [out], decay=decay, **self.options[position])

    def fill_all(self, positions: Sequence[int], tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        if self.op != "dense_perturb_":  # each has a mask or a curvature of its own
            super().fill_all(positions, tensors, out)
            return
        options = [self.options[i] for i in positions]
        ops.write_into(
            self.op,
            list(tensors),
            list(out),
            keys=self.host_keys,
            coefficients=self.rows[:, list(positions)],
            decay=torch.zeros(1, 1, dtype=torch.float32, device="cpu"),
            tensor_ids=[x for own in options for x in own["tensor_ids"]],
            slices=[x for own in options for x in own["slices"]],
            distribution=options[0]["distribution"],
            stages=options[0]["stages"],
        )


def _mask_options(tensor: Tensor, mask: Mask) -> dict[str, Any]:
    kind, key, level, bits = ops.mask_arguments([tensor], **mask._asdict())
    key = torch.zeros(1, dtype=torch.int64, device="cpu") if key is None else key
    return {"mask": kind, "mask_key": key, "mask_level": level, "mask_bits": bits}


def _identity(tensors: Sequence[Tensor] | None) -> tuple[int, ...] | None:
    return None if tensors is None else tuple(map(id, tensors))
