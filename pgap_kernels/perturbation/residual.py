"""A second 16-bit plane beside 16-bit weights, so that an update of any size survives.

bfloat16:  W + R is a float32: W its value to nearest, R the difference of the bit patterns; nothing is lost.
float16:   W + R 2^-15 ulp(W), which is a float32 without loss from 2^-14 up, and 2^-39 exact below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..directions import Part, Pass, RulePass, Weight, write_context
from .step_context import version_of

_FP16_BITS, _FP16_LOWEST = 10, -14
_FRACTION = 15  # bits of an ulp of float16 that are kept


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that a weight and its plane stand for."""
    if high.dtype == torch.bfloat16:
        bits = (high.view(torch.int16).int() << 16) + low.int()
        # Of a weight that others have written the plane may make another number: a zero with a negative plane a NaN.
        kept = ((bits + 0x8000) >> 16).to(torch.int16) == high.view(torch.int16)
        kept &= (bits & 0x7F800000) != 0x7F800000
        return torch.where(kept, bits, bits - low.int()).view(torch.float32)
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


@dataclass(frozen=True)
class ResidualPass(Pass):
    """A pass in float32 over weights that have planes: it reads both and writes both."""

    planes: Sequence[Tensor] = ()

    @property
    def written(self) -> list[Tensor]:
        return [*self.part.tensors, *self.planes]

    def run(self) -> None:
        highs = [t.detach() for t in self.part.tensors]
        masters = [joined(high, low) for high, low in zip(highs, self.planes, strict=True)]
        Pass(self.part.select(range(len(masters)), masters), self.decay).run()
        with write_context(highs):
            for master, high, low in zip(masters, highs, self.planes, strict=True):
                split(master, high, low)

    def inverse(self) -> ResidualPass:
        back = super().inverse()
        assert back is not None
        return replace(self, part=back.part, decay=back.decay)


class Residual:
    """The planes of the 16-bit weights among these. Planes of ``before`` are kept, those of frozen weights included."""

    def __init__(self, weights: Sequence[Weight], before: Residual | None = None) -> None:
        known, kinds = ({}, {}) if before is None else (before.planes, before.kinds)
        ours = {w.name for w in weights}
        # A plane belongs to the dtype and shape of its weight.
        self.planes: dict[str, Tensor] = {name: plane for name, plane in known.items() if name not in ours}
        self.kinds: dict[str, tuple] = {name: kinds[name] for name in self.planes}
        for w in weights:
            if w.tensor.dtype == torch.float32:
                continue
            dtype, shape = kinds.get(w.name, (None, None))
            self.kinds[w.name] = (w.tensor.dtype, w.tensor.shape)
            if shape == w.tensor.shape and dtype in (None, w.tensor.dtype):
                self.planes[w.name] = known[w.name].to(w.tensor.device)
            else:
                zeros = torch.zeros_like(w.tensor, dtype=torch.int16, memory_format=torch.contiguous_format)
                self.planes[w.name] = zeros
        self.largest = max((w.tensor.numel() for w in weights), default=0)
        # Weights and their versions as we left them; those of ``before``, which serves no more, go on.
        self.left: dict[str, tuple[int, int | None]] = {} if before is None else before.left

    def note(self, weights: Sequence[Weight]) -> None:
        """These are as we leave them."""
        self.left |= {w.name: (id(w.tensor), version_of(w.tensor)) for w in weights if w.name in self.planes}

    def follow(self, weights: Sequence[Weight]) -> None:
        """Planes of weights that somebody else has written since are 0: the weight is what was written."""
        for w in weights:
            tensor, version = self.left.get(w.name, (0, None))
            if tensor == id(w.tensor) and version != version_of(w.tensor):
                self.planes[w.name].zero_()
        self.note(weights)

    def load(self, planes: dict[str, Tensor]) -> None:
        """Take over the planes of a ``state_dict``; weights that were frozen when it was made have none there.

        Those of weights that are frozen now wait until they are not.
        """
        self.left = {}  # the weights of that moment may be loaded later
        for name in planes.keys() - self.planes.keys():
            self.planes[name], self.kinds[name] = planes[name].clone(), (None, planes[name].shape)
        for name, plane in self.planes.items():
            if name in planes:
                plane.copy_(planes[name])
            else:
                plane.zero_()

    def serves(self, part: Part) -> bool:
        """Whether the part's weights have planes."""
        return part.weights[0].name in self.planes

    def split(self, p: Pass) -> list[Pass]:
        """The passes that make up a pass, each over no more elements than the largest weight has.

        Raises:
            ValueError: the pass has a rule, whose kernel reads 16-bit weights.
        """
        if isinstance(p, RulePass):
            raise ValueError("residual: got True with an update by a rule; accepted: methods without one")
        decay = p.decay or [0.0] * len(p.weights)
        return [
            ResidualPass(p.part.select(chosen), [decay[i] for i in chosen], None, self._planes_of(p, chosen))
            for chosen in self._batches(p.weights)
        ]

    def _planes_of(self, p: Pass, chosen: Sequence[int]) -> list[Tensor]:
        return [self.planes[p.weights[i].name] for i in chosen]

    def _batches(self, weights: Sequence[Weight]) -> Iterator[list[int]]:
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
