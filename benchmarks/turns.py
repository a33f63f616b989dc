"""Contenders by mode, and their turns in blocks of steps, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

PARTS = ("forward", "perturb", "refresh")
# Modes with an option have names of their own.
_OPTIONS: dict[str, dict[str, Any]] = {
    "two_pass": {"mode": "inplace", "two_pass": True},
    "folded, window": {"mode": "folded", "merge": "window"},
}
T = TypeVar("T")


class Optimizer(Protocol):
    """What is timed: ``pgap_kernels.optim``, ``pgap_kernels.finetune.baseline`` and what looks like them."""

    seconds: dict[str, float]

    def step(self, closure: Callable[[], Any]) -> Any: ...


def mode_options(name: str) -> dict[str, Any]:
    """The options of an optimizer in a mode of that name."""
    return _OPTIONS.get(name, {"mode": name})


def blocks(contenders: Sequence[T], steps: int, size: int) -> Iterator[tuple[T, range]]:
    """Whose turn it is, and with which steps; each round begins with the next contender."""
    for number, first in enumerate(range(0, steps, size)):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            yield contender, range(first, min(first + size, steps))


def timed_step(optimizer: Optimizer, closure: Callable[[], Any]) -> dict[str, float]:
    """Take one step; its seconds by part and in ``total``."""
    before, begin = dict(optimizer.seconds), time.perf_counter()
    optimizer.step(closure)
    total = time.perf_counter() - begin
    return {**{part: optimizer.seconds[part] - before[part] for part in PARTS}, "total": total}
