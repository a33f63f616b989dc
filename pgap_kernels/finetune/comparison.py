"""The method in plain PyTorch beside a run, on the same batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .baseline import BASELINES
from .machine import peak_memory_mib, reset_peak_memory
from .timing import StepClock, timed_step

if TYPE_CHECKING:
    from .job import Job


class Baseline:
    """The method in plain PyTorch on a model of its own, from the weights that the run began with."""

    def __init__(self, job: Job) -> None:
        config = job.config
        make = BASELINES[config.method]
        known = inspect.signature(make).parameters
        options = {name: value for name, value in config.options.items() if name in known}
        if "full_refresh" in known:
            options["full_refresh"] = config.compare_full_refresh
        self.estimated = not options.get("full_refresh", True)
        job.shown.doing("loading the model again, for the method in plain PyTorch")
        reset_peak_memory(job.device)
        self._memory = lambda: peak_memory_mib(job.device)
        model = job.load_model()[0]
        self.scorer = job.scorer_for(model)
        self.scorer.padding = job.scorer.padding
        self.method: Any = make(model, **options, seed=config.seeds[0])
        self.clock = StepClock(getattr(self.method, "window", 1))
        self.losses: list[float] = []

    def step(self, closure: Callable[[], Tensor]) -> None:
        loss, parts = timed_step(self.method, closure)
        self.clock.add(parts)
        self.losses.append(loss)

    def as_dict(self) -> dict[str, Any]:
        found = {
            "losses": self.losses,
            "timing": self.clock.as_dict(getattr(self.method, "refresh_seconds", 0.0)),
            "peak_memory_mib": self._memory(),
        }
        return found | ({"refresh_estimated": True} if self.estimated else {})

    @property
    def notes(self) -> list[str]:
        if not self.estimated:
            return []
        return [
            "the refresh of the baseline is estimated from one probe and one SVD per distinct shape, each times its "
            "count; its losses are therefore not those of P-GAP"
        ]
