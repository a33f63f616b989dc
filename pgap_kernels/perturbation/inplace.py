"""In place: W + point is written into the weights, and they are restored to rounding. Serves any closure.

three passes:  W + eps z,  then - 2 eps z,  then + ((1 - d) eps - lr rho) z with decay d
two passes:    the last of a step is the first of the next, + ((1 - d) eps - lr rho) z_t + eps z_{t+1}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..directions import Direction, Part, Pass, Weight
from .base import Perturbation, Update
from .hooks import Hooks, uses_of
from .step_context import outside_ambient_state, uninterrupted

T = TypeVar("T")


class InPlace(Perturbation):
    """Writes the weights before each forward; between the steps of the two-pass schedule they stay perturbed."""

    mode: ClassVar[str] = "inplace"

    def __init__(self, weights: Sequence[Weight], two_pass: bool = False) -> None:
        self.model: nn.Module | None = None
        self.hooks: Hooks | None = None
        super().__init__(weights)
        self.two_pass = two_pass
        self.added: list[Part] = []  # what is added to the weights at the moment

    @property
    def pending(self) -> bool:
        return bool(self.added)

    def set_weights(self, weights: Sequence[Weight]) -> None:
        super().set_weights(weights)
        self.keep_all = [1.0] * len(weights)
        if self.hooks is not None and self.model is not None:
            self.hooks.remove()
            self.watch(self.model)

    def drop_cached(self) -> None:
        self.added, self.hooks = [], None

    def perturb_to(self, points: Sequence[Direction]) -> None:
        if len(points) != 1:
            raise ValueError(
                f"points: got {len(points)} with mode='inplace', which writes the weights for all rows; accepted: one "
                "(choose mode 'scratch' or 'folded')"
            )
        moved, wanted = False, list(points[0])
        for part in wanted:
            before, move = self._move_to(part, self.keep_all)
            moved |= self._write(move, before, part)
        for part in [p for p in self.added if not any(p is w for w in wanted)]:
            moved |= self._write(part.removal(self.keep_all), part, None)
        self.passes_this_step += moved

    def _move_to(self, part: Part, keep: Sequence[float]) -> tuple[Part | None, Part]:
        """The added part that one pass can exchange for a given one, and the part of that pass."""
        for before in self.added:
            move = part.moved_from(before, keep)
            if move is not None:
                return before, move
        return None, part

    def _write(self, move: Part, before: Part | None, after: Part | None) -> bool:
        """One pass of a perturbation; ``added`` is correct after each, even if the next one fails."""
        p = Pass(move)
        if not p.is_empty():
            self.run(p)
        self.added = [q for q in self.added if q is not before] + ([] if after is None else [after])
        return not p.is_empty()

    def apply(self, update: Update) -> None:
        keep = update.keep()
        moves: list[tuple[Part, Part | None]] = []
        after: list[Part] = []
        gone: list[Part] = []
        for part in update.direction:
            before, move = self._move_to(part, keep)
            gone += [] if before is None else [before]
            if update.rule is not None and update.rule.serves(part):
                moves.append((part, None if before is None else before.removal(keep)))
                continue
            for entered in update.next_point or ():
                both = move.plus(entered)
                if both is not None:
                    move = both
                    after.append(entered)
            moves.append((move, None))
        rest = [part for part in self.added if not any(part is p for p in gone)]
        # What is only to be taken off comes first: a rule with state is best last, as it has no inverse.
        passes = [Pass(part.removal(self.keep_all)) for part in rest] + update.passes(moves)
        self.run_all(passes, copy_budget=0)
        self.added = after
        self.passes_this_step += 1 + len(passes)

    def merge(self) -> None:
        self.added = [same for part in self.added for same in part.by_kind()]
        self.restore()

    # ---- the model between the steps of the two-pass schedule -------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """Restore the weights before anything evaluates or saves the model between steps."""
        self.model, self.hooks = model, Hooks(uses_of(model, self.weights), self)

    def forward(self, call: Callable[[], T]) -> T:
        self.active = True
        try:
            return call()
        finally:
            self.active = False

    def enter(self, number: int) -> None:
        """Before a module's forward."""
        if self.added and not self.active:
            with outside_ambient_state(), uninterrupted():
                self.merge()

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a module's forward: nothing to do."""

    def release(self, why: str = "the optimizer was detached from its model") -> None:
        super().release(why)
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
