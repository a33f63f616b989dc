"""How many example-forwards and seconds methods need to reach a loss, each with its best learning rate and schedule.

    python -m benchmarks.convergence --json DIR [--config FILE] [--device cuda] [--max-minutes 60]
    python -m benchmarks.convergence speed DIR [--config FILE] [--device cuda]
    python -m benchmarks.convergence report DIR [--markdown FILE] [--figure FILE]

Study     benchmarks/convergence/study.toml says which arms there are (methods x learning rates x schedules x batch
          sizes x seeds), what they learn, the budget and the targets. SmolLM2-135M learns which movie snippets are
          positive; model and data are fetched the first time.
Cells     each is a file in DIR. A finished one is not run again, a stopped one goes on where it was: after
          --max-minutes, or Ctrl-C. The likeliest settings come first, with every seed; the others with one at first.
Budget    a cell ends when its example-forwards are used up. All forwards of its steps count, refreshes included;
          evaluations do not, nor do the three forwards that try out, once, whether a model keeps the slices of a batch
          apart. Cells may run beside other work, several at a time, and on different machines.
Seconds   are measured apart, by `speed`, which takes a step of each arm in turn on one idle machine; with them the
          report compares arms at equal seconds, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from benchmarks.convergence import report, speed
from benchmarks.convergence.parallel import records
from benchmarks.convergence.run import past, run_cell
from benchmarks.convergence.store import Store
from benchmarks.convergence.study import DEFAULT, Cell, Refused, Study, load
from benchmarks.harness import options
from benchmarks.harness.tables import console
from pgap_kernels.finetune import UserError


def run(study: Study, store: Store, device: torch.device, minutes: float | None, parallel: int = 1) -> bool:
    """Run the cells that are not finished; whether all are now."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    left = [cell for cell in study.cells if not store.finished(cell)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task("", total=len(left))
        if parallel == 1:
            found = _in_turn(left, study, store, device, deadline, bar, task)
        else:
            bar.update(task, description=f"{parallel} at a time")
            found = records(left, study, store, device, deadline, parallel)
        finished = 0
        for record in found:
            if record is not None and record["status"] != "stopped":
                finished += 1
                bar.update(task, completed=finished)
                bar.console.print(_said(record, study), highlight=False)
    return finished == len(left)


def _in_turn(
    left: Sequence[Cell],
    study: Study,
    store: Store,
    device: torch.device,
    deadline: float | None,
    bar: Progress,
    task: TaskID,
) -> Iterator[dict[str, Any]]:
    for done, cell in enumerate(left):
        bar.update(task, description=cell.name)
        if past(deadline):
            return
        progress = partial(_note_progress, bar, task, done)
        record = run_cell(cell, study, store, device, progress, partial(past, deadline))
        yield record
        if record["status"] == "stopped":
            return


def _note_progress(bar: Progress, task: TaskID, done: int, share: float) -> None:
    bar.update(task, completed=done + share)


def _said(record: dict[str, Any], study: Study) -> str:
    name = Cell(**record["cell"]).name
    return f"{name}: {record['status']}, {study.part} loss {record['checkpoints'][-1]['loss']:.4f}"


def arguments(given: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for refusals to come, and the command line."""
    parser = options.parser("benchmarks.convergence", __doc__)
    add = parser.add_argument
    add(
        "--json",
        type=Path,
        metavar="DIR",
        default=Path("runs/convergence"),
        help="of the results; default: %(default)s",
    )
    add("--config", type=Path, metavar="FILE", default=DEFAULT, help="default: study.toml of this command")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    add("--only", nargs="+", metavar="ARM", help="default: all")
    add(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="cells at a time, each in a process of its own",
    )
    add("--max-minutes", type=float, help="stop after so many; the same command goes on later")
    add("--list", action="store_true", help="print the cells in their order, and run none")
    args = parser.parse_args(given)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device: got {args.device!r}, but PyTorch finds no such device here; accepted here: cpu")
    if args.parallel < 1:
        parser.error(f"--parallel: got {args.parallel}; accepted: 1 or more")
    return parser, args


def main(given: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else list(given)
    if given[:1] in (["report"], ["speed"]):
        return {"report": report, "speed": speed}[given[0]].main(given[1:])
    parser, args = arguments(given)
    device = torch.device(args.device)
    try:
        study = load(args.config, args.only)
        if args.list:
            print("\n".join(cell.name for cell in study.cells))
            return 0
        store = Store(args.json)
        store.begin(study)
        complete = run(study, store, device, args.max_minutes, args.parallel)
    except KeyboardInterrupt:  # of --parallel; in turn, the cell at work has seen to it
        complete = False
    except (Refused, UserError) as error:
        parser.error(str(error))
    left = sum(not store.finished(cell) for cell in study.cells)
    print("all cells are finished" if complete else f"stopped; {left} of {len(study.cells)} cells are left")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
