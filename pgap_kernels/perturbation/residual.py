"""A second 16-bit plane beside 16-bit weights, so that an update of any size survives.

bfloat16:  W + R is a float32: W its value to nearest, R the difference of the bit patterns; nothing is lost.
float16:   W + R 2^-15 ulp(W), which is a float32 without loss from 2^-14 up, and 2^-39 exact below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .direction import Part, Term, Weight

_FP16_BITS, _FP16_LOWEST = 10, -14
_FRACTION = 15  # bits of an ulp of float16 that are kept


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that a weight and its plane stand for."""
    if high.dtype == torch.bfloat16:
        return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)
    return high.float() + torch.ldexp(low.float(), _ulp_exponent(high) - _FRACTION)


def split(value: Tensor, high: Tensor, low: Tensor) -> None:
    """Inverse of ``joined``, written into both planes."""
    if high.dtype == torch.bfloat16:
        bits = value.view(torch.int32)
        top = (bits + 0x8000) >> 16
        finite = (bits & 0x7F800000) != 0x7F800000
        top = torch.where(finite, top, value.to(torch.bfloat16).view(torch.int16).int())
        high.copy_(top.to(torch.int16).view(torch.bfloat16))
        low.copy_(torch.where(finite, bits - (top << 16), 0))
        return
    high.copy_(value)
    rest = torch.ldexp(value - high.float(), _FRACTION - _ulp_exponent(high))
    low.copy_(torch.where(rest.isfinite(), rest, 0.0).round())


def _ulp_exponent(high: Tensor) -> Tensor:
    exponent = torch.frexp(high.float()).exponent - 1
    return exponent.clamp(min=_FP16_LOWEST) - _FP16_BITS


class Residual:
    """The planes of the 16-bit weights among these; those of weights that ``before`` has go on."""

    def __init__(self, weights: Sequence[Weight], before: Residual | None = None) -> None:
        known = before.planes if before is not None else {}
        self.planes: dict[str, Tensor] = {
            w.name: known[w.name]
            if w.name in known
            else torch.zeros_like(w.tensor, dtype=torch.int16, memory_format=torch.contiguous_format)
            for w in weights
            if w.tensor.dtype != torch.float32
        }
        self.largest = max((w.tensor.numel() for w in weights), default=0)

    def load(self, planes: dict[str, Tensor]) -> None:
        """Take over the planes of a ``state_dict``."""
        for name, plane in self.planes.items():
            plane.copy_(planes[name])

    def serves(self, part: Part) -> bool:
        """Whether the part's weights have planes."""
        return part.weights[0].name in self.planes

    def tensors(self, part: Part, chosen: Sequence[int]) -> list[Tensor]:
        """Some of the part's weights and their planes."""
        return [part.tensors[i] for i in chosen] + [self.planes[part.weights[i].name] for i in chosen]

    def write(self, part: Part, chosen: Sequence[int], terms: Sequence[Term], decay: list[float]) -> None:
        """The pass of ``Part.write`` over some of its weights, made in float32."""
        masters = [joined(part.tensors[i].detach(), self.planes[part.weights[i].name]) for i in chosen]
        moved = [Term(t.part.subset(chosen, masters), _at(t.coefficient, chosen)) for t in terms]
        moved[0].part.write(moved, _at(decay, chosen), {})
        for i, master in zip(chosen, masters, strict=True):
            split(master, part.tensors[i].detach(), self.planes[part.weights[i].name])

    def batches(self, weights: Sequence[Weight]) -> Iterator[list[int]]:
        """Numbers of a part's weights, no more at a time than the largest has elements."""
        batch: list[int] = []
        elements = 0
        for i, w in enumerate(weights):
            if batch and elements + w.tensor.numel() > self.largest:
                yield batch
                batch, elements = [], 0
            batch.append(i)
            elements += w.tensor.numel()
        if batch:
            yield batch


def _at(values: list[float], chosen: Sequence[int]) -> list[float]:
    return [values[i] for i in chosen]
