"""Warnings that point at the caller's own line, not at one of the libraries that called us."""

from __future__ import annotations

import functools
import sys
import warnings

# What may stand between a script and an optimizer's step.
_BETWEEN = {
    "accelerate",
    "contextlib",
    "lightning",
    "lightning_fabric",
    "peft",
    "pgap_kernels",
    "pytorch_lightning",
    "torch",
    "transformers",
    "trl",
}


def warn(message: str) -> None:
    """Warn, at the innermost line that is of none of these packages."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time that it is this message."""
    warn(message)
