"""Where the seconds of a step go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

PARTS = ("forward", "perturb", "refresh")


class Clock:
    """Accumulated wall seconds by part of a step, as the host sees them."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running = False

    @contextlib.contextmanager
    def timed(self, part: str, perturbing: Callable[[], float]) -> Iterator[None]:
        """Add the seconds of a block to a part; blocks inside another count to the outer one.

        ``perturbing()`` are the seconds so far that hooks spent on perturbing: those inside a forward are not its own.
        """
        if self._running:
            yield
            return
        self._running = True
        begin, before = time.perf_counter(), perturbing()
        try:
            yield
        finally:
            inside = perturbing() - before if part == "forward" else 0.0
            self.seconds[part] += time.perf_counter() - begin - inside
            self.seconds["perturb"] += inside
            self._running = False
