"""Where the host spends a call."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable


def profile(call: Callable[[], object], count: int = 1) -> str:
    """The functions that take longest over so many calls, as text."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(count):
        call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(30)
    return text.getvalue()
