"""Passes that were not made because a scalar on the device was not finite."""

from __future__ import annotations

import sys

import torch


def raise_if_skipped(device: torch.device | str | None = None) -> None:
    """Report passes that were skipped on a device. Call it where the host waits for the device anyway.

    Scalars on the host are checked when they are passed. One on a GPU is seen by the kernels only: if it is NaN or
    infinite, the whole pass writes nothing and sets a flag, which this reads (a small copy, which waits) and clears.

    Args:
        device: the one to look at; None for all that were used.

    Raises:
        FloatingPointError: a pass was skipped since the last call.
    """
    guard = sys.modules.get("pgap_kernels.triton.guard")  # if it was never imported, nothing was launched
    skipped = guard.take_skipped(None if device is None else torch.device(device)) if guard else []
    if skipped:
        names = ", ".join(map(str, skipped))
        raise FloatingPointError(
            f"a pass on {names} wrote nothing: a coefficient, decay or other scalar on the device was NaN or infinite; "
            "look at the losses they come from"
        )
