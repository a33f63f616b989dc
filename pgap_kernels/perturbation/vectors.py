"""Perturbed copies of the vectors (biases, norms): made for all of them at once, when a point is shown.

A launch for each of them, before its layer, would take longer than the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..directions import Weight
from .arena import in_memory, padded_bytes
from .points import LoadedPart


class Vectors:
    """Memory that keeps its place, for the vectors among some weights in each run of slices at one point."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.size: dict[torch.device, int] = {}
        self.places: dict[int, tuple[Tensor, int]] = {}  # by index: the vector, and the first byte of its copy
        self.memory: dict[tuple[torch.device, int], Tensor] = {}  # by device and run
        self.copies: dict[tuple[int, int], Tensor] = {}  # by index and run
        for w in weights:
            if w.tensor.dim() < 2:
                begin = self.size.get(w.tensor.device, 0)
                self.places[w.index] = w.tensor, begin
                self.size[w.tensor.device] = begin + padded_bytes(w.tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies of a run."""
        return sum(self.size.values())

    def at(self, index: int, run: int) -> Tensor:
        """The copy of a vector for a run."""
        if (index, run) not in self.copies:
            self.copies[index, run] = self._view(index, run)
        return self.copies[index, run]

    def _view(self, index: int, run: int) -> Tensor:
        like, begin = self.places[index]
        key = like.device, run
        if key not in self.memory:
            with torch.inference_mode(False):  # the next forward may run in another inference mode
                self.memory[key] = torch.empty(self.size[like.device], dtype=torch.uint8, device=like.device)
        return self.memory[key][begin : begin + like.nbytes].view(like.dtype).view(like.shape)

    def fill(
        self,
        run: int,
        weights: Sequence[Weight],
        fills: Mapping[int, Sequence[LoadedPart]],
        no_decay: Mapping[torch.device, Tensor],
    ) -> None:
        """Write the copies of vectors for a run, those of a part by one op call.

        A vector's W is what the model has: windows, which fade it, are of matrices.

        Args:
            weights: the vectors that move here or at another point.
            fills: what is added to each, by its index.
            no_decay: zeros that a fill reads, by device.
        """
        first: dict[int, list[tuple[Weight, LoadedPart]]] = {}  # by operands: all first parts that one call can serve
        for w in weights:
            if fills[w.index]:
                loaded = fills[w.index][0]
                first.setdefault(id(loaded.operands), []).append((w, loaded))
            else:
                self.at(w.index, run).copy_(w.tensor)
        for group in first.values():
            group[0][1].operands.fill_all(
                [loaded.position for _, loaded in group],
                [w.tensor for w, _ in group],
                [self.at(w.index, run) for w, _ in group],
            )
        for w in weights:
            for loaded in fills[w.index][1:]:
                out = self.at(w.index, run)
                loaded.operands.fill(loaded.position, out, out, no_decay[out.device])

    def contains(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        return any(in_memory(tensor, memory) for memory in self.memory.values())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "memory": {}, "copies": {}}
