"""What a step may cost: the figures to reach on SmolLM2-135M in float32, 16 sentences of 32 tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Target(NamedTuple):
    """A figure to reach; ``value`` is the median over the runs."""

    text: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def targets(rows: Iterable[dict]) -> list[Target]:
    """Those that the rows have something to say about."""
    at = ("smollm2", "float32", 32, 16, "ours")
    ours = [r for r in rows if (r["model"], r["dtype"], r["tokens"], r["batch"], r["provider"]) == at]
    mezo = [r for r in ours if (r["method"], r["mode"]) == ("mezo", "inplace")]
    pgap = [r for r in ours if r["method"] == "pgap"]
    found = [
        _best("MeZO in place: step / two forwards", mezo, "ratio", 1.15, min),
        _best("P-GAP, best mode: step / two forwards, refresh apart", pgap, "ratio", 1.08, min),
        _best("P-GAP, most costly: refresh / window of steps", pgap, "refresh_share", 0.15, max),
    ]
    return [target for target in found if target is not None]


def _best(
    text: str, rows: Sequence[dict], name: str, limit: float, choose: Callable[..., tuple[float, str]]
) -> Target | None:
    """The least or largest figure among contenders, each by its median over the runs and thread counts given."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row[name] is not None:
            rank = "" if row["rank"] is None else f", rank {row['rank']}"
            what = f"{row['mode']}{rank}, {row['threads']} threads"
            values.setdefault(what, []).append(row[name])
    if not values:
        return None
    value, what = choose((statistics.median(of), what) for what, of in values.items())
    return Target(f"{text} ({what})", value, limit)
