"""Several runs that differ in their seed, and one report of all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from . import checkpoint, page, report
from .config import Config
from .interrupts import Interrupts
from .job import finished, refuse_more
from .output import Output

Run = Callable[[Config, Interrupts], dict[str, Any]]


def run(config: Config, run_one: Run) -> dict[str, Any]:
    """A run for each seed, in folders ``seed-N`` of the output folder, and a report of all after each.

    Returns:
        ``status`` (that of the first run that was not completed, if there is one, after which no other begins),
        ``config``, ``metrics``, ``summary`` (of "before" and "after": by measure mean, sample standard deviation and
        the values of the seeds) and ``runs`` (the report of each seed).

    Raises:
        UserError: as of one run; folders and finished runs are looked at before the first begins.
    """
    output = Output(config.output, overwrite=config.overwrite, resume=config.resume)
    configs = [config.of_seed(seed, str(output.folder / f"seed-{seed}")) for seed in config.seeds]
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    try:
        done = [_finished(one) for one in configs]
        output.begin()
        with Interrupts() as interrupts:
            for one, before in zip(configs, done, strict=True):
                interrupts.again()
                runs.append(before or run_one(one, interrupts))
                result = combined(config, runs)
                if result["status"] == "completed" and len(runs) < len(configs):
                    result["status"] = "running"
                _write(result, output)
                if runs[-1]["status"] != "completed":
                    break
    except KeyboardInterrupt as error:
        if not runs:
            raise
        result |= {"status": "interrupted", "signal": getattr(error, "number", 2)}
        _write(result, output)
    except Exception as error:
        if result:
            _write(result | {"status": "failed", "error": str(error)}, output)
        raise
    finally:
        output.close()
    return result


def _finished(config: Config) -> dict[str, Any] | None:
    """The report of a seed's run, if it is to be left as it is; its folder is tried out.

    Raises:
        UserError: it cannot be had as it is wanted now.
    """
    folder = Output(config.output, overwrite=config.overwrite, resume=config.resume, several=True)
    folder.close()
    before = finished(config, folder)
    if before is not None:
        checkpoint.check_options(config, before["config"], config.output)
        refuse_more(config, before)
    return before


def _write(result: dict[str, Any], output: Output) -> None:
    report.write_json(result, output)
    output.write("report.html", lambda path: path.write_text(page.render_seeds(report.finite(result)), "utf-8"))


def combined(config: Config, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of several runs."""
    names = ["loss", *runs[0]["metrics"]]
    summary = {}
    for when in ("before", "after"):
        scores = [one["test"][when] for one in runs if one["test"][when]]
        summary[when] = {name: _spread([score[name] for score in scores]) for name in names} if scores else None
    found = {
        "status": runs[-1]["status"],
        "config": {**config.as_dict(), "lr": runs[0]["config"]["lr"]},  # it may depend on the data
        "metrics": runs[0]["metrics"],
        "summary": summary,
        "runs": runs,
    }
    return found | ({"signal": runs[-1]["signal"]} if "signal" in runs[-1] else {})


def _spread(found: list[float | None]) -> dict[str, Any]:
    values = [math.nan if value is None else value for value in found]  # as JSON has it
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": values}
