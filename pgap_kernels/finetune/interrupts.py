"""Signals that end a run: Ctrl-C, SIGTERM and SIGHUP, all alike."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

STDERR = 2
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A run was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """While entered, the first signal ends the run by `Interrupted`; further ones are only noted.

    So whoever presses Ctrl-C twice interrupts neither the restoration of the weights nor the report. In other threads
    than the main one nothing is changed, as only that gets signals.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._pending: int | None = None
        self._deferring = self._ending = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Ignored ones stay so: nohup does that, and shells for jobs in the background.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal takes effect where the run calls `check`: in its forwards, never between two lines of
        its bookkeeping."""
        self._deferring = True

    def check(self) -> None:
        """Raise `Interrupted` if there was a signal."""
        if self._pending is not None and not self._ending:
            self._ending = True
            raise Interrupted(self._pending)

    def end(self) -> None:
        """From now on the run is ending by itself."""
        self._ending = True

    def again(self) -> None:
        """Another run begins; a signal that came while the last one was ending ends it now."""
        self._deferring = self._ending = False
        self.check()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._ending or self._pending is not None:
            # Not by print: it may have been interrupted itself, and the terminal may be what is gone.
            with contextlib.suppress(OSError):
                os.write(STDERR, b"already ending; the report is still to be written\n")
        self._pending = self._pending or number  # for `again`, if this run is ending by itself
        if not self._deferring:
            self.check()
