"""One timed step of an optimizer in a mode."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

PARTS = ("forward", "perturb", "refresh")
# A mode and an option that goes with it, under a name of their own.
_OPTIONS: dict[str, dict[str, Any]] = {
    "two_pass": {"mode": "inplace", "two_pass": True},
    "folded, window": {"mode": "folded", "merge": "window"},
}


class Optimizer(Protocol):
    """What is timed: ``pgap_kernels.optim``, ``pgap_kernels.finetune.baseline`` and what looks like them."""

    seconds: dict[str, float]

    def step(self, closure: Callable[[], Any]) -> Any: ...


def mode_options(name: str) -> dict[str, Any]:
    """The options of an optimizer in a mode of that name."""
    return _OPTIONS.get(name, {"mode": name})


def timed_step(optimizer: Optimizer, closure: Callable[[], Any]) -> dict[str, float]:
    """Take one step; its seconds by part and in ``total``."""
    before, begin = dict(optimizer.seconds), time.perf_counter()
    optimizer.step(closure)
    total = time.perf_counter() - begin
    return {**{part: optimizer.seconds[part] - before[part] for part in PARTS}, "total": total}
