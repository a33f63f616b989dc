"""Seconds of a step of every arm, taken in turns on one machine.

    python -m benchmarks.convergence speed DIR [--config FILE] [--device cuda] [--turns 9]

Cells take hours, in which a machine does not keep its speed; so their seconds would say as much of the hour as of the
method. Here all arms make a step in turn, again and again: what they share a slow minute with is each other. Written to
DIR/speed.json: the median for each number of example-forwards that a step has, as steps with a refresh have more. The
report makes seconds of them, step by step. All are steps on batches that are padded to about the mean length of a pass
through the data. Windows are shortened, to see several refreshes; the first step of each arm does not count. Run it on
an idle machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.convergence.run import Run
from benchmarks.convergence.store import SPEED, Store
from benchmarks.convergence.study import DEFAULT, Cell, Refused, Study, load
from benchmarks.harness import machine, options
from benchmarks.harness.tables import Table, console
from pgap_kernels.finetune import UserError

WINDOW = 4
Row = dict[str, Any]


def measure(
    study: Study, device: torch.device, turns: int, shown: Callable[[range], Iterable[int]] = iter
) -> list[Row]:
    """A row for each arm, batch size and number of example-forwards of a step: the median seconds of its turns."""
    runs = [Run(_shortened(cell), study, device) for cell in _one_each(study.cells)]
    batches = [_of_mean_length(run, turns) for run in runs]
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for turn in shown(range(turns)):
        for run, chosen in zip(runs, batches, strict=True):
            done = run.forwards
            begin = time.perf_counter()
            run.step(chosen[turn % len(chosen)])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                key = run.cell.arm, run.cell.batch, run.forwards - done
                seconds.setdefault(key, []).append(time.perf_counter() - begin)
    return [
        {
            "arm": arm,
            "batch": batch,
            "forwards": forwards,
            "seconds": statistics.median(own),
            "least": min(own),
            "most": max(own),
            "turns": len(own),
        }
        for (arm, batch, forwards), own in seconds.items()
    ]


def _of_mean_length(run: Run, count: int) -> list[int]:
    """Steps of a pass through the data whose batches are about as long as they are on average."""
    steps = range(max(1, len(run.dataset.train) // run.cell.batch))
    lengths = [run.batch(step).inputs["input_ids"].shape[1] for step in steps]
    mean = statistics.fmean(lengths)
    return sorted(steps, key=lambda step: abs(lengths[step] - mean))[:count]


def _one_each(cells: Sequence[Cell]) -> list[Cell]:
    """Of every arm and batch size one: rates, schedules and seeds take no time."""
    return list({(cell.arm, cell.batch): cell for cell in reversed(cells)}.values())[::-1]


def _shortened(cell: Cell) -> Cell:
    return replace(cell, options={**cell.options, "window": WINDOW}) if "window" in cell.options else cell


def main(given: Sequence[str]) -> int:
    parser = options.parser("benchmarks.convergence speed", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="of the results")
    add("--config", type=Path, metavar="FILE", default=DEFAULT, help="default: study.toml of this command")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    add("--turns", type=int, default=4 * WINDOW + 1, metavar="N", help="steps of each arm; default: %(default)s")
    args = parser.parse_args(given)
    if args.turns < 2:
        parser.error(f"--turns: got {args.turns}; accepted: 2 or more, as the first does not count")
    device = torch.device(args.device)
    try:
        study = load(args.config)
        store = Store(args.folder)
        store.begin(study)
        rows = measure(study, device, args.turns, lambda them: track(them, "turns", console=console()))
    except (Refused, UserError) as error:
        parser.error(str(error))
    store.write_speed({"facts": machine.facts(device), "rows": rows})
    table(rows).print()
    return 0


def table(rows: Sequence[Row]) -> Table:
    """What `measure` found: a line for each arm and batch size, with its ordinary steps and those that refresh."""
    if any("least" not in row for row in rows):
        raise Refused(f"{SPEED}: was measured otherwise; accepted: what `benchmarks.convergence speed` writes now")
    found: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["forwards"]):
        found.setdefault((row["arm"], row["batch"]), []).append(row)
    lines = [
        [arm, str(batch), *(text for own in same for text in (str(own["forwards"]), _seconds(own)))]
        + [""] * (4 - 2 * len(same))
        for (arm, batch), same in sorted(found.items())
    ]
    columns = ["arm", "batch", "example-forwards of a step", "seconds", "of one that refreshes", "its seconds"]
    return Table(columns, lines, "seconds of a step: median (least to most)")


def _seconds(row: Row) -> str:
    text = f"{row['seconds']:.3f}"
    return f"{text} ({row['least']:.3f} to {row['most']:.3f})" if row["turns"] > 1 else text
