"""Where the time of steps goes: forward, perturb, refresh, and the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..optim import NonFiniteLossError
from .errors import is_out_of_memory

PARTS = ("forward", "perturb", "refresh", "rest")


@dataclass
class StepClock:
    """Accumulated wall seconds of completed steps.

    Attributes:
        window: steps that one refresh serves.
        steps: completed steps.
        seconds: seconds by part since the first step.
    """

    window: int = 1
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, parts: dict[str, float]) -> None:
        """Count a step with the seconds of its parts."""
        self.steps += 1
        self.seconds = {part: self.seconds[part] + parts[part] for part in PARTS}

    def as_dict(self, refresh_seconds: float | None = None) -> dict[str, Any]:
        """Steps, seconds, the window, and seconds per step with their share of one refresh per window.

        Args:
            refresh_seconds: of one refresh; measured by default.
        """
        if refresh_seconds is None:
            refresh_seconds = self.seconds["refresh"] / max(1, math.ceil(self.steps / self.window))
        per_step = {}
        if self.steps:
            per_step = {part: self.seconds[part] / self.steps for part in PARTS}
            per_step["refresh"] = refresh_seconds / self.window
            per_step["total"] = sum(per_step.values())
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "refresh_seconds": refresh_seconds,
            "window": self.window,
            "seconds_per_step": per_step,
        }


def split(elapsed: float, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """A step's seconds by part, from an optimizer's own counters before and after it."""
    parts = {part: after.get(part, 0.0) - before.get(part, 0.0) for part in PARTS[:-1]}
    return parts | {"rest": max(0.0, elapsed - sum(parts.values()))}


def timed_step(
    optimizer: Any,
    closure: Callable[[], Tensor],
    otherwise: Callable[[Exception, Callable[[], Tensor]], float] | None = None,
) -> tuple[float, dict[str, float]]:
    """A step's loss and its seconds by part; ``otherwise`` is asked for the loss where hooks may refuse the model."""
    start, before = time.perf_counter(), dict(optimizer.seconds)
    try:
        loss = optimizer.step(closure)
    except (RuntimeError, ValueError) as error:
        if otherwise is None or isinstance(error, NonFiniteLossError) or is_out_of_memory(error):
            raise
        return otherwise(error, closure), dict.fromkeys(("forward", "perturb", "refresh"), 0.0) | {
            "rest": time.perf_counter() - start
        }
    return loss, split(time.perf_counter() - start, before, optimizer.seconds)
