"""Whole steps on OPT-1.3B's shapes, in bfloat16, against their forwards, with and without CUDA graphs."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.host import profile
from benchmarks.gpu.part import Part
from benchmarks.harness import batches
from benchmarks.harness.tables import Table, shown
from benchmarks.step.contenders import EPS, LR
from benchmarks.step.mezo import CompiledMeZO
from benchmarks.step.models import LABEL_TOKENS, Workload
from pgap_kernels.finetune.baseline import BaselineMeZO
from pgap_kernels.finetune.scoring import Scorer
from pgap_kernels.optim import CapturedClosure, make_optimizer
from pgap_kernels.optim.captured import capture

MODEL, TOKENS = "opt1.3b", 128
STEPS, SPLIT = 9, 3  # timed as they are; timed with a wait before and after each forward
SECONDS = 6  # that a contender may take, with what it compiles
RANK, WINDOW, PROBES = 64, 100, 10


@dataclass(frozen=True)
class Contender:
    """A method in a mode, and how its forwards run.

    Args:
        method: of ``make_optimizer``, or "published" or "torch.compile" for MeZO of that kind.
        captured: the forwards are captured in a CUDA graph, and those that it is compared with.
        copies: of the minibatch, stacked in one forward.
    """

    title: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    captured: bool = False
    copies: int = 1

    @property
    def slices(self) -> int:
        return self.copies * self.options.get("groups", 1)

    def make(self, model: torch.nn.Module) -> Any:
        others = {"published": BaselineMeZO, "torch.compile": CompiledMeZO}
        if self.method in others:
            return others[self.method](model, lr=LR, eps=EPS, seed=0)
        # A bias that differs from slice to slice takes a linear layer apart: populations leave them out.
        least = 2 if self.slices > 1 else 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.dim() >= least]
        return make_optimizer(self.method, named, model=model, lr=LR, eps=EPS, seed=0, **self.options)


def contenders() -> list[Contender]:
    """First what is most worth knowing: what no visit has measured yet, or not since it changed."""
    pgap = {"rank": RANK, "window": WINDOW, "probes": PROBES}
    window = {**pgap, "mode": "folded", "merge": "window"}
    pairs = {"mode": "folded", "members": 2, "groups": 16}
    return [
        Contender("LOZO 1, 16 groups, captured", "lozo", {**pairs, "rank": 1}, captured=True, copies=2),
        Contender(f"P-GAP {RANK}, 16 groups, captured", "pgap", {**pgap, **pairs}, captured=True, copies=2),
        Contender("MeZO, torch.compile", "torch.compile"),
        Contender(f"P-GAP {RANK}, folded, window, captured", "pgap", window, captured=True),
        Contender("MeZO, in place, captured", "mezo", {"mode": "inplace"}, captured=True),
        Contender("MeZO, in place", "mezo", {"mode": "inplace"}),
        Contender("MeZO, published", "published"),
        Contender("MeZO, scratch, captured", "mezo", {"mode": "scratch"}, captured=True),
        Contender(f"P-GAP {RANK}, folded, window", "pgap", window),
        Contender(f"P-GAP {RANK}, in place", "pgap", {**pgap, "mode": "inplace"}),
        Contender("MeZO, two_pass", "mezo", {"mode": "inplace", "two_pass": True}),
        Contender("MeZO, scratch", "mezo", {"mode": "scratch"}),
        Contender(f"P-GAP {RANK}, folded", "pgap", {**pgap, "mode": "folded"}),
        Contender("LOZO 1, 16 groups", "lozo", {**pairs, "rank": 1}, copies=2),
    ]


class Bench:
    """The model, its batch, and the steps of contenders beside plain forwards of the same rows."""

    def __init__(self, part: Part) -> None:
        self.part, self.on_gpu = part, part.device.type == "cuda"
        begin = time.perf_counter()
        self.workload = Workload("tiny" if part.rehearse else MODEL, torch.bfloat16, part.device)
        self.tokens = 4 if part.rehearse else TOKENS
        tuned = sum(p.numel() for p in self.workload.model.parameters() if p.requires_grad)
        part.write(model=self.workload.name, tuned=tuned, tokens=self.tokens, seconds=time.perf_counter() - begin)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes of tensors at most, beyond those there before."""
        if not self.on_gpu:
            call()
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    @torch.no_grad()
    def measure(self, contender: Contender) -> dict[str, Any]:
        """Medians over steps that alternate with plain forwards."""
        model = self.workload.fork()
        scorer, other = (Scorer(m, LABEL_TOKENS, pad_token=0) for m in (model, self.workload.fork()))
        batch = batches.stacked(self.workload.batch(self.tokens, 0), contender.copies)

        def loss() -> Tensor:
            return batches.loss(scorer, batch, contender.slices)

        def plain() -> Tensor:  # on modules of its own: hooks of a window show it in every forward
            return batches.loss(other, batch, contender.slices)

        forward_peak = self.peak(loss)
        forwards: list[float] = []

        def split() -> Tensor:
            value: list[Tensor] = []
            forwards.append(self.seconds(lambda: value.append(own())))
            return value[0]

        optimizer: Any = None

        def first() -> None:
            nonlocal optimizer
            optimizer = contender.make(model)
            for _ in range(2):
                optimizer.step(loss)

        peak = self.peak(first)
        own, floor_of = loss, plain
        if contender.captured and self.on_gpu:
            own, (graph, value) = CapturedClosure(optimizer, loss), capture(plain)

            def floor_of() -> Tensor:
                graph.replay()
                return value

            for _ in range(3):  # the first as it is, the second captures
                optimizer.step(own)
        del forwards[:]
        optimizer.step(split)
        calls = len(forwards)
        totals, floors = [], []
        for _ in range(STEPS):
            # Read once, as a step reads its losses: waiting after each forward would make the floor longer.
            floors.append(self.seconds(lambda: torch.stack([floor_of().sum() for _ in range(calls)]).tolist()))
            totals.append(self.seconds(lambda: optimizer.step(own)))
        del forwards[:]
        split_totals = [self.seconds(lambda: optimizer.step(split)) for _ in range(SPLIT)]
        forward = statistics.median(sum(forwards[i : i + calls]) for i in range(0, len(forwards), calls))
        total, floor = statistics.median(totals), statistics.median(floors)
        row = {
            "total": total, "floor": floor, "ratio": total / floor, "calls": calls, "forward": forward,
            "outside": statistics.median(split_totals) - forward, "graphs": len(getattr(own, "graphs", ())),
            "rows": len(batch.labels),
            "peak_mb": (peak - forward_peak) / 1e6, "passes": getattr(optimizer, "passes", None), "totals": totals,
            "mode": getattr(optimizer, "mode", None),
        }  # fmt: skip
        if contender.method == "pgap":
            optimizer.window = 1
            for _ in range(2):  # the second captures its probes' forwards
                optimizer.step(own)
            refresh = self.seconds(lambda: optimizer.step(own)) - total
            row["refresh"] = refresh
            row["ratio_with_refresh"] = (total + refresh / WINDOW) / floor
            optimizer.window = WINDOW
        if own is loss:
            row["profile"] = profile(lambda: self.seconds(lambda: optimizer.step(own)))
        if hasattr(optimizer, "merge"):
            optimizer.merge()
        if hasattr(optimizer, "detach"):
            optimizer.detach()
        return row


