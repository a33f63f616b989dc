"""In place: the weights are written +-eps and find their way back, to rounding. Serves any closure.

three passes:  W + eps z,  then - 2 eps z,  then + ((1 - d) eps - lr rho) z with decay d
two passes:    the last of a step is the first of the next, + ((1 - d) eps - lr rho) z_t + eps z_{t+1}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

from .base import Perturbation, Update, all_or_nothing
from .direction import Direction, Part, PerWeight, Term, Weight
from .hooks import Hooks, uses_of

T = TypeVar("T")


class InPlace(Perturbation):
    """Writes the weights before each forward; between the steps of the two-pass schedule they stay perturbed."""

    mode: ClassVar[str] = "inplace"

    def __init__(self, weights: Sequence[Weight], two_pass: bool = False) -> None:
        super().__init__(weights)
        self.two_pass = two_pass
        self.standing: list[Term] = []  # what has been added to the weights
        self.active = False
        self.hooks: Hooks | None = None

    @property
    def pending(self) -> bool:
        return bool(self.standing)

    def stand(self, direction: Direction, amount: PerWeight) -> None:
        wanted = [Term(part, part.amounts(amount)) for part in direction]
        moved = False
        for term in wanted:
            before = self._standing_at(term.part)
            if before is None or not _equal(before, term):
                self._move(term.part, [*([_minus(before)] if before else []), term])
                self._replace(before, term)
                moved = True
        for term in self.standing[:]:
            if not any(term is other for other in wanted) and not any(_equal(term, other) for other in wanted):
                self._move(term.part, [_minus(term)])
                self._replace(term, None)
                moved = True
        self.written += moved

    def commit(self, update: Update, rounding_key: int) -> None:
        rows = update.by_part()
        if any(not any(term.part.summable(row[0][0].part) for row in rows) for term in self.standing):
            self.restore()
        following: list[Term] = []
        if self.two_pass and not update.closing and update.following:
            direction, amount = update.following
            following = [Term(part, part.amounts(amount)) for part in direction]
        writes, standing = [], []
        for terms, decay in rows:
            enter = [t for t in following if t.part.summable(terms[0].part)]
            # The order of the sum is part of the result: probes, the direction that is left, the one that is entered.
            writes.extend(self.landing([*terms, *self._leave(terms[0].part, decay), *enter], decay, rounding_key))
            standing += enter
        all_or_nothing(writes, 0)
        self.standing = standing
        self.written += 1

    def _leave(self, part: Part, decay: list[float]) -> list[Term]:
        before = self._standing_at(part)
        if before is None:
            return []
        return [Term(before.part, [-(1.0 - d) * c for d, c in zip(decay, before.coefficient, strict=True)])]

    def restore(self) -> None:
        self.stand([], lambda _: 0.0)

    def merge(self) -> None:
        self.restore()

    # ---- the model between the steps of the two-pass schedule -------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """See to it that evaluations and checkpoints of a model between steps find clean weights."""
        self.hooks = Hooks(uses_of(model, self.weights), self)

    def forward(self, call: Callable[[], T]) -> T:
        self.active = True
        try:
            return call()
        finally:
            self.active = False

    def enter(self, number: int) -> None:
        """Before a module's forward."""
        if self.standing and not self.active:
            self.merge()

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> None:
        """After a module's forward."""

    def release(self) -> None:
        super().release()
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def _move(self, part: Part, terms: list[Term]) -> None:
        part.write(terms, [0.0] * len(part.weights), {})
        self.count(part.weights)

    def _standing_at(self, part: Part) -> Term | None:
        return next((term for term in self.standing if term.part.summable(part)), None)

    def _replace(self, before: Term | None, after: Term | None) -> None:
        self.standing = [t for t in self.standing if t is not before] + ([after] if after else [])


def _equal(a: Term, b: Term) -> bool:
    return a.part is b.part and a.coefficient == b.coefficient


def _minus(term: Term) -> Term:
    return Term(term.part, [-c for c in term.coefficient])
