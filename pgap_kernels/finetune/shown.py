"""What a run shows while it goes on, on stderr: progress bars and notes."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Shown:
    """Progress and notes; ``quiet`` shows neither."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def bar(self, total: int, title: str, unit: str, *, leave: bool = True, done: int = 0) -> Any:
        """A progress bar, with the time that is left."""
        return tqdm(
            total=total, initial=done, desc=title, unit=unit, leave=leave, disable=self.quiet, dynamic_ncols=True
        )

    def note(self, text: str) -> None:
        """Something to know, beside the report."""
        if not self.quiet:
            tqdm.write(f"note: {text}", file=sys.stderr)

    def doing(self, text: str) -> None:
        """What is under way."""
        if not self.quiet:
            tqdm.write(f"{text} ...", file=sys.stderr)