def run(part: Part) -> None:
    bench = Bench(part)
    for contender in contenders():
        if part.left < (0 if part.rehearse else SECONDS):
            part.write(not_run=contender.title)
            continue
        try:
            row = bench.measure(contender)
        except Exception as error:  # the finding of this contender; the others go on
            traceback.print_exc()
            part.write(contender=contender.title, error=f"{type(error).__name__}: {error}"[:2000])
            if "CUDA error" in str(error):  # nothing works in this process after it
                raise
            continue
        print(contender.title, row.pop("profile", ""), flush=True)
        part.write(contender=contender.title, **row)
        if part.device.type == "cuda":
            torch.cuda.empty_cache()


def failures(rows: Sequence[dict]) -> list[str]:
    return [f"{row['contender']}: {row['error'].splitlines()[0]}" for row in rows if "error" in row]


def tables(rows: Sequence[dict]) -> list[Table]:
    columns = ["contender", "step, ms", "its forwards plain, ms", "x", "x with refresh", "forwards, ms", "outside, ms"]
    columns += ["refresh, ms", "MB over forward"]
    lines = []
    for row in (r for r in rows if "total" in r):
        line = [row["contender"], *(f"{1e3 * row[name]:.2f}" for name in ("total", "floor")), f"{row['ratio']:.3f}"]
        line.append(shown(row.get("ratio_with_refresh"), ".3f"))
        line += [f"{1e3 * row[name]:.2f}" for name in ("forward", "outside")]
        line.append(f"{1e3 * row['refresh']:.0f}" if "refresh" in row else "")
        lines.append([*line, f"{row['peak_mb']:.0f}"])
    caption = "; ".join(f"not run: {row['not_run']}" for row in rows if "not_run" in row)
    return [Table(columns, lines, "Steps", caption)]
