"""What the points of the next forwards add to every weight, by operands in device memory.

That memory keeps its place. The next step's parts of the same layout go into it, and code that was compiled, or
captured in a CUDA graph, finds them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..directions import Direction, Operands, Part

_MOST = 64  # operands that are kept, or four times the most that were in use at once


class LoadedPart(NamedTuple):
    """A part whose operands are loaded, and the position of one weight in it."""

    part: Part
    operands: Operands
    position: int


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
        self._added = [[[] for _ in points] for _ in range(self.weights)]
        keys: list[Hashable] = [len(points), self._cleared]
        used: list[Hashable] = []
        for number, point in enumerate(points):
            alike: Counter[Hashable] = Counter()
            for part in point:
                layout = part.layout()
                place = (number, layout, alike[layout])
                alike[layout] += 1
                used.append(place)
                operands = self._loaded(place, part)
                keys.append((number, layout, operands.serial, tuple(map(id, operands.outside()))))
                for position, index in enumerate(part.indices):
                    self._added[index][number].append(LoadedPart(part, operands, position))
        self.key, self._used = tuple(keys), used
        # Methods that move other weights in each step make new layouts without end. A step shows several sets of points
        # and, between them, none; each is to find its memory again in the next step.
        self._most_used = max(self._most_used, len(used))
        free = [place for place in self._memory if place not in self._captured]
        for unused in free[: max(0, len(free) - max(_MOST, 4 * self._most_used))]:
            del self._memory[unused]

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
