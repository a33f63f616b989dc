"""What the kernels are meant to reach on a CPU, and what rows of benchmarks.kernels say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness.targets import Target
from benchmarks.kernels.ops import OPS

LEAST_MB = 128  # targets are for weights well beyond the caches


@dataclass(frozen=True)
class Comparison:
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

    def target(self, values: Sequence[float] = (), weights: str = "", threads: str = "") -> Target:
        """With what was measured in each run."""
        rank = f"rank {self.rank}" if self.rank else ""
        what = ", ".join(x for x in (OPS[self.op].title, rank, self.dtype, self.isa or "") if x)
        scale, digits, unit = (1, 2, "x") if self.against else (1e3, 3, " ms")
        if self.at_least is not None:
            bound = f"≥ {self.at_least:g}x faster than {self.against}"
        else:
            bound = f"≤ {scale * (self.at_most or 0):g}" + (f"x {self.against}" if self.against else unit)
        most = None if self.at_most is None else scale * self.at_most
        measured = tuple(scale * value for value in values)
        return Target(what, bound, most, self.at_least, measured, weights, threads, digits, unit)


COMPARISONS = (
    Comparison("dense", "idiom", at_least=9, isa="avx512", threads=2),
    Comparison("dense", "idiom", at_least=6, isa="avx512", threads=1),
    Comparison("dense", "floor", at_most=3.2, isa="avx512"),
    Comparison("dense", "idiom", at_least=7, dtype="bfloat16", isa="avx512", threads=2),
    Comparison("dense", "idiom", at_least=5, isa="avx2", threads=2),
    Comparison("rademacher", "floor", at_most=1.3),
    Comparison("two_draws", "two_passes", at_most=0.9),
    Comparison("lowrank", "floor", at_most=1.25, rank=16),
    Comparison("lowrank", "addmm_", at_least=1, rank=16),
    Comparison("lowrank", "addmm_", at_least=1.3, rank=64),
    Comparison("lowrank", "addmm_", at_least=5, dtype="bfloat16", rank=64),
    Comparison("host", None, at_most=3e-4),
)


def wanted(isas: Sequence[str]) -> set[tuple]:
    """(op, dtype, rank, provider, isa) of everything that the targets compare, and of the idioms."""
    found: set[tuple] = set()
    for t in COMPARISONS:
        for provider in ("ours", "two_passes"):
            found.add((t.op, t.dtype, t.rank, provider, t.isa or isas[0]))
        for provider in ("idiom", "addmm_"):
            found.add((t.op, t.dtype, t.rank, provider, None))
    return found


def targets(rows: Sequence[dict]) -> list[Target]:
    """Every target at every large size and number of threads that there are rows for, or once as not measured."""
    rows = [r for r in rows if "seconds" in r and (r["megabytes"] >= LEAST_MB or not OPS[r["op"]].sized)]
    return [target for wanted in COMPARISONS for target in (list(_measured(wanted, rows)) or [wanted.target()])]


def _measured(wanted: Comparison, rows: Sequence[dict]) -> Iterator[Target]:
    own = [r for r in rows if (r["op"], r["dtype"], r["rank"]) == (wanted.op, wanted.dtype, wanted.rank)]
    own = [r for r in own if wanted.threads in (None, r["threads"])]
    ours = [r for r in own if r["provider"] == "ours"]
    best = wanted.isa or (ours[0]["isa"] if ours else None)
    others = {_turn(r): r for r in own if r["provider"] == wanted.against}
    values: dict[tuple, list[float]] = {}
    for row in (r for r in ours if r["isa"] == best):
        value = row["seconds"]
        if wanted.against is not None:
            if _turn(row) not in others:
                continue
            other = others[_turn(row)]["seconds"]
            value = value / other if wanted.at_least is None else other / value
        values.setdefault((tuple(row["shape"]), row["threads"]), []).append(value)
    for (shape, threads), found in sorted(values.items()):
        yield wanted.target(found, " x ".join(map(str, shape)), str(threads))


def _turn(row: dict) -> tuple:
    """Rows that have it in common took turns."""
    return row["run"], tuple(row["shape"]), row["threads"]
