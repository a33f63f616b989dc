"""Seconds of a call on a device, and what the device is."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
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


def medians(calls: Sequence[Call], timer: Timer, repeats: int, warmups: int = 1) -> list[Seconds]:
    """Median of each call; they take turns, so that a slow moment hits all of them."""
    times: list[list[Seconds]] = [[] for _ in calls]
    for turn in range(warmups + repeats):
        for own, call in zip(times, calls, strict=True):
            seconds = timer(call)
            if turn >= warmups:
                own.append(seconds)
    return [Seconds(*map(statistics.median, zip(*own, strict=True))) for own in times]


def facts(device: torch.device) -> dict[str, str | None]:
    """What a GPU figure depends on beside the code."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "architecture": properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}",
        "driver": _driver(),
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}",
        "torch": torch.__version__,
        "triton": _triton(),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver, or None where its tool does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer[0] if answer else None


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # ROCm's is distributed under another name
        import triton

        return triton.__version__
