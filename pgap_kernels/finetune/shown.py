"""What a run shows while it goes on, on stderr: progress bars and notes."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm import tqdm


class Shown:
    """Progress and notes; ``quiet`` shows neither.

    Nobody reads what goes to a terminal that was closed, but its run goes on to its report.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def bar(self, total: int, title: str, unit: str, *, leave: bool = True, done: int = 0) -> Any:
        """A progress bar, with the time that is left."""
        return tqdm(
            total=total, initial=done, desc=title, unit=unit, leave=leave, disable=self.quiet, dynamic_ncols=True
        )

    def note(self, text: str) -> None:
        """Something to know, beside the report."""
        self._say(f"note: {text}")

    def doing(self, text: str) -> None:
        """What is under way."""
        self._say(f"{text} ...")

    def _say(self, line: str) -> None:
        if not self.quiet:
            with contextlib.suppress(OSError):
                tqdm.write(line, file=sys.stderr)
