"""Two panels: how far weights drift when nothing is learnt, and how much of an update arrives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPE = "bfloat16"


def draw(rows: Sequence[dict], file: Path) -> None:
    """Draw the panels that there are rows for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drift = [r for r in rows if r["section"] == "drift" and r["dtype"] == DTYPE]
    movement = [r for r in rows if r["section"] == "movement" and r["table"] == "random"]
    movement = [r for r in movement if r["dtype"] == movement[0]["dtype"]]
    panels = [(_drift, drift)] * bool(drift) + [(_movement, movement)] * bool(movement)
    figure = Figure(figsize=(7.5 * max(len(panels), 1), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (panel, own) in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), i + 1), own)
    figure.savefig(file, dpi=150)


def _drift(axes: Any, rows: Sequence[dict]) -> None:
    least = min((r["drift"] for r in rows if r["drift"]), default=1e-3)
    # Zero has no place on a logarithmic axis: schemes that change nothing share a band below it.
    exact = [
        s for s in dict.fromkeys(r["scheme"] for r in rows) if not any(r["drift"] for r in rows if s == r["scheme"])
    ]
    for scheme in dict.fromkeys(r["scheme"] for r in rows):
        own = [r for r in rows if r["scheme"] == scheme]
        steps = [r["step"] for r in own]
        if scheme in exact:
            level = least / 4 * 1.2 ** exact.index(scheme)
            axes.loglog(steps, [level] * len(own), "--s", label=f"{scheme}: {_bits(own)}", markersize=4)
        else:
            axes.loglog(steps, [r["drift"] for r in own], "-o", label=scheme, markersize=4)
    axes.axhspan(least / 5, least / 2, color="gray", alpha=0.15)
    axes.text(1, least / 2.1, " exactly 0", va="top", fontsize=8, color="gray")
    axes.set_ylim(bottom=least / 5)
    axes.set(
        title=f"learning rate 0, {DTYPE}: weights that should stay where they are",
        xlabel="step",
        ylabel="RMS drift / RMS of the weights",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bits(rows: Sequence[dict]) -> str:
    changed = max(r["changed"] for r in rows)
    return f"{changed} weights changed" if changed else "no bit changed"


def _movement(axes: Any, rows: Sequence[dict]) -> None:
    schemes = list(dict.fromkeys(r["scheme"] for r in rows))
    sizes = list(dict.fromkeys(r["fresh"] for r in rows))
    height = 0.8 / len(sizes)
    for i, size in enumerate(sizes):
        values = [next(r["correlation"] for r in rows if (r["scheme"], r["fresh"]) == (s, size)) for s in schemes]
        places = [n + (i - (len(sizes) - 1) / 2) * height for n in range(len(schemes))]
        axes.barh(places, values, height=height, label=f"{size:.0e} RMS per step")
        for place, value in zip(places, values, strict=True):
            axes.text(max(value, 0) + 0.01, place, f"{value:.2f}", va="center", fontsize=6)
    axes.set_yticks(range(len(schemes)), schemes, fontsize=8)
    axes.invert_yaxis()
    axes.set(
        title=f"{rows[0]['dtype']}: where updates arrive after {rows[0]['steps']} steps",
        xlabel="correlation of actual and intended movement",
        xlim=(0, 1.1),
    )
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=len(sizes))
