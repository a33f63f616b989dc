"""The rows of benchmarks.kernels as tables of a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.harness.tables import Table, range_of
from benchmarks.kernels.ops import ALL, OPS
from benchmarks.kernels.sweep import ISAS, PROVIDERS

FAMILIES = {
    "Dense noise": ("dense", "fast", "rademacher", "two_draws", "stochastic", "scratch", "draw", "assemble", "masked"),
    "State, anchors and sums": ("adam", "anchor", "dot", "norms"),
    "Low rank": ("lowrank",),
    "Low rank in the forward": ("forward",),
    "Many tensors": ("list", "host"),
}


def idioms(rows: Sequence[dict]) -> str:
    """What each op is compared with."""
    measured = {r["op"] for r in rows}
    lines = [[op.title, f"`{op.idiom}`"] for name, op in OPS.items() if name in measured]
    return Table(["op", "idiom"], lines).markdown()


def tables(rows: Sequence[dict]) -> Iterator[str]:
    """A section per family: at its largest size, everybody's time over the floor, and the idiom's over ours."""
    for family, ops in FAMILIES.items():
        own = [r for r in rows if r["op"] in ops]
        if own:
            yield f"### {family}\n\n{_table(own, ops)}"


def _table(rows: Sequence[dict], ops: Sequence[str]) -> str:
    contenders = _contenders(rows)
    names = [" ".join(x for x in contender if x) for contender in contenders]
    lines = []
    for group in _groups(rows, ops):
        first = group[0]
        tokens = f"{first['tokens']} tokens" if first.get("tokens") else None
        name = " ".join(str(x) for x in (OPS[first["op"]].title, first["rank"], tokens) if x)
        line = [name, first["dtype"], f"{first['megabytes']:.3g}", str(first["threads"])]
        line.append(_milliseconds([r for r in group if r["provider"] == "floor"]))
        line += [_cell([r for r in group if (r["provider"], r["isa"]) == contender]) for contender in contenders]
        line.append(_gain(group))
        lines.append(line)
    return Table(["", "dtype", "MB", "threads", "floor, ms", *names, "idiom over ours"], lines).markdown()


def _contenders(rows: Sequence[dict]) -> list[tuple]:
    """In the order of the providers, ours from the best build."""
    found = {(r["provider"], r["isa"]) for r in rows if r["provider"] in PROVIDERS}
    isas = [*ISAS, None]
    return sorted(found, key=lambda x: (PROVIDERS.index(x[0]), isas.index(x[1])))


def _groups(rows: Sequence[dict], ops: Sequence[str]) -> list[list[dict]]:
    """Rows of one setting, all runs, at the largest size of each op, dtype and rank."""
    largest: dict[tuple, float] = {}
    for r in rows:
        key = r["op"], r["rank"], r["dtype"]
        largest[key] = max(largest.get(key, 0), r["megabytes"])
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        key = r["op"], r["rank"], r["dtype"]
        if r["megabytes"] == largest[key]:
            setting = (ops.index(key[0]), key[1] or 0, r.get("tokens") or 0, ALL.index(key[2]), r["threads"])
            groups.setdefault(setting, []).append(r)
    return [groups[key] for key in sorted(groups)]


def _milliseconds(rows: Sequence[dict]) -> str:
    return f"{1e3 * statistics.median(r['seconds'] for r in rows):.3g}" if rows else ""


def _cell(rows: Sequence[dict]) -> str:
    """Time over the floor; nothing for whoever has no part in this op."""
    measured = [r["floor_ratio"] for r in rows if "seconds" in r]
    if measured:
        value = statistics.median(measured)
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    if rows:
        return "too slow" if "too long" in rows[0]["unmeasured"] else "fails"
    return ""


def _gain(rows: Sequence[dict]) -> str:
    """Of the best build."""
    ours = [r for r in rows if r["provider"] == "ours" and r.get("speedup_vs_idiom")]
    best = next((isa for isa in (*ISAS, None) if any(r["isa"] == isa for r in ours)), None)
    values = [r["speedup_vs_idiom"] for r in ours if r["isa"] == best]
    return range_of(values, 1, "x") if values else ""
