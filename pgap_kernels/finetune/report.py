"""What a run leaves behind: report.json, curves.png and a short table."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .config import Config
from .data import Dataset
from .timing import PARTS

#: What losses of each row say about the gradient (`pgap_kernels.optim.Signal`), and as it is written in the figure.
SIGNAL = {"second_moment": "E |gᵢ|²", "trace": "tr Σ", "squared_norm": "|g|²"}
COLORS = {"forward": "#4c78a8", "perturb": "#f58518", "refresh": "#54a24b", "rest": "#bab0ac"}


def empty(config: Config, versions: dict[str, Any], model: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """A report with everything known before the first step; the run fills in the rest.

    Entries: ``status``; ``config``; ``versions``; ``model``; ``data``; ``test`` (``before`` and ``after``: loss in
    nats, accuracy 0 to 1, examples); ``curves`` (``train_loss`` of every step; ``signal``: step and what its losses say
    about the gradient, of steps with a loss per row; ``dev``: step, loss, accuracy);
    ``timing`` (steps, seconds by part, seconds of one refresh, the window of steps that it serves, and seconds per step
    with their share of it); ``mode`` (name and reason, once there is an optimizer); ``weight_passes`` (reads and writes
    of all tuned weights in the whole run); ``peak_memory_mib``; ``baseline`` (the method in plain PyTorch: losses,
    timing, peak memory; null if it did not run); ``notes``.
    """
    return {
        "status": "running",
        "config": config.as_dict(),
        "versions": versions,
        "model": model,
        "data": {
            "name": dataset.name,
            "labels": list(dataset.labels),
            "train": len(dataset.train),
            "dev": len(dataset.dev),
            "test": len(dataset.test),
            "dropped": dataset.dropped,
        },
        "test": {"before": None, "after": None},
        "curves": {"train_loss": [], "signal": [], "dev": []},
        "mode": None,
        "timing": None,
        "weight_passes": None,
        "peak_memory_mib": None,
        "baseline": None,
        "notes": [],
    }


def to_json(report: dict[str, Any]) -> str:
    """The report as standard JSON; numbers that are not finite become null."""
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json`` and ``curves.png`` into ``folder``, replacing old ones only when complete."""
    temporary = folder / ".report.json.incomplete"
    temporary.write_text(to_json(report) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "report.json")
    temporary = folder / ".curves.incomplete.png"
    draw(report, temporary)
    os.replace(temporary, folder / "curves.png")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw loss, what the losses say about the gradient if they do, accuracy and where the time went."""
    from matplotlib.figure import Figure

    panels = [_draw_loss, *([_draw_signal] if report["curves"]["signal"] else []), _draw_accuracy, _draw_seconds]
    figure = Figure(figsize=(13 / 3 * len(panels), 4), layout="constrained")
    config = report["config"]
    figure.suptitle(f"{config['method']} on {report['model']['name']}, {report['data']['name']}", fontsize=11)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, report)
    figure.savefig(path, dpi=130)


def _draw_loss(axes: Any, report: dict[str, Any]) -> None:
    train, dev = report["curves"]["train_loss"], report["curves"]["dev"]
    steps = range(1, len(train) + 1)
    axes.plot(steps, train, color="#4c78a8", alpha=0.3, linewidth=0.8, label="train, each batch")
    axes.plot(steps, _running_mean(train, 20), color="#4c78a8", label="train, mean of last 20")
    axes.plot(_column(dev, "step"), _column(dev, "loss"), color="#f58518", marker="o", markersize=4, label="dev")
    axes.set(title="loss", xlabel="step", ylabel="cross-entropy (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_signal(axes: Any, report: dict[str, Any]) -> None:
    signal = report["curves"]["signal"]
    for name, label in SIGNAL.items():
        told = [point for point in signal if point[name] is not None]
        axes.plot(_column(told, "step"), _running_mean(_column(told, name), 20), label=label)
    axes.set_yscale("log", nonpositive="mask")  # estimates of |g|² may be negative
    axes.set(title="gradient, mean of last 20", xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_accuracy(axes: Any, report: dict[str, Any]) -> None:
    dev, test = report["curves"]["dev"], report["test"]
    axes.plot(_column(dev, "step"), _column(dev, "accuracy"), color="#f58518", marker="o", markersize=4, label="dev")
    for step, score in ((0, test["before"]), (len(report["curves"]["train_loss"]), test["after"])):
        if score:
            axes.plot(step, score["accuracy"], "D", color="black", label=None if step else "test")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set(title="accuracy", xlabel="step", ylabel="share correct")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_seconds(axes: Any, report: dict[str, Any]) -> None:
    columns = {name: timing["seconds_per_step"] for name, timing in _timings(report).items()}
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
    axes.invert_yaxis()
    if columns:
        axes.legend(fontsize=8)


def _timings(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Timing by the name of the run, of runs that completed at least one step."""
    found = {"pgap_kernels": report["timing"]}
    if report["baseline"]:
        found["plain PyTorch"] = report["baseline"]["timing"]
    return {name: timing for name, timing in found.items() if timing and timing["steps"]}


def _column(points: list[dict[str, Any]], name: str) -> list[Any]:
    return [point[name] for point in points]


def _running_mean(values: list[float], width: int) -> list[float]:
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print what changed and where the time went."""
    console.print(_headline(report), highlight=False)
    console.print(_result_table(report))
    if _timings(report):
        console.print(_time_table(report))


def _headline(report: dict[str, Any]) -> str:
    model, steps = report["model"], len(report["curves"]["train_loss"])
    mode = f", mode {report['mode']['name']}" if report["mode"] else ""
    tuned, total = (f"{model[name] / 1e6:.4g} M" for name in ("tuned_parameters", "parameters"))
    return (
        f"{report['config']['method']}{mode}, {steps} steps on {report['data']['name']}\n"
        f"{model['name']}: {tuned} of {total} parameters tuned"
    )


def _result_table(report: dict[str, Any]) -> Table:
    table = Table()
    for heading in (f"test ({report['data']['test']} examples)", "before", "after"):
        table.add_column(heading, justify="left" if heading.startswith("test") else "right")
    for name, digits in (("loss", 4), ("accuracy", 3)):
        scores = [report["test"][when] for when in ("before", "after")]
        table.add_row(name, *(f"{score[name]:.{digits}f}" if score else "-" for score in scores))
    return table


def _time_table(report: dict[str, Any]) -> Table:
    timings = _timings(report)
    table = Table(title="seconds per step")
    table.add_column("part")
    for name in timings:
        table.add_column(name, justify="right")
    if len(timings) == 2:
        table.add_column("ratio", justify="right")
    window = report["timing"]["window"]
    for part in (*PARTS, "total"):
        seconds = [timing["seconds_per_step"][part] for timing in timings.values()]
        if not any(seconds):
            continue
        if part == "total":
            table.add_section()
        label = f"refresh / {window} (window)" if part == "refresh" else part
        ratio = [f"{seconds[1] / seconds[0]:.2f}×" if seconds[0] else "-"] if len(seconds) == 2 else []
        table.add_row(label, *(f"{value:.4f}" for value in seconds), *ratio)
    peaks = [report["peak_memory_mib"]] + ([report["baseline"]["peak_memory_mib"]] if len(timings) == 2 else [])
    table.add_section()
    table.add_row("process peak so far (MiB)", *(f"{peak:.0f}" for peak in peaks), *([""] * (len(timings) - 1)))
    return table
