"""Figures to reach, and whether they were."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.tables import Table, range_of


@dataclass(frozen=True)
class Target:
    """A bound on a figure, and what the figure came to in each run; their median counts."""

    what: str
    bound: str  # to read
    at_most: float | None = None
    at_least: float | None = None
    values: tuple[float, ...] = ()  # none: not measured
    weights: str = ""  # on which it was measured
    threads: str = ""
    digits: int = 2
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if not self.values:
            return None
        measured = statistics.median(self.values)
        low = self.at_least is None or measured >= self.at_least
        return low and (self.at_most is None or measured <= self.at_most)

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]

    def __str__(self) -> str:
        """The median of the runs and, of several, their range."""
        return range_of(self.values, self.digits, self.unit) if self.values else "-"


def table(targets: Sequence[Target]) -> Table:
    """A row for each target."""
    rows = [[t.what, t.weights, t.threads, t.bound, str(t), t.verdict] for t in targets]
    return Table(["what", "weights", "threads", "target", "measured", "verdict"], rows, "Targets")
