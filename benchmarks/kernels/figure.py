"""Figures of the rows of benchmarks.kernels, with the memory floor drawn in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.kernels.ops import ALL, OPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (provider, instruction set): colour and marker, in the order of the legend; others are not drawn.
STYLES = {
    ("ours", "avx512_bf16"): ("tab:blue", "o"),
    ("ours", "avx512"): ("tab:blue", "."),
    ("ours", "avx2"): ("tab:cyan", "s"),
    ("ours", "neon"): ("tab:cyan", "s"),
    ("ours", "generic"): ("tab:purple", "v"),
    ("ours", None): ("tab:blue", "o"),
    ("idiom", None): ("tab:red", "D"),
    ("torch.compile", None): ("tab:orange", "^"),
    ("addmm_", None): ("tab:green", "P"),
    ("lerp", None): ("tab:olive", "X"),
}
BY_SIZE = (("dense", None), ("rademacher", None), ("adam", None), ("lowrank", 16), ("lowrank", 64), ("list", None))


def against_floor(rows: Sequence[dict]) -> Figure:
    """Time over that of ``W.add_(1.0)``, of every op at its largest size and most threads; a panel per dtype."""
    rows = largest(rows)
    dtypes = [dtype for dtype in ALL if any(r["dtype"] == dtype for r in rows)]
    floor = OPS["dense"].floor
    ops = [(op, rank) for op in OPS if OPS[op].sized and OPS[op].floor == floor for rank in _ranks(rows, op)]
    figure = _figure(1.5 + 3.6 * max(len(dtypes), 1), 2 + 0.3 * len(ops))
    for i, dtype in enumerate(dtypes):
        axes = figure.add_subplot(1, len(dtypes), i + 1)
        for style, (colour, marker) in STYLES.items():
            found = {(r["op"], r["rank"]): r for r in rows if (r["provider"], r["isa"], r["dtype"]) == (*style, dtype)}
            places = [(ops.index(key), _median([r], "floor_ratio")) for key, r in found.items() if key in ops]
            if places:
                ys, xs = zip(*places, strict=True)
                axes.plot(xs, ys, marker, color=colour, label=_label(style), zorder=9 if style[0] == "ours" else 5)
        axes.axvline(1, color="black", label=floor, zorder=0)
        axes.set(xscale="log", ylim=(len(ops) - 0.5, -0.5), title=dtype)
        axes.set_yticks(range(len(ops)), [_name(*key) for key in ops] if i == 0 else [""] * len(ops), fontsize=8)
        axes.set_xlabel(f"time / {floor}")
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def by_size(rows: Sequence[dict]) -> Figure:
    """Time per weight against the size of the matrix, on all threads, of some ops in float32."""
    most = max((r["threads"] for r in rows), default=1)
    rows = [r for r in rows if "seconds" in r and r["threads"] == most and r["dtype"] == ALL[0]]
    panels = [(op, rank) for op, rank in BY_SIZE if any((r["op"], r["rank"]) == (op, rank) for r in rows)]
    across = min(max(len(panels), 1), 3)
    down = -(-len(panels) // across)
    figure = _figure(3.8 * across + 0.5, 3 * down + 1)
    for i, (op, rank) in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        own = [r for r in rows if (r["op"], r["rank"]) == (op, rank)]
        _line(axes, [r for r in own if r["provider"] == "floor"], "black", "", OPS[op].floor)
        for style, (colour, marker) in STYLES.items():
            _line(axes, [r for r in own if (r["provider"], r["isa"]) == style], colour, marker, _label(style))
        axes.set(xscale="log", yscale="log", title=_name(op, rank), xlabel="MB of weights", ylabel="ns per weight")
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def largest(rows: Sequence[dict]) -> list[dict]:
    """A row per op, dtype, rank, tokens, provider and instruction set, at the largest size on most threads.

    Its ratios are medians of the runs. A provider that was too slow for that size is left out.
    """
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["dtype"], r["rank"], r.get("tokens")), []).append(r)
    found = []
    for own in groups.values():
        size, threads = max((r["megabytes"], r["threads"]) for r in own)
        there = [r for r in own if "seconds" in r and (r["megabytes"], r["threads"]) == (size, threads)]
        contenders: dict[tuple, list[dict]] = {}
        for r in there:
            contenders.setdefault((r["provider"], r["isa"]), []).append(r)
        found += [same[0] | {"floor_ratio": _median(same, "floor_ratio")} for same in contenders.values()]
    return found


def _line(axes: Axes, rows: Sequence[dict], colour: str, marker: str, label: str) -> None:
    sizes: dict[float, list[float]] = {}
    for r in rows:
        weights = r["shape"][0] * r["shape"][1] * (r["shape"][2] if len(r["shape"]) > 2 else 1)
        sizes.setdefault(r["megabytes"], []).append(1e9 * r["seconds"] / weights)
    if sizes:
        points = sorted((size, statistics.median(values)) for size, values in sizes.items())
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, markersize=5)


def _ranks(rows: Sequence[dict], op: str) -> list:
    return sorted({r["rank"] for r in rows if r["op"] == op}, key=lambda rank: rank or 0)


def _median(rows: Sequence[dict], name: str) -> float:
    return statistics.median(r[name] for r in rows)


def _name(op: str, rank: int | None) -> str:
    return OPS[op].title + (f" {rank}" if rank else "")


def _label(style: tuple) -> str:
    return " ".join(x for x in style if x)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure) -> None:
    """One for all panels."""
    handles: dict = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=8)
