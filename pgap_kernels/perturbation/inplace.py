"""In place: W + point is written into the weights, and later taken off again, up to rounding. Serves any closure.

three passes:  W + eps z,   then - 2 eps z,   then + ((1 - d) eps - lr rho) z with decay d, which acts on W - eps z
two passes:    the third of a step is also the first of the next,  + ((1 - d) eps - lr rho) z + eps z_next
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..directions import Direction, Part, Pass, Weight
from .base import Perturbation, Update
from .hooks import Hooks, uses_of
from .readers import merge_for

T = TypeVar("T")


class InPlace(Perturbation):
    """Writes the weights before each forward; with ``two_pass`` they stay perturbed between steps."""

    mode: ClassVar[str] = "inplace"

    def __init__(self, weights: Sequence[Weight], two_pass: bool = False) -> None:
        self.model: nn.Module | None = None
        self.hooks: Hooks | None = None
        self.entered = False  # a hook has run in this forward
        self.recompiled = False  # compiled code was dropped, once
        self.captured = False  # a forward was captured in a CUDA graph: one without hooks is its replay
        super().__init__(weights)
        self.two_pass = two_pass
        self.added: list[Part] = []  # parts that are in the weights now, to be taken off

    @property
    def pending(self) -> bool:
        return bool(self.added)

    def set_weights(self, weights: Sequence[Weight]) -> None:
        super().set_weights(weights)
        self.keep_all = [1.0] * len(weights)  # ``keep`` of passes that do not decay
        if self.hooks is not None and self.model is not None:
            self.hooks.remove()
            self.watch(self.model)

    def drop_cached(self) -> None:
        self.added, self.hooks = [], None  # in a dry copy: the hooks stay the original's

    def perturb_to(self, points: Sequence[Direction]) -> None:
        if len(points) != 1:
            raise ValueError(
                f"points: got {len(points)} with mode='inplace', which writes the weights for all rows; accepted: one "
                "(choose mode 'scratch' or 'folded')"
            )
        wrote, wanted = False, list(points[0])
        for part in wanted:
            before, move = self._move_to(part, self.keep_all)
            wrote |= self._write(move, before, part)
        for part in [p for p in self.added if not any(p is q for q in wanted)]:
            wrote |= self._write(part.removal(self.keep_all), part, None)
        self.passes_this_step += wrote

    def _move_to(self, part: Part, keep: Sequence[float]) -> tuple[Part | None, Part]:
        """The part in the weights that one pass can replace by this one, and what that pass adds.

        If there is none to replace, None and the part itself.
        """
        for before in self.added:
            move = part.moved_from(before, keep)
            if move is not None:
                return before, move
        return None, part

    def _write(self, move: Part, before: Part | None, after: Part | None) -> bool:
        """Run the pass that replaces one part in the weights by another; return whether it wrote anything.

        ``added`` is brought up to date after each pass, so that it is right if the next one fails.
        """
        p = Pass(move)
        if not p.is_empty():
            self.run(p)
        self.added = [q for q in self.added if q is not before] + ([] if after is None else [after])
        return not p.is_empty()

    def apply(self, update: Update) -> None:
        keep = update.keep()
        moves: list[tuple[Part, Part | None]] = []
        after: list[Part] = []  # what is in the weights when all passes have run
        replaced: list[Part] = []
        for part in update.direction:
            before, move = self._move_to(part, keep)
            rule = update.rule if update.rule is not None and update.rule.serves(part) else None
            if rule is not None and before is None:
                before = next((q for q in self.added if rule.undoes(q, part)), None)
            replaced += [] if before is None else [before]
            if rule is not None:
                moves.append((part, None if before is None else before.removal(keep)))
                continue
            for coming in update.next_point or ():  # what no pass can take along is left to the next perturb_to
                both = move.plus(coming)
                if both is not None:
                    move = both
                    after.append(coming)
            moves.append((move, None))
        rest = [part for part in self.added if not any(part is p for p in replaced)]
        # Parts that are only taken off come first. A pass of a rule is best last: it has no inverse, so before others
        # all that it writes would be copied.
        passes = [Pass(part.removal(self.keep_all)) for part in rest] + update.passes(moves)
        self.run_all(passes, copy_budget=0)  # passes are undone by their inverses: this mode takes no memory
        self.added = after
        self.passes_this_step += 1 + len(passes)  # beyond the rounding keys that these have used

    def merge(self) -> None:
        # Some weights may have been cast or moved since, and a pass takes those of one device and dtype.
        self.added = [piece for part in self.added for piece in part.by_kind()]
        self.restore()

    # ---- the model between steps, with two_pass ---------------------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """From now on, restore the weights before anything evaluates or saves the model between steps."""
        self.model, self.hooks = model, Hooks(model, uses_of(model, self.weights), self)
        self.recompiled = self.captured = False

    def forward(self, call: Callable[[], T]) -> T:
        self.active, self.entered, self.must_repeat = True, False, False
        try:
            result = call()
        finally:
            self.active = False
        if self.hooks is not None and not (self.entered or self.recompiled or self.captured or self.dry):
            # Code that was compiled before the hooks came does not call them, and would see perturbed weights later.
            torch.compiler.reset()
            self.must_repeat = self.recompiled = True
        return result

    def enter(self, number: int) -> None:
        """Before a module's forward: one outside of a step sees restored weights."""
        if self.active and self.on_cuda and not (self.captured or torch.compiler.is_compiling()):
            self.captured = torch.cuda.is_current_stream_capturing()
        self.entered = True
        if self.added and not self.active:
            merge_for(self, "forward")

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a module's forward: nothing to do."""

    def release(self, why: str = "the optimizer was detached from its model") -> None:
        super().release(why)
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
