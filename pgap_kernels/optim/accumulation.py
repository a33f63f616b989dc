"""Notices accelerate's ``accumulate``, under which a closure would see the last batch of several alone."""

from __future__ import annotations

import sys
import traceback


def refuse_accumulation() -> None:
    """Raise RuntimeError if accelerate's wrapper calls this step once for several batches."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return
    batches = state.GradientState().num_steps
    modules = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
    if batches > 1 and "accelerate.optimizer" in modules:
        raise RuntimeError(
            f"closure: got one while accelerate accumulates {batches} batches, of which it would see the last alone; "
            "accepted: gradient_accumulation_steps=1, with a closure that adds up the losses of several batches"
        )
