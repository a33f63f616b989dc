"""The figure of a report: losses, what they say about the gradient, a metric, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .timing import PARTS

#: What losses of each row say about the gradient (`pgap_kernels.optim.Signal`), and as it is written in the figure.
SIGNAL = {"second_moment": "E |gᵢ|²", "trace": "tr Σ", "squared_norm": "|g|²"}
COLORS = {"forward": "#4c78a8", "perturb": "#f58518", "refresh": "#54a24b", "rest": "#bab0ac"}


def draw(report: Mapping[str, Any], to: Any, form: str = "png") -> None:
    """Draw a report.

    Args:
        to: a path, or a file that is open for writing.
        form: "png" or "svg".
    """
    from matplotlib.figure import Figure

    panels = [_draw_loss, *([_draw_signal] if report["curves"]["signal"] else []), _draw_metric, _draw_seconds]
    figure = Figure(figsize=(13 / 3 * len(panels), 4), layout="constrained")
    config = report["config"]
    figure.suptitle(f"{config['method']} on {report['model']['name']}, {report['data']['name']}", fontsize=11)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, report)
    _save(figure, to, form)


def draw_seeds(report: Mapping[str, Any], to: Any) -> None:
    """Draw the loss and the first metric on dev of several seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", report["metrics"][0]), strict=True):
        for run in report["runs"]:
            dev = run["curves"]["dev"]
            axes.plot(_column(dev, "step"), _column(dev, name), marker="o", markersize=3,
                      label=f"seed {run['config']['seed']}")  # fmt: skip
        axes.set(title=f"{name.replace('_', ' ')} on dev", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, to, "svg")


def _save(figure: Any, to: Any, form: str) -> None:
    from matplotlib import rc_context

    # Text stays text, and the same report gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(to, dpi=130, format=form, metadata={"Date": None} if form == "svg" else None)


def _draw_loss(axes: Any, report: Mapping[str, Any]) -> None:
    train, dev = report["curves"]["train_loss"], report["curves"]["dev"]
    steps = range(1, len(train) + 1)
    objective = report["config"]["objective"]
    of_train = "train" if objective == "loss" else f"train, 1 - {objective}"
    axes.plot(steps, _numbers(train), color="#4c78a8", alpha=0.3, linewidth=0.8, label=f"{of_train}, each batch")
    axes.plot(steps, _running_mean(train, 20), color="#4c78a8", label=f"{of_train}, mean of last 20")
    axes.plot(_column(dev, "step"), _column(dev, "loss"), color="#f58518", marker="o", markersize=4, label="dev")
    axes.set(title="loss", xlabel="step", ylabel="nats" if objective == "loss" else "")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_signal(axes: Any, report: Mapping[str, Any]) -> None:
    signal = report["curves"]["signal"]
    for name, label in SIGNAL.items():
        told = [point for point in signal if point[name] is not None]
        if told:  # groups of one example do not tell |g|²
            axes.plot(_column(told, "step"), _running_mean(_column(told, name), 20), label=label)
    if any(point[name] is not None and point[name] > 0 for point in signal for name in SIGNAL):
        axes.set_yscale("log", nonpositive="mask")  # estimates of |g|² may be negative
    axes.set(title="gradient, mean of last 20", xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_metric(axes: Any, report: Mapping[str, Any]) -> None:
    dev, test, name = report["curves"]["dev"], report["test"], report["metrics"][0]
    axes.plot(_column(dev, "step"), _column(dev, name), color="#f58518", marker="o", markersize=4, label="dev")
    for step, score in ((0, test["before"]), (last_step(report), test["after"])):
        if score:
            axes.plot(step, _numbers([score[name]]), "D", color="black", label=None if step else "test")
    if report["data"]["majority"] is not None:
        axes.axhline(report["data"]["majority"], color="gray", linewidth=0.8, linestyle=":", label="majority")
    axes.set(title=name.replace("_", " "), xlabel="step", ylabel="share correct" if name == "accuracy" else "")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def last_step(report: Mapping[str, Any]) -> int:
    """The step whose weights were tested last."""
    kept = report.get("kept_step")
    return len(report["curves"]["train_loss"]) if kept is None else kept


def _draw_seconds(axes: Any, report: Mapping[str, Any]) -> None:
    columns = {name: timing["seconds_per_step"] for name, timing in timings(report).items()}
    left = dict.fromkeys(columns, 0.0)
    for part in PARTS:
        widths = [seconds[part] for seconds in columns.values()]
        if any(widths):
            axes.barh(list(columns), widths, left=list(left.values()), color=COLORS[part], label=part, height=0.5)
        left = {name: left[name] + seconds[part] for name, seconds in columns.items()}
    for row, end in enumerate(left.values()):
        axes.text(end, row, f" {end:.3g} s", va="center", fontsize=9)
    axes.set(title="where a step's time goes", xlabel="seconds per step")
    axes.margins(x=0.2, y=0.3)
    axes.locator_params(axis="x", nbins=4)
    axes.invert_yaxis()
    if columns:
        axes.legend(fontsize=8, ncols=len(PARTS), loc="lower center", frameon=False)


def timings(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Timing by the name of what took it, of what took at least one step.

    Next to the method in plain PyTorch stand the steps that took turns with its own: they saw the same machine.
    """
    if report["baseline"]:
        baseline = report["baseline"]
        found = {"pgap_kernels": baseline["turns"], "plain PyTorch": baseline["timing"]}
    else:
        found = {"pgap_kernels": report["timing"]}
    return {name: timing for name, timing in found.items() if timing and timing["steps"]}


def _column(points: list[dict[str, Any]], name: str) -> list[Any]:
    return _numbers([point[name] for point in points])


def _numbers(values: list[float | None]) -> list[float]:
    """Values that a report has as None, as they were not finite, are NaN again, which leaves a gap."""
    return [math.nan if value is None else value for value in values]


def _running_mean(values: list[float | None], width: int) -> list[float]:
    """Of the last values that are finite."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    finite = ([value for value in window if value is not None and math.isfinite(value)] for window in windows)
    return [sum(window) / len(window) if window else math.nan for window in finite]
