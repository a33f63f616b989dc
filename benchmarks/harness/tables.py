"""The one table: printed on a console, or written as Markdown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Console


@dataclass
class Table:
    """Columns and rows of text; columns that are empty in every row are left out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""

    def markdown(self) -> str:
        """Without the title, which is a heading there."""
        kept = self._kept()
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)

    def print(self, on: Console | None = None) -> None:
        """Nothing without rows. Title and caption are lines of their own, as they may be wider than the table."""
        if not self.rows:
            return
        table = rich.table.Table(box=None, pad_edge=False)
        kept = self._kept()
        for i in kept:
            table.add_column(self.columns[i], justify="right" if i else "left", no_wrap=not i)
        for row in self.rows:
            table.add_row(*(row[i] for i in kept))
        for part in filter(None, (self.title, table, self.caption, " ")):
            (on or console()).print(part, highlight=False)

    def _kept(self) -> list[int]:
        return [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]


def console() -> Console:
    """Standard output; where it is no terminal, in a width that no table exceeds."""
    return Console(width=None if sys.stdout.isatty() else 160, markup=False)


def shown(value: float | None, form: str, none: str = "") -> str:
    """A number, or what stands for none."""
    return none if value is None else format(value, form)


def range_of(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Of one value itself, of several their median and range: "1.20x (1.10 to 1.30)"."""
    middle, low, high = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} ({low} to {high})" if len(values) > 1 else middle + unit
