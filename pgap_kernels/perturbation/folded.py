"""Folded: low-rank directions A C B^T act on a layer's output; the weight is read by its own layer alone.

    forward of a layer:   y <- x W^T + b + (x B) C^T A^T                 the module has made x W^T + b
    update:               W <- round_stochastic((1 - d) W + A C B^T)     one pass a step

With ``merge="window"`` updates gather in a core and W is written once per window:

    forward of a layer:   y <- s x W^T + b + (x B) (G + C)^T A^T
    update:               G <- (1 - d) G + C,   s <- (1 - d) s           G float32, s in float64 on the host
    merge:                W <- round_stochastic(s W + A G B^T),   G <- 0,   s <- 1

Everything else, dense directions and layers that are not linear maps or embeddings, takes the scratch.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..arguments import ForwardArguments
from ..directions import Direction, Fold, Part, Pass, Weight, add_parts
from .base import Update
from .folds import add_lowrank, fold_differentiably, forward_arguments
from .hooks import EMBEDDING, LINEAR, ModuleUse, ParamRef
from .points import LoadedPart
from .scratch import Scratch
from .stacked import check_rows

# Of each weight: what each point adds to its layer's output, and the op calls for that.
Prepared = tuple[list[list[list[Fold]]], list[list[ForwardArguments]]]


class Folded(Scratch):
    """Perturbs the outputs of linear layers and embeddings, and everything else as ``Scratch``.

    Args:
        weights, model, allow_unused: as in ``Scratch``.
        defers: updates that act on outputs gather until ``merge`` or an update that flushes.
    """

    mode: ClassVar[str] = "folded"

    def __init__(self, weights: Sequence[Weight], model: nn.Module, *, defers: bool = False, **options: bool) -> None:
        self.defers = defers
        self.window: list[Part] = []  # what has been gathered, not yet written
        super().__init__(weights, model, **options)

    def set_weights(self, weights: Sequence[Weight]) -> None:
        assert not self.window, "a window is merged before the weights change"
        self.keep = [1.0] * len(weights)  # s
        super().set_weights(weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "captured": [], "folds": [], "calls_of": []}

    def _make_tables(self) -> None:
        super()._make_tables()
        self.captured: list[Prepared] = []  # of these the tensors are read by graphs
        self.foldable = foldable_weights(self.uses)
        shape = (len(self.weights), 1, 1)
        devices = {w.tensor.device for w in self.weights}
        # 1 - s, where fills and outputs read it.
        self.faded = {d: torch.zeros(shape, dtype=torch.float32, device=d) for d in devices}

    @property
    def pending(self) -> bool:
        return bool(self.window)

    @property
    def graph_key(self) -> Hashable:
        return super().graph_key, self.fades

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + sum(part.core_bytes for part in self.window)

    def drop_cached(self) -> None:
        self.window, self.keep = [], [1.0] * len(self.weights)
        super().drop_cached()

    def perturb_to(self, points: Sequence[Direction]) -> None:
        moved = {id(point): self._with_window(point) for point in points}  # points that are the same stay so
        super().perturb_to([moved[id(point)] for point in points])
        self.folds, self.calls_of = self.points.remembered("prepared", self._prepared)
        self.fades = any(s != 1.0 for s in self.keep)
        for faded in self.faded.values():
            faded.copy_(torch.tensor([1.0 - s for s in self.keep], dtype=torch.float32, device="cpu")[:, None, None])

    def _prepared(self) -> Prepared:
        """Of each weight the folds of each point, and the calls that make them."""
        folds = [[self.folds_of(w.index, point) for point in range(self.count)] for w in self.weights]
        return folds, [forward_arguments(w, own) for w, own in zip(self.weights, folds, strict=True)]

    def keep_captured(self) -> None:
        super().keep_captured()
        self.captured.append((self.folds, self.calls_of))

    def _with_window(self, point: Direction) -> Direction:
        """What the window holds and the point add up to; cores of one subspace become one."""
        if not self.window:
            return point
        return add_parts([*self.window, *(half for part in point for half in self._split(part))])

    def _split(self, part: Part) -> list[Part]:
        """The parts of the weights that fold and of those that do not."""
        if not part.acts_on_outputs:
            return [part]
        folds = [i for i, index in enumerate(part.indices) if index in self.foldable]
        if len(folds) in (0, len(part.weights)):
            return [part]
        rest = sorted({*range(len(part.weights))} - {*folds})
        return [part.select(folds), part.select(rest)]

    def _folds(self, part: Part) -> bool:
        return part.acts_on_outputs and part.indices[0] in self.foldable

    # ---- a forward --------------------------------------------------------------------------------------------------

    def fills_of(self, index: int, point: int) -> list[LoadedPart]:
        shown = self.points.added(index, point)
        return [s for s in shown if not s.acts_on_outputs] if index in self.foldable else shown

    def folds_of(self, index: int, point: int) -> list[Fold]:
        """What is added to a weight by moving its layer's output."""
        shown = self.points.added(index, point) if index in self.foldable else []
        return [s.operands.fold(s.position) for s in shown if s.acts_on_outputs]

    def decay_of(self, index: int) -> Tensor:
        return self.faded[self.weights[index].tensor.device][index]

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.active and not self.window:
            return None
        compiling = torch.compiler.is_compiling()
        begin = 0.0 if compiling else time.perf_counter()
        use = self.uses[number]
        for ref in use.refs:
            if not self.active and not compiling and not ref.is_in_place():
                continue  # between steps somebody's own weights (functional_call), to which no window belongs
            if self.calls_of[ref.index]:
                x = args[0] if args else next(iter(kwargs.values()))
                if not compiling and (x.layout != torch.strided or x.is_nested or is_functorch_wrapped_tensor(x)):
                    name = self.weights[ref.index].name
                    raise RuntimeError(
                        f"closure: {name!r} is applied to a nested, sparse or vmapped tensor; accepted: dense ones "
                        f"with mode='folded'. Choose mode='scratch', or exclude=[{name!r}]"
                    )
                output = self._fold(use, ref, x, output)
        if not compiling:
            self.seconds += time.perf_counter() - begin
        kept = super().leave(number, args, kwargs, output)
        return output if kept is None else kept

    def _fold(self, use: ModuleUse, ref: ParamRef, x: Tensor, output: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not output.numel():
            return output
        if self.fades and not any(self.fills_of(ref.index, point) for point in range(self.count)):
            output = self._scaled_output(use, ref, x, output)
        output, x = output.contiguous(), x.to(output.device)  # accelerate moves inputs inside the module's forward
        if self.count > 1:
            if use.kind == EMBEDDING and output.shape[0] == 1 and self.rows > 1:  # positions, the same for all rows
                output, x = (t.expand(self.rows, *t.shape[1:]).contiguous() for t in (output, x))
            check_rows(self, use, output.shape[0])
        if torch.is_grad_enabled() and output.requires_grad:  # between steps, or by the closure's own wish
            weight, folds = self.weights[ref.index], self.folds[ref.index]
            parts = zip(folds, x.chunk(self.count), output.chunk(self.count), strict=True)
            moved = [fold_differentiably(use.kind, weight, own, inputs, y) for own, inputs, y in parts]
            return moved[0] if self.count == 1 else torch.cat(moved)
        for arguments in self.calls_of[ref.index]:
            add_lowrank(output, x, arguments if use.kind == LINEAR else arguments._replace(transposed=True))
        return output

    def _scaled_output(self, use: ModuleUse, ref: ParamRef, x: Tensor, output: Tensor) -> Tensor:
        """s (y - b) + b, with the b that the module has added."""
        faded = self.decay_of(ref.index).view(())
        padding_row = self.weights[ref.index].padding_row
        if use.kind == EMBEDDING and padding_row is not None:  # which does not decay
            faded = faded * (x != padding_row).unsqueeze(-1)
        output = (output * (1 - faded)).to(output.dtype)
        bias = next((r for r in use.refs if r.name == "bias" and r.owner is use.module), None)
        own = use.module._parameters.get("bias") if use.kind != EMBEDDING else None
        if own is None:
            return output
        biases: list[Tensor] = [own]
        if self.count > 1 and bias is not None and bias in self.refs_to_fill(use):
            biases = self.at_points(bias.index)  # each had its own, and gave it back
        parts = zip(output.chunk(len(biases)), biases, strict=True)
        return torch.cat([y + (b * faded).to(y.dtype) for y, b in parts])

    # ---- updates ----------------------------------------------------------------------------------------------------

    def apply(self, update: Update) -> None:
        if not self.window and (update.flush or not self.defers):
            super().apply(update)
            return
        window, keep, passes, direct = list(self.window), list(self.keep), [], []
        parts = [half for whole in update.direction for half in self._split(whole)]
        written = {index for part in parts if not self._folds(part) for index in part.indices}
        stale = [old for old in window if written & {*old.indices}]  # a pass is for W, not for what s multiplies
        passes += self._merges(stale, keep, update.rounding_key(1 + len(update.direction.parts)))
        window = [old for old in window if old not in stale]
        for part in parts:
            if written & {*part.indices}:
                direct.append((part, None))
                continue
            kept = [1.0 - d for d in update.decay]
            both = [(old, old.scaled(kept).plus(part)) for old in window]
            match = next(((old, new) for old, new in both if new is not None), None)
            if match is None:  # other factors than before: what they hold is written first
                stale = [old for old in window if {*old.indices} & {*part.indices}]
                passes += self._merges(stale, keep, update.rounding_key(1))
                window = [old for old in window if old not in stale] + [part.condensed()]
            else:
                window = [match[1].condensed() if old is match[0] else old for old in window]
            for index in part.indices:
                keep[index] *= kept[index]
        passes += update.passes(direct)
        if update.flush or not self.defers:
            passes += self._merges(window, keep, update.rounding_key(0))
            window = []
        before = self.window, self.keep
        self.window, self.keep = window, keep
        try:
            self.restore()  # ahead of the passes, as a new window needs memory, and after them it is too late to fail
            self.run_all(passes, copy_budget=self.largest)
        except BaseException:
            self.window, self.keep = before
            raise
        self.passes_this_step += 2 + len(update.direction.parts)

    def _merges(self, window: Sequence[Part], keep: list[float], rounding_key: int) -> list[Pass]:
        """The passes that write parts of the window; their weights' s is 1 again."""
        passes = [Pass(part, [1.0 - keep[i] for i in part.indices], rounding_key) for part in window]
        for part in window:
            for index in part.indices:
                keep[index] = 1.0
        return passes

    def merge(self) -> None:
        if not self.window:
            return
        keep = list(self.keep)
        window = [same for part in self.window for same in part.by_kind()]
        self.run_all(self._merges(window, keep, self.merge_key), copy_budget=self.largest)
        self.window, self.keep = [], keep
        self.restore()


def foldable_weights(uses: Sequence[ModuleUse]) -> set[int]:
    """Indices of the weights whose every use is a layer that low-rank directions can act on the output of."""
    known = {ref.index for use in uses for ref in use.refs}
    return known - {ref.index for use in uses for ref in use.refs if not use.foldable(ref)}
