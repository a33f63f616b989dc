"""Folded: directions U Z V^T act on a layer's output, updates gather in a core, W is written once per window.

    forward of a layer:   y <- s x W^T + b + (x V) (C + a Z)^T U^T        the module has made x W^T + b
    update:               C <- (1 - d) C - lr rho Z,   s <- (1 - d) s     C (r, r) float32, s in float64 on the host
    merge:                W <- round_stochastic(s W + U C V^T),   C <- 0,   s <- 1

Dense directions, on tensors that are no matrix or as probes of a refresh, take the scratch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops._library import torch_ops
from ..ops.forward import add_lowrank_
from .base import Update, Write, all_or_nothing
from .direction import Direction, PerWeight, Subspace, Term, Weight, buckets, sum_of_cores
from .hooks import EMBEDDING, LINEAR, Place, Use
from .scratch import CLEAN, DENSE, SUBSPACE, Scratch, Slot


class Window:
    """What a matrix has gathered since its weight was last written: s W + U C V^T."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        rank, device = left.shape[1], left.device
        self.core = torch.zeros(rank, rank, device=device, dtype=torch.float32)
        self.keep = 1.0  # s
        self.keep_there = torch.ones((), device=device, dtype=torch.float32)
        self.open = False

    def pair(self, moved: Tensor) -> list[Tensor]:
        """C + a Z and C - a Z."""
        return [self.core + moved, self.core - moved]

    def show(self, slot: Slot) -> None:
        """The forward sees U C V^T alone."""
        if slot.subspace is None:
            slot.subspace = (self.left, self.right, torch.empty_like(self.core))
        slot.kind, slot.stands = SUBSPACE, False
        slot.subspace[2].copy_(self.core)

    def assign(self, core: Tensor | None, keep: float) -> None:
        """Another C, in the same memory, and another s; None closes the window."""
        self.open = core is not None
        self.keep = keep
        self.keep_there.fill_(keep)
        self.core.zero_() if core is None else self.core.copy_(core)


def foldable(uses: Sequence[Use], number: int) -> str | None:
    """Why directions of a weight cannot be folded into the outputs of its modules, or None."""
    for use in uses:
        for place in use.places:
            if place.weight == number and (use.kind is None or place.name != "weight"):
                where = f"{use.name}.{place.name}" if use.name else place.name
                return f"{where} belongs to a {type(use.module).__name__}"
    return None


