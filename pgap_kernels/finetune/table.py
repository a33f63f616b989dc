"""The short table of a report that is printed when a run ends."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .figure import timings
from .page import number
from .timing import PARTS


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print what changed and where the time went; of several seeds, what changed."""
    if "runs" in report:
        console.print(_seeds_table(report))
        return
    console.print(_headline(report), highlight=False)
    console.print(_result_table(report))
    if timings(report):
        console.print(_time_table(report))


def _headline(report: dict[str, Any]) -> str:
    model, steps = report["model"], len(report["curves"]["train_loss"])
    mode = f", mode {report['mode']['name']}" if report["mode"] else ""
    tuned, total = (f"{model[name] / 1e6:.4g} M" for name in ("tuned_parameters", "parameters"))
    return (
        f"{report['config']['method']}{mode}, {steps} steps on {report['data']['name']}\n"
        f"{model['name']}: {tuned} of {total} parameters tuned"
    )


def _seeds_table(report: dict[str, Any]) -> Table:
    names = ["loss", *report["metrics"]]
    first = report["runs"][0]
    table = Table(
        title=f"{report['config']['method']} on {first['data']['name']}, test ({first['data']['test']} examples)"
    )
    for heading in ("seed", *(f"{name.replace('_', ' ')} {when}" for name in names for when in ("before", "after"))):
        table.add_column(heading, justify="left" if heading == "seed" else "right")
    for run in report["runs"]:
        scores = [run["test"][when] for _ in names for when in ("before", "after")]
        each = [name for name in names for _ in range(2)]
        cells = (number(score and score[name], 4) for score, name in zip(scores, each, strict=True))
        table.add_row(str(run["config"]["seed"]), *cells)
    table.add_section()
    means = [report["summary"][when] and report["summary"][when][name]["mean"] for name in names
             for when in ("before", "after")]  # fmt: skip
    table.add_row("mean", *(number(mean, 4) for mean in means))
    return table


def _result_table(report: dict[str, Any]) -> Table:
    table = Table()
    for heading in (f"test ({report['data']['test']} examples)", "before", "after"):
        table.add_column(heading, justify="left" if heading.startswith("test") else "right")
    for name, digits in (("loss", 4), *((metric, 3) for metric in report["metrics"])):
        scores = [report["test"][when] for when in ("before", "after")]
        table.add_row(name.replace("_", " "), *(number(score and score[name], digits) for score in scores))
    if report["data"]["majority"] is not None:
        table.add_section()
        table.add_row("accuracy of the most frequent label", f"{report['data']['majority']:.3f}", "")
    return table


def _time_table(report: dict[str, Any]) -> Table:
    found = timings(report)
    table = Table(title="seconds per step")
    table.add_column("part")
    for name, timing in found.items():
        table.add_column(f"{name}, {timing['steps']} steps", justify="right")
    if len(found) == 2:
        table.add_column("ratio", justify="right")
    window = report["timing"]["window"]
    for part in (*PARTS, "total"):
        seconds = [timing["seconds_per_step"][part] for timing in found.values()]
        if not any(seconds):
            continue
        if part == "total":
            table.add_section()
        label = f"refresh / {window} (window)" if part == "refresh" else part
        ratio = [f"{seconds[1] / seconds[0]:.2f}×" if seconds[0] else "-"] if len(seconds) == 2 else []
        table.add_row(label, *(f"{value:.4f}" for value in seconds), *ratio)
    if len(found) == 1:
        table.add_section()
        table.add_row("process peak (MiB)", f"{report['peak_memory_mib']:.0f}")
    return table
