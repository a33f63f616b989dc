"""Tables for a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns that are empty in every row are left out."""
    found = list(rows)
    kept = [i for i in range(len(columns)) if any(row[i] for row in found)]
    lines = [columns, ["---"] * len(columns), *found]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def range_of(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Of one value itself, of several their median and range: "1.20x (1.10 to 1.30)"."""
    middle, low, high = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} ({low} to {high})" if len(values) > 1 else middle + unit
