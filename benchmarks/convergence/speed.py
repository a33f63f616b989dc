"""Seconds of a step of every arm, taken in turns on one machine.

    python -m benchmarks.convergence speed DIR [--config FILE] [--device cuda] [--turns 9]

Cells take hours, in which a machine does not keep its speed; so their seconds would say as much of the hour as of the
method. Here all arms make a step in turn, again and again: what they share a slow minute with is each other. Written to
DIR/speed.json: the median for each number of example-forwards that a step has, as steps with a refresh have more. The
report makes seconds of them, step by step. Windows are shortened, to see several refreshes; the first step of each arm
does not count. Run it on an idle machine.
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
from benchmarks.convergence.store import Store
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
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for turn in shown(range(turns)):
        for run in runs:
            done = run.forwards
            begin = time.perf_counter()
            run.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                key = run.cell.arm, run.cell.batch, run.forwards - done
                seconds.setdefault(key, []).append(time.perf_counter() - begin)
    return [
        {"arm": arm, "batch": batch, "forwards": forwards, "seconds": statistics.median(own), "turns": len(own)}
        for (arm, batch, forwards), own in seconds.items()
    ]


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
    add("--turns", type=int, default=2 * WINDOW + 1, metavar="N", help="steps of each arm; default: %(default)s")
    args = parser.parse_args(given)
    if args.turns < 2:
        parser.error(f"--turns: got {args.turns}; accepted: 2 or more, as the first does not count")
    device = torch.device(args.device)
    try:
        study = load(args.config, device.type)
        store = Store(args.folder)
        store.begin(study)
        rows = measure(study, device, args.turns, lambda them: track(them, "turns", console=console()))
    except (Refused, UserError) as error:
        parser.error(str(error))
    store.write_speed({"facts": machine.facts(device), "rows": rows})
    table(rows).print()
    return 0


def table(rows: Sequence[Row]) -> Table:
    """What `measure` found."""
    lines = [[*(str(row[name]) for name in ("arm", "batch", "forwards")), f"{row['seconds']:.3f}"] for row in rows]
    return Table(["arm", "batch", "example-forwards of a step", "seconds"], lines, "seconds of a step, with refreshes")
