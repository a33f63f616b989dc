"""Several cells at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.synchronize import Event
from typing import Any

import torch

from benchmarks.convergence.run import past, run_cell
from benchmarks.convergence.store import Store
from benchmarks.convergence.study import Cell, Study

_stop: Event | None = None  # of the process that works on cells: set when it is to stop


def records(
    cells: Sequence[Cell], study: Study, store: Store, device: torch.device, deadline: float | None, count: int
) -> Iterator[dict[str, Any] | None]:
    """The records of cells as they end, ``count`` at a time and begun in their order.

    Args:
        deadline: in ``time.monotonic()``, which all processes share; None for a cell that was not begun by then.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    stop = context.Event()
    given = (max(1, (os.cpu_count() or 1) // count), sys.orig_argv, stop)
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=given) as pool:
        waiting: list[Future] = [pool.submit(_one, cell, study, store, device, deadline) for cell in cells]
        try:
            for ended in as_completed(waiting):
                yield ended.result()
        finally:
            stop.set()  # after Ctrl-C those at work end their step and keep what they have
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int, command: list[str], stop: Event) -> None:
    global _stop
    _stop = stop
    # A terminal sends Ctrl-C to all of its processes. One that waits for work would die of it, upon which the executor
    # kills the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    sys.orig_argv = command  # for the facts in the records


def _one(cell: Cell, study: Study, store: Store, device: torch.device, deadline: float | None) -> dict[str, Any] | None:
    def over() -> bool:
        return past(deadline) or (_stop is not None and _stop.is_set())

    if over():
        return None
    return run_cell(cell, study, store, device, lambda share: None, over)
