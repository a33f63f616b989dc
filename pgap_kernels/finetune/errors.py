"""What the user can put right."""

from __future__ import annotations

import errno

import torch


class UserError(Exception):
    """Something the user can put right; the message is one line that says what and how."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, is what was lacking."""
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "can't allocate memory" in str(error)
    )
