"""Several runs that differ in their seed, and one report of all."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import page, report
from .config import Config
from .output import Output

Run = Callable[[Config], dict[str, Any]]


def run(config: Config, run_one: Run) -> dict[str, Any]:
    """A run for each seed, in folders ``seed-N`` of the output folder, then a report of all.

    Returns:
        ``status`` (that of the first run that was not completed, if there is one, after which no other begins),
        ``config``, ``metrics``, ``summary`` (of "before" and "after": by measure mean, sample standard deviation and
        the values of the seeds) and ``runs`` (the report of each seed).
    """
    folder = Path(config.output).expanduser()
    runs = []
    for seed in config.seeds:
        found = _finished(folder / f"seed-{seed}") if config.resume else None
        runs.append(found or run_one(config.of_seed(seed, str(folder / f"seed-{seed}"))))
        if runs[-1]["status"] != "completed":
            break
    result = combined(config, runs)
    output = Output(str(folder), overwrite=False, resume=False)
    try:
        report.write_json(result, output)
        output.write("report.html", lambda path: path.write_text(page.render_seeds(report.finite(result)), "utf-8"))
    finally:
        output.close()
    return result


def _finished(folder: Path) -> dict[str, Any] | None:
    """The report of a run that is complete already."""
    file = folder / "report.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if found["status"] == "completed" else None


def combined(config: Config, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of several runs."""
    names = ["loss", *runs[0]["metrics"]]
    summary = {}
    for when in ("before", "after"):
        scores = [one["test"][when] for one in runs if one["test"][when]]
        summary[when] = {name: _spread([score[name] for score in scores]) for name in names} if scores else None
    found = {
        "status": runs[-1]["status"],
        "config": config.as_dict(),
        "metrics": runs[0]["metrics"],
        "summary": summary,
        "runs": runs,
    }
    return found | ({"signal": runs[-1]["signal"]} if "signal" in runs[-1] else {})


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": values}
