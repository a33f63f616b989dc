"""Seconds of a call on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
_FLUSH_BYTES = 1 << 29  # beyond any last-level cache


class Seconds(NamedTuple):
    """Of one call: until its work is done, and until it returns."""

    done: float
    returned: float


Timer = Callable[[Call], Seconds]


def on_host(call: Call) -> Seconds:
    """The CPU has done the work when the call returns."""
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return Seconds(seconds, seconds)


def on_gpu(device: torch.device) -> Timer:
    """A timer by events on the device, with cold caches.

    Filling a buffer several times empties the L2 cache and keeps the device busy while the host prepares the call, so
    that short calls are not timed by their launch.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def timed(call: Call) -> Seconds:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            for _ in range(4):
                flush.zero_()
            begin.record()
            start = time.perf_counter()
            call()
            returned = time.perf_counter() - start
            end.record()
            end.synchronize()
        return Seconds(begin.elapsed_time(end) / 1e3, returned)

    return timed


def medians(
    calls: Sequence[Call],
    timer: Timer,
    repeats: int | Sequence[int],
    warmups: int = 1,
    before: Sequence[Call | None] | None = None,
) -> list[Seconds]:
    """Median of each call; they take turns, so that a slow moment hits all of them.

    Args:
        repeats: turns of all calls, or of each; then a call with a single turn, which is a long one, is not warmed up.
        before: what to do untimed before each call's turn.
    """
    if isinstance(repeats, int):
        turns = [(warmups, repeats)] * len(calls)
    else:
        turns = [(warmups if count > 1 else 0, count) for count in repeats]
    preparations = before or [None] * len(calls)
    times: list[list[Seconds]] = [[] for _ in calls]
    for turn in range(-warmups, max(count for _, count in turns)):
        for own, call, prepare, (warm, count) in zip(times, calls, preparations, turns, strict=True):
            if not -warm <= turn < count:
                continue
            if prepare:
                prepare()
            seconds = timer(call)
            if turn >= 0:
                own.append(seconds)
    return [Seconds(*map(statistics.median, zip(*own, strict=True))) for own in times]
