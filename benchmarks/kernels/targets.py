"""What the kernels are meant to reach on a CPU, and whether rows of benchmarks.kernels do."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.kernels.ops import OPS
from benchmarks.markdown import range_of

LEAST_MB = 128  # targets are for weights well beyond the caches


@dataclass(frozen=True)
class Target:
    """A bound on our time at an op: over that of another provider, or in seconds.

    ``at_least`` bounds the other's time over ours (a speed-up), ``at_most`` ours over the other's.
    """

    op: str
    against: str | None  # a provider; None: seconds
    at_least: float | None = None
    at_most: float | None = None
    dtype: str = "float32"
    rank: int | None = None
    isa: str | None = None  # None: the best of the CPU
    threads: int | None = None  # None: any number

    @property
    def what(self) -> str:
        rank = f"rank {self.rank}" if self.rank else ""
        return ", ".join(x for x in (OPS[self.op].title, rank, self.dtype, self.isa or "") if x)

    @property
    def bound(self) -> str:
        if self.against is None:
            return f"≤ {1e3 * (self.at_most or 0):g} ms"
        if self.at_least is not None:
            return f"≥ {self.at_least:g}x faster than {self.against}"
        return f"≤ {self.at_most:g}x {self.against}"


TARGETS = (
    Target("dense", "idiom", at_least=9, isa="avx512", threads=2),
    Target("dense", "idiom", at_least=6, isa="avx512", threads=1),
    Target("dense", "floor", at_most=3.2, isa="avx512"),
    Target("dense", "idiom", at_least=7, dtype="bfloat16", isa="avx512", threads=2),
    Target("dense", "idiom", at_least=5, isa="avx2", threads=2),
    Target("rademacher", "floor", at_most=1.3),
    Target("two_draws", "two_passes", at_most=0.9),
    Target("lowrank", "floor", at_most=1.25, rank=16),
    Target("lowrank", "addmm_", at_least=1, rank=16),
    Target("lowrank", "addmm_", at_least=1.3, rank=64),
    Target("lowrank", "addmm_", at_least=5, dtype="bfloat16", rank=64),
    Target("host", None, at_most=3e-4),
)


@dataclass(frozen=True)
class Outcome:
    """A target at one size and number of threads: what it came to in each run."""

    target: Target
    shape: tuple[int, ...] = ()
    threads: int | None = None
    values: tuple[float, ...] = ()  # none: not measured

    @property
    def measured(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        if not self.values:
            return None
        low = self.target.at_least is None or self.measured >= self.target.at_least
        return low and (self.target.at_most is None or self.measured <= self.target.at_most)

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]

    def __str__(self) -> str:
        """The median of the runs and, of several, their range."""
        if not self.values:
            return "-"
        if self.target.against is None:
            return range_of([1e3 * x for x in self.values], 3, " ms")
        return range_of(self.values, 2, "x")


def wanted(isas: Sequence[str]) -> set[tuple]:
    """(op, dtype, rank, provider, isa) of everything that the targets compare, and of the idioms."""
    found: set[tuple] = set()
    for t in TARGETS:
        for provider in ("ours", "two_passes"):
            found.add((t.op, t.dtype, t.rank, provider, t.isa or isas[0]))
        for provider in ("idiom", "addmm_"):
            found.add((t.op, t.dtype, t.rank, provider, None))
    return found


def outcomes(rows: Sequence[dict]) -> list[Outcome]:
    """Every target at every large size and number of threads that there are rows for, or once as not measured."""
    rows = [r for r in rows if "seconds" in r and (r["megabytes"] >= LEAST_MB or not OPS[r["op"]].sized)]
    return [outcome for target in TARGETS for outcome in (list(_outcomes(target, rows)) or [Outcome(target)])]


def _outcomes(target: Target, rows: Sequence[dict]) -> Iterator[Outcome]:
    own = [r for r in rows if (r["op"], r["dtype"], r["rank"]) == (target.op, target.dtype, target.rank)]
    own = [r for r in own if target.threads in (None, r["threads"])]
    ours = [r for r in own if r["provider"] == "ours"]
    best = target.isa or (ours[0]["isa"] if ours else None)
    ours = [r for r in ours if r["isa"] == best]
    others = {_turn(r): r for r in own if r["provider"] == target.against}
    values: dict[tuple, list[float]] = {}
    for row in ours:
        value = row["seconds"]
        if target.against is not None:
            if _turn(row) not in others:
                continue
            other = others[_turn(row)]["seconds"]
            value = value / other if target.at_least is None else other / value
        values.setdefault((tuple(row["shape"]), row["threads"]), []).append(value)
    for (shape, threads), found in sorted(values.items()):
        yield Outcome(target, shape, threads, tuple(found))


def _turn(row: dict) -> tuple:
    """Who has it in common took turns."""
    return row["run"], tuple(row["shape"]), row["threads"]
