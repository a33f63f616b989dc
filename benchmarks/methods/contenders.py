"""Who takes the steps: every method in each of its modes, and its published logic in plain PyTorch."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import batches
from benchmarks.harness.optimizers import PARTS, mode_options
from benchmarks.methods.published import PUBLISHED
from benchmarks.step import memory, models
from benchmarks.step.contenders import EPS, LR, InTurns, Sampled
from benchmarks.step.models import LABEL_TOKENS, Workload
from pgap_kernels.finetune.scoring import Scorer
from pgap_kernels.optim import LowRankOptimizer, available_methods, make_optimizer, method_options
from pgap_kernels.optim.cost import over_a_period
from pgap_kernels.optim.registry import method_class

# What differs from a method's defaults, for both sides. DiZO's are a tenth of its own, so that a few steps show both of
# its kinds in the usual ratio.
OPTIONS: dict[str, dict[str, Any]] = {
    "dizo": {"kappa": 5, "iterations": 1},
    "pgap": {"rank": 64, "window": 100, "probes": 10, "delta": 2.0},
    # As often as P-GAP, so that a refresh can be waited for.
    **{name: {"window": 100} for name in ("pizo-subzero", "subzero", "svd-0")},
}
# Forwards of a step that can be slices of one.
MEMBERS = {"eggroll": 8, "lozo": 2, "pgap": 2}


class Spec(NamedTuple):
    """Names of a contender."""

    method: str
    provider: str = "ours"
    mode: str | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.provider, self.mode)))


def methods() -> list[str]:
    """Those of this package and of others, and those that only have published logic here."""
    return list(dict.fromkeys([*available_methods(), *PUBLISHED]))


def specs(method: str, providers: Sequence[str]) -> list[Spec]:
    """The contenders of a method."""
    found = [Spec(method, "published")] if method in PUBLISHED and "published" in providers else []
    if method in available_methods() and "ours" in providers:
        found += [Spec(method, "ours", mode) for mode in _modes(method)]
    return found


def _modes(method: str) -> list[str]:
    cls = method_class(method)
    modes = ["inplace", *["two_pass"] * cls.plans_ahead, "scratch"]
    if issubclass(cls, LowRankOptimizer):
        modes.append("folded")
        if "window" in method_options(method):  # else factors are new in every step, and nothing gathers
            modes.append("folded, window")
        if method in MEMBERS:
            modes.append("folded, members")
    return modes


def make(spec: Spec, model: Any) -> Any:
    """What takes the steps of a contender."""
    options: dict[str, Any] = {"lr": LR, "eps": EPS, "seed": 0, **OPTIONS.get(spec.method, {})}
    if spec.provider == "published":
        sampled = {"full_refresh": False} if spec.method == "pgap" else {}
        return PUBLISHED[spec.method](model, **options, **sampled)
    if "batch_size" in method_options(spec.method):
        options["batch_size"] = models.BATCH
    if spec.mode == "folded, members":
        options |= {"mode": "folded", "members": MEMBERS[spec.method]}
    else:
        options |= mode_options(spec.mode or "auto")
    # Forwards whose loss is made up use no weight.
    return make_optimizer(spec.method, model, allow_unused=True, **options)


class Contender(InTurns):
    """A method on a workload, and what its steps cost.

    Contenders share the workload's weights, and leave them as they found them but for rounding and small updates.
    """

    def __init__(self, spec: Spec, workload: Workload, tokens: int) -> None:
        self.spec, self.workload, self.tokens = spec, workload, tokens
        self.copies = MEMBERS[spec.method] if spec.mode == "folded, members" else 1
        self.model = workload.fork()
        self.scorer = Scorer(self.model, LABEL_TOKENS, pad_token=0)
        self.optimizer: Any = None
        self.seconds: list[dict[str, float]] = []
        self.refresh = 0.0
        self.memory: dict[str, float | None] = {}

    # ---- before the turns -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the optimizer, measure its memory, and time a refresh."""
        base = memory.resident()
        with memory.TensorBytes(self.model.parameters()) as count:
            weights = count.alive
            with torch.no_grad():
                self.closure(0)()
            plain = count.peak - weights
            memory.reset_peak()
            self.optimizer = make(self.spec, self.model)
            count.peak = count.alive
            with self._one_probe():
                for step in range(2):  # the first makes state, refreshes, and tries out slices in three forwards
                    self._take(Sampled(self.closure(step), real=5))
            self.memory = {
                "kept": (count.alive - weights) / 1e6,
                "beyond_forward": (count.peak - weights - plain) / 1e6,
            }
        peak = memory.peak_resident()
        self.memory["process"] = None if peak is None or base is None else (peak - base) / 1e6
        self.refresh = self._refresh()
        self.rest()

    @contextlib.contextmanager
    def _one_probe(self) -> Iterator[None]:
        """One probe of a refresh is enough for a peak of memory."""
        probes = getattr(self.optimizer, "probes", None) if hasattr(self.optimizer, "window") else None
        if probes is not None:
            self.optimizer.probes = 1
        yield
        if probes is not None:
            self.optimizer.probes = probes

    def _refresh(self) -> float:
        """Seconds of a refresh; forwards beyond two count as the mean of those."""
        optimizer = self.optimizer
        if getattr(optimizer, "window", 1) == 1:
            return 0.0
        window, closure = optimizer.window, Sampled(self.closure(0), real=2)
        optimizer.window = 1
        seconds = self._take(closure)["refresh"]
        optimizer.window = window
        if hasattr(optimizer, "refresh_seconds"):  # of published P-GAP, extrapolated from a sample
            return optimizer.refresh_seconds
        made_up = 2 * getattr(optimizer, "probes", 0) - 2 * self.copies
        return seconds + max(0, made_up) / self.copies * statistics.mean(closure.seconds)

    def closure(self, step: int, tokens: int | None = None) -> Callable[[], Tensor]:
        """The losses of a step's batch."""
        batch = batches.stacked(self.workload.batch(tokens or self.tokens, step), self.copies)
        return lambda: batches.loss(self.scorer, batch, self.copies)

    # ---- what it cost -----------------------------------------------------------------------------------------------

    def row(self) -> dict:
        """Means over its steps, refreshes spread over their window; what it declares, and what was counted."""
        window = getattr(self.optimizer, "window", 1)
        mean = {part: statistics.fmean(s[part] for s in self.seconds) for part in (*PARTS, "total")}
        refresh = self.refresh / window if window > 1 else mean["refresh"]
        ordinary = mean["total"] - mean["refresh"]
        return {
            **self.spec._asdict(),
            "total": ordinary + refresh,
            "forward": mean["forward"],
            "outside": ordinary - mean["forward"],
            "refresh": refresh,
            **self._declared(),
            **self._counted(),
            **self.memory,
            "window": window,
            "seconds_of_steps": self.seconds,
        }

    def _declared(self) -> dict[str, float | None]:
        if self.spec.provider == "published":
            return dict.fromkeys(f"{name}_declared" for name in ("forwards", "passes", "state", "scratch"))
        cost = self.optimizer.cost()
        return {
            "forwards_declared": cost.forwards,
            "passes_declared": cost.weight_passes,
            "state_declared": cost.state_bytes / 1e6,
            "scratch_declared": cost.scratch_bytes / 1e6,
        }

    def _counted(self) -> dict[str, float | None]:
        """Forwards and passes of a step over one period. They do not depend on the batch: one token will do."""
        if self.spec.provider == "published":
            return {"forwards": None, "passes": None}
        optimizer, period = self.optimizer, self.optimizer.period
        closure = Sampled(self.closure(0, tokens=1), real=sys.maxsize)

        def count(steps: int) -> list[float]:
            calls, passes = closure.calls, optimizer.passes
            for _ in range(steps):
                self._take(closure)
            return [closure.calls - calls, optimizer.passes - passes]

        found = over_a_period(optimizer, count)
        self.rest()
        return dict(zip(("forwards", "passes"), (value / period for value in found), strict=True))

    def release(self) -> None:
        """Take the hooks off; the weights are the model."""
        if hasattr(self.optimizer, "detach"):
            self.optimizer.detach()
