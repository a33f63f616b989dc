"""The loss over example-forwards and over seconds, of each arm with its best setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from benchmarks.convergence import times
from benchmarks.convergence.times import AXES, Record, Setting


def draw(study: Mapping[str, Any], arms: Mapping[str, dict[Setting, dict[int, Record]]], file: Path) -> None:
    """Draw those that have a budget; a thin line is a seed, a thick one their mean as far as all seeds go."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [axis for axis in AXES if study[axis]]
    figure = Figure(figsize=(7 * len(shown), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, axis in enumerate(shown, 1):
        _panel(figure.add_subplot(1, len(shown), place), study, arms, axis)
    figure.savefig(file, dpi=150)


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves at all places that one of them has and all of them reach, interpolated between their own."""
    places = sorted({x for curve in curves for x, _ in curve})
    shared = [x for x in places if all(curve[0][0] <= x <= curve[-1][0] for curve in curves)]
    values = [numpy.interp(shared, *zip(*curve, strict=True)) for curve in curves]
    return list(zip(shared, numpy.mean(values, axis=0).tolist(), strict=True))


def _panel(
    axes: Any, study: Mapping[str, Any], arms: Mapping[str, dict[Setting, dict[int, Record]]], axis: str
) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    for number, (arm, found) in enumerate(arms.items()):
        best = times.lowest(found, axis, study[axis])
        color = f"C{number}"
        # The start is not on a logarithmic axis; a run that diverged before it was evaluated has nothing else.
        curves = [run["checkpoints"][1:] for run in best.runs.values() if len(run["checkpoints"]) > 1]
        if not curves:
            continue
        for curve in curves:
            axes.plot([p[axis] for p in curve], [p["loss"] for p in curve], color=color, linewidth=0.6, alpha=0.5)
        mean = mean_curve([[(p[axis], p["loss"]) for p in curve] for curve in curves])
        axes.plot(*zip(*mean, strict=True), color=color, linewidth=2, label=f"{arm}: {best.setting}")
    for name, target in study["targets"].items():
        axes.axhline(target, color="gray", linewidth=0.8, linestyle=":")
        axes.text(1, target, f" {name}", transform=axes.get_yaxis_transform(), fontsize=8, va="center", color="gray")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(right=study[axis])
    unit = {"forwards": "example-forwards", "seconds": "seconds of steps"}[axis]
    loss = f"{study['part']} loss"
    axes.set(
        title=f"each arm's setting with the lowest loss at {study[axis]:g} {unit}",
        xlabel=unit,
        ylabel=f"{loss} (nats)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
