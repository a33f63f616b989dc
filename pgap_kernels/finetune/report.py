"""What a run leaves behind: report.json, report.html, curves.png and curve.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from . import figure, metrics, page
from .config import Config
from .data import Dataset
from .figure import SIGNAL
from .output import Output
from .scoring import METRICS

__all__ = ["SIGNAL", "changed", "empty", "finite", "to_json", "write", "write_json"]

EXAMPLES = 10  # of each kind that are shown


def empty(config: Config, versions: dict[str, Any], model: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """A report with everything known before the first step; the run fills in the rest.

    Entries: ``status`` ("running", "completed", "interrupted", "diverged" or "failed"; with ``error`` and ``signal``
    where there is one); ``ended`` ("patience" or "time limit" where that ended the steps); ``kept_step`` (whose weights
    the run ended with, where the best were wanted); ``config``; ``versions``; ``model``; ``data`` (with the number of
    examples by label, what was dropped and why, and ``majority``, the accuracy on test of the most frequent label);
    ``metrics`` (names, the most telling first); ``test`` (``before`` and ``after``: loss in nats, metrics 0 to 1,
    examples); ``curves`` (``train_loss``, ``lr`` and ``seconds`` since the start, of every step; ``signal``: step and
    what its losses say about the gradient, of steps with a loss per row; ``dev``: step, loss, metrics); ``timing``
    (steps, seconds by part, seconds of one refresh, the window of steps that it serves, seconds per step with their
    share of it, and ``wall_seconds``, evaluations included); ``mode`` (name and reason, once there is an optimizer);
    ``weight_passes`` (reads and writes of all tuned weights in the whole run); ``peak_memory_mib`` (on CUDA what the
    run allocated, else the process since it began; without the baseline and the trial of a saved model); ``baseline``
    (the method in plain PyTorch: losses, timing, peak memory beside ours, and ``turns``: the timing of the steps of
    ours beside its own; null if it did not run); ``examples`` of test that were fixed, broken, or are still wrong;
    ``saved_model`` (its loss when loaded again, and that of the tuned model, on some test examples); ``notes``.
    """
    return {
        "status": "running",
        "ended": None,
        "kept_step": None,
        "config": config.as_dict(),
        "versions": versions,
        "model": model,
        "data": {
            "name": dataset.name,
            "task": dataset.task,
            "labels": list(dataset.labels),
            "words": list(dataset.words),
            "train": len(dataset.train),
            "dev": len(dataset.dev),
            "test": len(dataset.test),
            "counts": {part: dataset.counts(part) for part in ("train", "dev", "test")} if dataset.labels else None,
            "majority": dataset.majority,
            "dropped": dataset.dropped,
        },
        "metrics": list(METRICS[dataset.task]),
        "test": {"before": None, "after": None},
        "curves": {"train_loss": [], "lr": [], "seconds": [], "signal": [], "dev": []},
        "mode": None,
        "timing": None,
        "weight_passes": None,
        "peak_memory_mib": None,
        "baseline": None,
        "examples": None,
        "saved_model": None,
        "notes": [],
    }


def changed(dataset: Dataset, said: dict[str, list[str]]) -> dict[str, list[dict[str, str]]] | None:
    """Test examples that the model got wrong before or after: those fixed, those broken, and those still wrong."""
    if "before" not in said:
        return None
    kinds: dict[tuple[bool, bool], str] = {
        (False, True): "fixed", (True, False): "broken", (False, False): "still_wrong"
    }  # fmt: skip
    found: dict[str, list[dict[str, str]]] = {kind: [] for kind in kinds.values()}
    for index, example in enumerate(dataset.test):
        answers = {when: all_of[index] for when, all_of in said.items()}
        right = {when: _is_right(dataset, example, answer) for when, answer in answers.items()}
        kind = kinds.get((right["before"], right.get("after", right["before"])))
        if kind is not None and len(found[kind]) < EXAMPLES:
            wanted = example.texts if dataset.task == "generation" else [example.texts[example.label]]
            found[kind].append({"prompt": example.prompt, "right": " / ".join(wanted), **answers})
    return found


def _is_right(dataset: Dataset, example: Any, answer: str) -> bool:
    if dataset.task == "generation":
        return bool(metrics.exact_match(answer, example.texts))
    return answer == example.texts[example.label]


def to_json(report: dict[str, Any]) -> str:
    """The report as standard JSON; numbers that are not finite become null."""
    return json.dumps(finite(report), indent=2, allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """A value with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(report: dict[str, Any], output: Output) -> None:
    """Write all files; the most needed first, should the disk be full."""
    write_json(report, output)
    output.write("curve.csv", lambda path: path.write_text(_curve(report), encoding="utf-8"))
    output.write("report.html", lambda path: path.write_text(page.render(finite(report)), encoding="utf-8"))
    output.write("curves.png", lambda path: figure.draw(report, path))


def write_json(report: dict[str, Any], output: Output) -> None:
    """Write ``report.json`` as far as the run is."""

    def write_text(path: Path) -> None:
        path.write_text(to_json(report) + "\n", encoding="utf-8")

    output.write("report.json", write_text)


def _curve(report: dict[str, Any]) -> str:
    """A row for each step and evaluation: what spreadsheets read."""
    curves = report["curves"]
    dev = {point["step"]: point for point in curves["dev"]}
    names = ["loss", *report["metrics"]]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "train_loss", "lr", "seconds", *(f"dev_{name}" for name in names)])
    for step in range(len(curves["train_loss"]) + 1):
        own = [curves[name][step - 1] for name in ("train_loss", "lr", "seconds")] if step else [""] * 3
        if step or step in dev:
            rows.writerow([step, *own, *(dev[step][name] if step in dev else "" for name in names)])
    return text.getvalue()
