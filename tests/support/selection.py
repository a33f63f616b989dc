"""Which runs of a product are made: all of them, or as many as factors that do not interact need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from .methods import Row


def cycled(first: Sequence, second: Sequence, each: int = 1) -> list[tuple]:
    """Every value of the first with ``each`` of the second, taken in turn and all of them; tuples are spread."""
    assert each * len(first) >= len(second) >= each
    pairs = [(a, second[(i * each + j) % len(second)]) for i, a in enumerate(first) for j in range(each)]
    return [tuple(x for value in pair for x in (value if isinstance(value, tuple) else (value,))) for pair in pairs]


def anything(mode: str) -> bool:
    return True


def unstacked(mode: str) -> bool:
    """Whether each forward has one point."""
    return not mode.endswith("-stacked")


def runs(rows: Sequence[Row], accepts: Callable[[str], bool] = anything) -> list[tuple[Row, str]]:
    """Every row in each of its modes."""
    return [(row, mode) for row in rows for mode in row.modes if accepts(mode)]


def some_runs(rows: Sequence[Row], accepts: Callable[[str], bool] = anything) -> list[tuple[Row, str]]:
    """Every row in two of its modes, those that the rows before it were run in least often: all modes of them."""
    used: Counter[str] = Counter()
    found = []
    for row in rows:
        for mode in sorted(filter(accepts, row.modes), key=used.__getitem__)[:2]:
            used[mode] += 1
            found.append((row, mode))
    assert used.keys() == {mode for _, mode in runs(rows, accepts)}
    return found
