"""Who takes the steps: each method, mode and rank of ours, MeZO as published and compiled, and plain forwards."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.optimizers import mode_options, timed_step
from benchmarks.step import memory
from benchmarks.step.mezo import CompiledMeZO, Forwards
from benchmarks.step.models import Workload, loss_of
from pgap_kernels.finetune.baseline import BaselineMeZO
from pgap_kernels.optim import PGAP, MeZO

METHODS = ("mezo", "pgap")
MODES = {"mezo": ("inplace", "two_pass", "scratch"), "pgap": ("inplace", "scratch", "folded", "folded, window")}
OTHERS = {"published": BaselineMeZO, "torch.compile": CompiledMeZO}
LR, EPS = 1e-6, 1e-3


class Spec(NamedTuple):
    """Names of a contender."""

    provider: str
    method: str | None = None
    mode: str | None = None
    rank: int | None = None

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part is not None)


def specs(methods: Sequence[str], modes: Sequence[str], providers: Sequence[str], ranks: Sequence[int]) -> list[Spec]:
    """Those that were asked for, after the forwards that they are compared with."""
    found = [Spec("forwards")]
    for method in methods:
        if method == "mezo":
            found += [Spec(provider, method) for provider in OTHERS if provider in providers]
        if "ours" in providers:
            at: Sequence[int | None] = ranks if method == "pgap" else [None]
            asked = [mode for mode in MODES[method] if mode.split(",")[0] in modes]
            found += [Spec("ours", method, mode, rank) for rank in at for mode in asked]
    return found


class Sampled:
    """A closure that runs its first ``real`` forwards and makes up the losses of the others, to time few of many."""

    def __init__(self, closure: Callable[[], Tensor], real: int) -> None:
        self.closure, self.real = closure, real
        self.calls = 0
        self.loss = torch.ones(())
        self.seconds: list[float] = []

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls > self.real:
            return self.loss * (1 + 1e-3 * self.calls)  # differences of losses that are not zero
        begin = time.perf_counter()
        self.loss = self.closure()
        self.seconds.append(time.perf_counter() - begin)
        return self.loss


class InTurns:
    """Takes timed steps in turns with others; ``seconds`` has those of each step.

    Subclasses have a ``spec`` with a mode, an ``optimizer``, and the ``closure`` of a step's batch.
    """

    spec: Any
    optimizer: Any
    seconds: list[dict[str, float]]
    closure: Callable[..., Callable[[], Tensor]]

    def block(self, steps: Iterable[int]) -> None:
        """Take timed steps."""
        if self.spec.mode == "two_pass":
            self._take(Sampled(self.closure(0), real=0))  # enters the schedule: such a step has three passes
        for step in steps:
            self.seconds.append(self._take(self.closure(step)))
        self.rest()

    def rest(self) -> None:
        """Leave clean weights to the others."""
        if self.spec.mode == "two_pass":
            self.optimizer.merge()

    def _take(self, closure: Callable[[], Tensor]) -> dict[str, float]:
        return timed_step(self.optimizer, closure)


class Contender(InTurns):
    """A way to take steps on a workload, and what they cost.

    All contenders of a workload share its weights, and leave them as they found them, but for rounding and the small
    updates of their steps. Peaks of memory count what a contender keeps between its steps too.
    """

    def __init__(self, spec: Spec, workload: Workload, tokens: int, window: int = 100, probes: int = 10) -> None:
        self.spec, self.workload, self.tokens = spec, workload, tokens
        self.window, self.probes = window, probes
        self.model = workload.fork()
        self.loss = loss_of(self.model)
        self.optimizer: Any = None
        self.seconds: list[dict[str, float]] = []
        self.refresh: float | None = None
        self.peaks: dict[str, float | None] = {}

    # ---- before the turns -------------------------------------------------------------------------------------------

    def prepare(self, refresh_forwards: int) -> None:
        """Make the optimizer, measure its memory over one forward of a refresh and one of a step, time a refresh."""
        if self.spec.provider == "torch.compile":
            self._make()  # compiling takes memory, and is not part of a step
        base = memory.resident()
        count = memory.TensorBytes(self.model.parameters())
        weights = count.alive
        # Compiled code does not run under the counting mode.
        counting = contextlib.nullcontext() if self.spec.provider == "torch.compile" else count
        with counting:
            self._make()
            self.optimizer.probes = 1  # enough for a peak; only P-GAP's refresh has more
            for part in ("refresh_", "") if self.spec.method == "pgap" else ("",):
                memory.reset_peak()
                count.peak = count.alive
                self._take(Sampled(self.closure(0), real=1))
                peak = memory.peak_resident()
                self.peaks[f"{part}peak_memory"] = None if peak is None or base is None else (peak - base) / 1e6
                tensors = None if self.spec.provider == "torch.compile" else (count.peak - weights) / 1e6
                self.peaks[f"{part}peak_tensors"] = tensors
        if self.spec.method == "pgap":
            self.refresh = self._refresh(refresh_forwards)
        self.rest()

    def _make(self) -> None:
        self.optimizer = make(self.spec, self.model, self.window, self.probes)

    def _refresh(self, forwards: int) -> float:
        """Seconds of a refresh; forwards beyond so many count as the mean of those, with what hooks do in them."""
        closure = Sampled(self.closure(0), forwards)
        self.optimizer.window, self.optimizer.probes = 1, self.probes
        seconds = self._take(closure)["refresh"]
        self.optimizer.window = self.window
        return seconds + (2 * self.probes - len(closure.seconds)) * statistics.mean(closure.seconds)

    def closure(self, step: int) -> Callable[[], Tensor]:
        """The loss of a step's batch."""
        batch = self.workload.batch(self.tokens, step)
        return lambda: self.loss(batch)

    # ---- what it cost -----------------------------------------------------------------------------------------------

    def row(self, floor: float) -> dict:
        """Medians over its steps; ``floor`` is what two plain forwards take."""
        parts = {part: statistics.median(s[part] for s in self.seconds) for part in ("forward", "perturb", "total")}
        total, share = parts["total"], None
        if self.refresh is not None:
            share = self.refresh / (self.window * total)
        return {
            **self.spec._asdict(),
            **parts,
            "refresh": self.refresh,
            "ratio": total / floor,
            "ratio_own": total / parts["forward"],
            "refresh_share": share,
            "peak_memory": None,
            "refresh_peak_memory": None,
            "refresh_peak_tensors": None,
            **self.peaks,
            "window": self.window if self.spec.method == "pgap" else None,
            "probes": self.probes if self.spec.method == "pgap" else None,
            "seconds_of_steps": self.seconds,
        }


def make(spec: Spec, model: torch.nn.Module, window: int, probes: int) -> Any:
    """What takes the steps of a contender."""
    if spec.provider == "forwards":
        return Forwards()
    if spec.provider in OTHERS:
        return OTHERS[spec.provider](model, lr=LR, eps=EPS, seed=0)
    # Forwards whose loss is made up use no weight.
    options: dict[str, Any] = {"lr": LR, "eps": EPS, "allow_unused": True, **mode_options(spec.mode)}
    if spec.method == "mezo":
        return MeZO(model, **options)
    return PGAP(model, rank=spec.rank, window=window, probes=probes, **options)