class Folded(Scratch):
    """Perturbs the outputs of linear layers and embeddings, and everything else as ``Scratch``."""

    mode: ClassVar[str] = "folded"

    def __init__(self, weights: Sequence[Weight], model: nn.Module, **options: bool) -> None:
        self.windows: dict[int, Window] = {}
        super().__init__(weights, model, **options)

    def adopt(self, weights: Sequence[Weight]) -> None:
        super().adopt(weights)
        self.windows = {}
        self.open = self.shrinks = False

    @property
    def pending(self) -> bool:
        return self.open

    def stand(self, direction: Direction, amount: PerWeight) -> None:
        super().stand(direction, amount)
        idle = [n for n, window in self.windows.items() if window.open and self.slots[n].kind == CLEAN]
        for number in idle:
            self.windows[number].show(self.slots[number])
        self.open = any(window.open for window in self.windows.values())
        self.shrinks = any(window.keep != 1.0 for window in self.windows.values())

    def _stand_in_subspace(self, part: Subspace, slots: list[Slot], values: list[float]) -> None:
        super()._stand_in_subspace(part, slots, values)
        for number, slot in self._numbered(slots):
            window = self.windows.get(number)
            assert slot.subspace is not None
            if window is None or window.left is not slot.subspace[0]:
                assert window is None or not window.open, "a window is merged before its subspace changes"
                self.windows[number] = Window(*slot.subspace[:2])
            elif window.open and not self.paired:
                slot.subspace[2].add_(window.core)

    def _numbered(self, slots: Sequence[Slot]) -> list[tuple[int, Slot]]:
        numbers = {id(slot): number for number, slot in enumerate(self.slots)}
        return [(numbers[id(slot)], slot) for slot in slots]

    @property
    def graph_key(self) -> tuple:
        across = [n for n, w in self.windows.items() if w.open and (self.paired or self.slots[n].kind == DENSE)]
        return (*super().graph_key, self.shrinks, tuple(across))

    # ---- a forward --------------------------------------------------------------------------------------------------

    def fills(self, place: Place) -> bool:
        return self.slots[place.weight].kind == DENSE

    def fill(self, place: Place, out: Tensor, sign: int) -> None:
        super().fill(place, out, sign)
        window = self.windows.get(place.weight)
        if window is not None and window.open:
            self._add_window(self.slots[place.weight], window, out)

    def _add_window(self, slot: Slot, window: Window, out: Tensor) -> None:
        """W + a z  ->  s W + a z + U C V^T, in the buffer: a dense direction across an open window."""
        if self.shrinks:
            out.sub_(slot.tensor * (1.0 - window.keep_there))
        torch_ops.lowrank_perturb_(
            [out],
            left=[window.left],
            right=[window.right],
            core=[window.core],
            keys=slot.no_keys,
            coefficient=slot.one[0],
            decay=slot.none[0],
            tensor_ids=[slot.id],
            rank=window.left.shape[1],
            core_kind="full",
        )

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.active and not self.open:
            return None
        begin = 0.0 if torch.compiler.is_compiling() else time.perf_counter()
        use = self.uses[number]
        for place in use.places:
            if self.slots[place.weight].kind == SUBSPACE:
                x = args[0] if args else next(iter(kwargs.values()))
                output = self._fold(use, place.weight, x, output)
        if not torch.compiler.is_compiling():
            self.seconds += time.perf_counter() - begin
        kept = super().leave(number, args, kwargs, output)
        return output if kept is None else kept

    def _fold(self, use: Use, weight: int, x: Tensor, output: Tensor) -> Tensor:
        slot, window = self.slots[weight], self.windows[weight]
        assert slot.subspace is not None
        left, right, core = slot.subspace
        if self.shrinks:
            output = self._shrunk(use, window, output)
        output, transposed = output.contiguous(), use.kind != LINEAR
        if torch.is_grad_enabled() and output.requires_grad:  # a first-order use between steps: in PyTorch's own ops
            into, m, out_of = (left, core, right) if transposed else (right, core.T, left)
            t = into[x] if use.kind == EMBEDDING else x.float() @ into
            return output + (t @ m @ out_of.T).to(output.dtype)
        if torch.compiler.is_compiling():
            torch_ops.lowrank_forward_(output, x, left=left, right=right, cores=[core], transposed=transposed)
        else:
            pair = self.paired and self.active and slot.stands
            cores = window.pair(core) if pair else [core]
            add_lowrank_(output, x, left=left, right=right, cores=cores, transposed=transposed)
        return output

    def _shrunk(self, use: Use, window: Window, output: Tensor) -> Tensor:
        """s (y - b) + b, with the b that the module has added."""
        output = output * window.keep_there
        bias = use.module._parameters.get("bias") if use.kind != EMBEDDING else None
        if bias is None:
            return output
        biases: list[Tensor] = [bias]
        if self.paired and self.active:  # the halves have had one each, and given them back
            for place in use.places:
                if place.name == "bias" and self.fills(place):
                    biases = [torch.empty_like(bias), torch.empty_like(bias)]
                    self.fill(place, biases[0], 1)
                    self.fill(place, biases[1], -1)
        halves = zip(output.chunk(len(biases)), biases, strict=True)
        return torch.cat([y + (b * (1 - window.keep_there)).to(y.dtype) for y, b in halves])

    # ---- updates ----------------------------------------------------------------------------------------------------

    def commit(self, update: Update, rounding_key: int) -> None:
        writes: list[Write] = []
        gathered: dict[int, tuple[Tensor, float]] = {
            number: (window.core, window.keep) for number, window in self.windows.items() if window.open
        }
        for terms, decay in update.by_part():
            if isinstance(terms[0].part, Subspace):
                gathered.update(self._gathered(terms, decay))
            else:
                writes += self.landing(terms, decay, rounding_key)
        if update.closing:
            writes += self._merges(gathered, rounding_key)
        all_or_nothing(writes, self.largest)
        self.written += 1
        for number, (core, keep) in gathered.items():
            self.windows[number].assign(*((None, 1.0) if update.closing else (core, keep)))
        self.stand([], lambda _: 0.0)

    def _gathered(self, terms: list[Term], decay: list[float]) -> dict[int, tuple[Tensor, float]]:
        """C and s of each matrix of a part after an update; nothing is written."""
        part = terms[0].part
        assert isinstance(part, Subspace)
        cores, coefficient = sum_of_cores(terms)
        number_of = {id(w.tensor): number for number, w in enumerate(self.weights)}
        numbers = [number_of[id(t)] for t in part.tensors]
        windows = [self.windows[number] for number in numbers]
        keep = [1.0 - d for d in decay]
        total = torch._foreach_mul([w.core for w in windows], keep)
        torch._foreach_add_(total, torch._foreach_mul(cores, coefficient))
        kept = [w.keep * k for w, k in zip(windows, keep, strict=True)]
        return dict(zip(numbers, zip(total, kept, strict=True), strict=True))

    def _merges(self, gathered: dict[int, tuple[Tensor, float]], rounding_key: int) -> list[Write]:
        names = {self.weights[number].name: number for number in gathered}
        weights = [self.weights[number] for number in gathered]
        writes = []
        for bucket in buckets(weights, also=lambda w: self.windows[names[w.name]].left.shape[1]):
            numbers = [names[w.name] for w in bucket]
            windows = [self.windows[n] for n in numbers]
            part = Subspace(
                bucket,
                [w.left for w in windows],
                [w.right for w in windows],
                [gathered[n][0] for n in numbers],
                [1.0] * len(bucket),
            )
            term = Term(part, [1.0] * len(bucket))
            writes += self.landing([term], [1.0 - gathered[n][1] for n in numbers], rounding_key)
        return writes

    def merge(self) -> None:
        gathered = {n: (window.core, window.keep) for n, window in self.windows.items() if window.open}
        if not gathered:
            return
        all_or_nothing(self._merges(gathered, self.merge_key), self.largest)
        for number in gathered:
            self.windows[number].assign(None, 1.0)
        self.stand([], lambda _: 0.0)
