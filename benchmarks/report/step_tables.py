"""The rows of benchmarks.step as tables and a figure of a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness.tables import Table, range_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTING = ("model", "dtype", "tokens", "threads")
NAMES = ("provider", "method", "mode", "rank")
PARTS = (("forward", "forwards", "tab:gray"), ("perturb", "perturb and update", "tab:blue"))


def tables(rows: Sequence[dict]) -> Iterator[str]:
    """A section per model, dtype, number of tokens and threads."""
    for setting, own in _grouped(rows, SETTING).items():
        model, dtype, tokens, threads = setting
        lines = []
        for names, runs in _grouped(own, NAMES).items():
            line = [" ".join(str(x) for x in names if x is not None)]
            line += [_median(runs, name, ".3f") for name in ("forward", "perturb", "total")]
            line += [_range(runs, "ratio"), _range(runs, "ratio_own")]
            line += [_median(runs, "refresh", ".2f"), _median(runs, "refresh_share", ".1%")]
            lines.append([*line, _median(runs, "peak_memory", ".0f")])
        columns = ["", "forwards, s", "perturb, s", "step, s", "x forwards", "x own", "refresh, s", "of its window"]
        columns.append("peak, MB")
        heading = f"### {model}, {dtype}, {tokens} tokens a sentence, {threads} threads"
        yield f"{heading}\n\n{Table(columns, lines).markdown()}"


def figure(rows: Sequence[dict]) -> Figure:
    """Seconds of a step, in forwards and outside them, and a refresh spread over its window; a panel per setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _grouped(rows, SETTING)
    drawn = Figure(figsize=(9, 1 + sum(0.6 + 0.28 * len(_grouped(own, NAMES)) for own in panels.values())))
    drawn.set_layout_engine("constrained")
    FigureCanvasAgg(drawn)
    heights = [2 + len(_grouped(own, NAMES)) for own in panels.values()]
    grid = drawn.add_gridspec(len(panels), 1, height_ratios=heights)
    for i, (setting, own) in enumerate(panels.items()):
        axes = drawn.add_subplot(grid[i])
        names = _grouped(own, NAMES)
        left = [0.0] * len(names)
        places = list(range(len(names)))
        for part, label, colour in PARTS:
            widths = [_value(runs, part) for runs in names.values()]
            axes.barh(places, widths, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        shares = [_value(runs, "refresh_share") * _value(runs, "total") for runs in names.values()]
        axes.barh(places, shares, left=left, color="tab:orange", label="refresh, over its window")
        axes.set_yticks(places, [" ".join(str(x) for x in name if x is not None) for name in names], fontsize=8)
        axes.invert_yaxis()
        model, dtype, tokens, threads = setting
        axes.set_title(f"{model}, {dtype}, {tokens} tokens a sentence, {threads} threads", fontsize=10)
        axes.grid(alpha=0.3, axis="x")
        axes.margins(x=0.05)
        if i == len(panels) - 1:
            axes.set_xlabel("seconds per step")
    handles = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def _grouped(rows: Sequence[dict], names: Sequence[str]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault(tuple(r.get(name) for name in names), []).append(r)
    return groups


def _values(rows: Sequence[dict], name: str) -> list[float]:
    return [r[name] for r in rows if r.get(name) is not None]


def _value(rows: Sequence[dict], name: str) -> float:
    """The median of the runs; 0 for what this method does not have."""
    return statistics.median(_values(rows, name) or [0.0])


def _median(rows: Sequence[dict], name: str, form: str) -> str:
    values = _values(rows, name)
    return format(statistics.median(values), form) if values else ""


def _range(rows: Sequence[dict], name: str) -> str:
    values = _values(rows, name)
    return range_of(values) if values else ""
