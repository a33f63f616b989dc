"""Seconds of a call on a device, and turns: contenders alternate, so that a slow moment of the machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
_FLUSH_BYTES = 1 << 29  # larger than any last-level cache
_FLUSHES = 12  # more than a millisecond, in which the host prepares the call


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
    that the launch of a short call is not timed with it.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def timed(call: Call) -> Seconds:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            for _ in range(_FLUSHES):
                flush.zero_()
            begin.record()
            start = time.perf_counter()
            call()
            returned = time.perf_counter() - start
            end.record()
            end.synchronize()
        return Seconds(begin.elapsed_time(end) / 1e3, returned)

    return timed


def turns(counts: Sequence[int], block: int = 1) -> Iterator[tuple[int, range]]:
    """Whose turn it is, and which of its ``counts`` repeats are due; each round starts with the next contender.

    Args:
        block: how many repeats make a turn.
    """
    for number, first in enumerate(range(0, max(counts, default=0), block)):
        for place in range(len(counts)):
            i = (number + place) % len(counts)
            if first < counts[i]:
                yield i, range(first, min(first + block, counts[i]))


def medians(
    calls: Sequence[Call],
    timer: Timer,
    repeats: int | Sequence[int],
    warmups: int = 1,
    before: Sequence[Call | None] | None = None,
) -> list[Seconds]:
    """Median of each call, timed in turns.

    Args:
        repeats: timed turns of all calls, or of each. A call with only one is a long one, and is not warmed up.
        before: what to do, untimed, before each turn of a call.
    """
    counts = [repeats] * len(calls) if isinstance(repeats, int) else list(repeats)
    warm = [warmups if isinstance(repeats, int) or count > 1 else 0 for count in counts]
    times: list[list[Seconds]] = [[] for _ in calls]
    for i, (turn,) in turns([w + count for w, count in zip(warm, counts, strict=True)]):
        if before and (prepare := before[i]):
            prepare()
        seconds = timer(calls[i])
        if turn >= warm[i]:
            times[i].append(seconds)
    return [Seconds(*map(statistics.median, zip(*own, strict=True))) for own in times]
