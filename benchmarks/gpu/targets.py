"""What is to be reached on a GPU, and what the rows of the parts say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.targets import Target


class Reach(NamedTuple):
    """A bound on a figure of a kernel in bfloat16."""

    op: str
    rank: int | None
    figure: str  # of the row of provider "ours": "copy_share", or a provider whose time is divided by ours
    at_least: float

    @property
    def what(self) -> str:
        return f"{self.op} {self.rank}" if self.rank else self.op


KERNELS = (
    Reach("dense", None, "copy_share", 0.75),
    Reach("fast", None, "copy_share", 0.95),
    Reach("rademacher", None, "copy_share", 0.95),
    Reach("lowrank", 16, "copy_share", 0.9),
    Reach("lowrank", 64, "copy_share", 0.9),
    Reach("lowrank", 128, "copy_share", 0.8),
    Reach("dense", None, "idiom", 5),
    Reach("dense", None, "torch.compile", 2),
)
STEPS = (
    ("MeZO, in place", "ratio", 1.05),
    ("MeZO, in place, captured", "ratio", 1.05),
    ("P-GAP 64, folded, window", "ratio_with_refresh", 1.05),
    ("P-GAP 64, folded, window, captured", "ratio_with_refresh", 1.05),
    ("LOZO 1, 16 groups, captured", "ratio", 1.10),
    ("P-GAP 64, 16 groups, captured", "ratio", 1.10),
)


def targets(rows: dict[str, list[dict]]) -> list[Target]:
    """Those of the parts that ran."""
    found = [_kernel(reach, rows["kernels"]) for reach in KERNELS if "kernels" in rows]
    for title, figure, limit in STEPS if "step" in rows else ():
        values = tuple(row[figure] for row in rows["step"] if row.get("contender") == title and figure in row)
        found.append(Target(f"{title}: step / its forwards", f"≤ {limit:g}", at_most=limit, values=values, digits=3))
    return found


def _kernel(reach: Reach, rows: Sequence[dict]) -> Target:
    own = [r for r in rows if (r.get("op"), r.get("rank"), r.get("dtype")) == (reach.op, reach.rank, "bfloat16")]
    own = [r for r in own if "seconds" in r]
    ours = [r for r in own if r["provider"] == "ours"]
    if reach.figure == "copy_share":
        bound = f"≥ {reach.at_least:g} of the copy's bandwidth"
        values = [r["copy_share"] for r in ours if "copy_share" in r]
    else:
        bound = f"≥ {reach.at_least:g}x faster than {reach.figure}"
        # `gpu_tables` has put ours of the same visit beside each: ratios are within one run.
        others = [r for r in own if r["provider"] == reach.figure]
        beside = [(r, r.get("ours_seconds", ours[-1]["seconds"])) for r in others if ours]
        values = [r["seconds"] / own_seconds for r, own_seconds in beside if own_seconds]
    return Target(reach.what, bound, at_least=reach.at_least, values=tuple(values))
