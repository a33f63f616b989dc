"""What the points of the next forwards add to every weight, by operands in device memory.

That memory keeps its place. The next step's parts of the same layout go into it, and code that was compiled, or
captured in a CUDA graph, finds them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..directions import Direction, Operands, Part

T = TypeVar("T")

_MOST = 64  # operands that are kept, or four times the most that were in use at once
_REMEMBERED = 4  # keys: of a step's points, a refresh's, nothing


class LoadedPart(NamedTuple):
    """Operands that are loaded, and the position of one weight in their part."""

    operands: Operands
    position: int
    acts_on_outputs: bool


class Points:
    """The points that the next forwards see.

    Args:
        weights: how many there are.

    Attributes:
        key: their number and the operands they have; a captured graph serves points of the same key.
    """

    def __init__(self, weights: int) -> None:
        self.weights, self._cleared, self._made = weights, 0, 0
        self.clear()

    def clear(self) -> None:
        """Forget the points and the memory."""
        # By point, layout, and number among the point's parts of that layout; those of the last use at the end.
        self._memory: dict[Hashable, Operands] = {}
        self._used: list[Hashable] = []  # keys of the points that are shown
        self._most_used = 0
        self._captured: set[Hashable] = set()  # keys of what graphs read, which stays
        self._pinned: list[Sequence[Tensor | None]] = []
        self._cleared += 1
        self._remembered: dict[Hashable, dict[str, Any]] = {}  # by key and name
        self._added: list[list[list[LoadedPart]]] = [[[]] for _ in range(self.weights)]  # by weight and point
        self.key: tuple[Hashable, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy shares no device memory with what it was made from."""
        return {"weights": self.weights, "_cleared": self._cleared, "_made": self._made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all operands."""
        return sum(operands.nbytes for operands in self._memory.values())

    def show(self, points: Sequence[Direction]) -> None:
        """Load the operands of all parts of some points."""
        for operands in self._memory.values():
            operands.unload()
        keys: list[Hashable] = [len(points), self._cleared]
        used: list[Hashable] = []
        shown: list[list[tuple[Part, Operands]]] = [[] for _ in points]
        for number, point in enumerate(points):
            alike: Counter[Hashable] = Counter()
            for part in point:
                layout = part.layout()
                place: Hashable = (number, layout, alike[layout])
                alike[layout] += 1
                used.append(place)
                operands = self._loaded(place, part)
                keys.append((number, layout, operands.serial, tuple(map(id, operands.outside()))))
                shown[number].append((part, operands))
        self.key, self._used = tuple(keys), used
        # Methods that move other weights in each step make new layouts without end. A step shows several sets of points
        # and, between them, none; each is to find its memory again in the next step.
        self._most_used = max(self._most_used, len(used))
        free = [place for place in self._memory if place not in self._captured]
        unused = free[: max(0, len(free) - max(_MOST, 4 * self._most_used))]
        for place in unused:
            del self._memory[place]
        # Other factors than before, or keys that cannot come again.
        if unused or (self.key not in self._remembered and len(self._remembered) >= _REMEMBERED):
            self._remembered.clear()
        self._added = self.remembered("added", lambda: self._by_weight(shown))

    def remembered(self, name: str, make: Callable[[], T]) -> T:
        """What follows from the key alone, as operands keep their place: made once for all the steps that have it."""
        found = self._remembered.setdefault(self.key, {})
        if name not in found:
            found[name] = make()
        return found[name]

    def _by_weight(self, shown: Sequence[Sequence[tuple[Part, Operands]]]) -> list[list[list[LoadedPart]]]:
        added: list[list[list[LoadedPart]]] = [[[] for _ in shown] for _ in range(self.weights)]
        for number, parts in enumerate(shown):
            for part, operands in parts:
                for position, index in enumerate(part.indices):
                    added[index][number].append(LoadedPart(operands, position, part.acts_on_outputs))
        return added

    def keep_captured(self) -> None:
        """A graph that was captured reads the memory of the points that are shown, whenever it is replayed.

        The method's own tensors, too, are kept: one that took the place of one that is gone would have its key.
        """
        self._captured |= {*self._used}
        self._pinned += [self._memory[place].outside() for place in self._used]

    def _loaded(self, key: Hashable, part: Part) -> Operands:
        """The part's operands, in the memory that an earlier part of the same layout had at its place."""
        operands = self._memory.pop(key, None)
        if operands is None:
            operands = part.operands()
            self._made += 1
            operands.serial = self._made
        self._memory[key] = operands
        operands.load(part)
        return operands

    def added(self, index: int, point: int) -> list[LoadedPart]:
        """What is added to a weight at a point."""
        return self._added[index][point]

    def moves(self, index: int) -> bool:
        """Whether anything is added to a weight at any point."""
        return any(self._added[index])
