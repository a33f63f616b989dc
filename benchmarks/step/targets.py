"""What a step may cost: the figures to reach on SmolLM2-135M in float32, 16 sentences of 32 tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness.targets import Target


def targets(rows: Iterable[dict]) -> list[Target]:
    """Those that there are rows for."""
    at = ("smollm2", "float32", 32, 16, "ours")
    ours = [r for r in rows if (r["model"], r["dtype"], r["tokens"], r["batch"], r["provider"]) == at]
    mezo = [r for r in ours if (r["method"], r["mode"]) == ("mezo", "inplace")]
    pgap = [r for r in ours if r["method"] == "pgap"]
    found = [
        _best("MeZO in place: step / its two forwards", mezo, "ratio_own", 1.15, min),
        _best("P-GAP, best mode: step / its two forwards, refresh apart", pgap, "ratio_own", 1.08, min),
        _best("P-GAP, most costly: refresh / window of steps", pgap, "refresh_share", 0.15, max),
    ]
    return [target for target in found if target is not None]


def _best(text: str, rows: Sequence[dict], name: str, limit: float, choose: Callable) -> Target | None:
    """The least or largest figure among contenders, each by its median over the runs and thread counts given."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row[name] is not None:
            rank = "" if row["rank"] is None else f", rank {row['rank']}"
            values.setdefault(f"{row['mode']}{rank}, {row['threads']} threads", []).append(row[name])
    if not values:
        return None
    what = choose(values, key=lambda name: statistics.median(values[name]))
    return Target(f"{text} ({what})", f"≤ {limit:g}", at_most=limit, values=tuple(values[what]), digits=3)
