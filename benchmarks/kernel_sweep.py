"""Times the ops of benchmarks.kernel_ops: which settings, who takes part, how often, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import timing
from benchmarks.kernel_ops import OPS, Case, weights
from benchmarks.timing import Call
from pgap_kernels import cpu

ISAS = ("avx512", "avx2", "generic")  # from the best
PROVIDERS = ("ours", "reference", "idiom", "torch.compile", "addmm_", "lerp", "two_passes", "to_nearest", "one_by_one")
OWN = ("ours", "two_passes", "to_nearest", "one_by_one")  # run our kernels
PROBE = (1024, 1024)  # a matrix on which one turn of anything is affordable
PATIENCE = 8  # budgets that one turn may take
REPEATS = (5, 101)  # turns at a point: as many as ``W.add_(1.0)`` fits into SHORT
SHORT = 0.02  # seconds


class Point(NamedTuple):
    """One setting; everybody takes turns at it."""

    run: int
    op: str
    dtype: str
    shape: tuple[int, int]
    rank: int | None
    threads: int


class Contender(NamedTuple):
    provider: str
    isa: str | None
    call: Call
    before: Call | None = None


@dataclass
class Sweep:
    """Who is timed, where, and how long at most."""

    device: torch.device
    timer: timing.Timer
    isas: Sequence[str] = ()  # of our CPU kernels, from the best; none on another device
    providers: Collection[str] = PROVIDERS
    wanted: Collection[tuple] | None = None  # (op, dtype, rank, provider, isa): only these, the floor apart
    copy: bool = False  # also time ``spare.copy_(W)``, which is a GPU's floor
    repeats: int | None = None  # turns of a contender that is fast enough; None: REPEATS
    warmups: int = 1
    budget: float = 0.5  # seconds for the turns of one contender at one point
    _rates: dict[tuple, float] = field(default_factory=dict)  # seconds per weight, of what was timed before

    def rows(self, points: Sequence[Point]) -> Iterator[list[dict]]:
        """The rows of each point, in the given order."""
        isa, threads = cpu.isa()[0] if self.isas else None, torch.get_num_threads()
        made: tuple | None = None
        w, case = torch.empty(0), None
        try:
            for point in points:
                if made is None or made[:2] != (point.dtype, point.shape):
                    case = None
                    w = torch.empty(0)  # before the next is made: two may not fit
                    w = weights(point.shape, point.dtype, self.device)
                if case is None or made != (point.dtype, point.shape, point.op, point.rank):
                    case = None
                    case = _case(point, w)
                made = (point.dtype, point.shape, point.op, point.rank)
                torch.set_num_threads(point.threads)
                yield self.measure(point, case)
        finally:
            torch.set_num_threads(threads)
            if isa:
                cpu.use_isa(isa)

    def measure(self, point: Point, case: Case) -> list[dict]:
        """A row for the floor and for everybody who takes part, also for those who cannot."""
        whole = case.whole
        floors = [Contender("floor", None, lambda: whole.add_(1.0))]
        if self.copy:
            spare = torch.empty_like(whole)
            floors.append(Contender("copy", None, lambda: spare.copy_(whole)))
        most = self.repeats or self._repeats(floors[0].call)
        turns = dict.fromkeys(floors, most)
        reasons: dict[Contender, str] = {}
        for contender in self._contenders(point, case):
            try:
                seconds = self._estimate(point, contender, whole.numel())
            except Exception as error:  # whatever a compiler throws is the finding
                reasons[contender] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if seconds > PATIENCE * self.budget:
                reasons[contender] = f"about {seconds:.1f} s a call, too long for --budget {self.budget:g}"
            else:
                turns[contender] = min(max(int(self.budget / max(seconds, 1e-9)), 1), most)
        calls, before = [c.call for c in turns], [c.before for c in turns]
        times = timing.medians(calls, self.timer, list(turns.values()), self.warmups, before)
        measured = dict(zip(turns, times, strict=True))
        for contender, seconds in measured.items():
            self._rates[_key(point, contender)] = seconds.done / whole.numel()
        return _rows(point, case, measured, turns, reasons)

    def _contenders(self, point: Point, case: Case) -> Iterator[Contender]:
        """Whoever takes part beside the floor."""
        calls = {"reference": partial(case.ours, backend="reference"), "idiom": case.idiom, **case.others, **case.own}
        best = self.isas[0] if self.isas else None
        found = [Contender("ours", isa, case.ours, partial(cpu.use_isa, isa)) for isa in self.isas]
        if not self.isas:
            found = [Contender("ours", None, case.ours)]
        for name, call in calls.items():
            own = name in OWN and best is not None
            found.append(
                Contender(name, best, call, partial(cpu.use_isa, best)) if own else Contender(name, None, call)
            )
        for contender in found:
            key = (point.op, point.dtype, point.rank, contender.provider, contender.isa)
            if contender.provider in self.providers and (self.wanted is None or key in self.wanted):
                yield contender

    def _repeats(self, floor: Call) -> int:
        """Turns at a point: more where calls are short."""
        floor()
        low, high = REPEATS
        return min(max(int(SHORT / self.timer(floor).done), low), high)

    def _estimate(self, point: Point, contender: Contender, numel: int) -> float:
        """Seconds of one call, by what was timed before or by a small matrix: a large one might take minutes."""
        key = _key(point, contender)
        if key not in self._rates:
            call, size = contender.call, numel
            if numel > PROBE[0] * PROBE[1]:
                small = _case(point, weights(PROBE, point.dtype, self.device))
                call = next(c.call for c in self._contenders(point, small) if c[:2] == contender[:2])
                size = small.whole.numel()
            if contender.before:
                contender.before()
            call()  # compiles what is compiled
            self._rates[key] = self.timer(call).done / size
        return self._rates[key] * numel


def _case(point: Point, w: torch.Tensor) -> Case:
    rank = () if point.rank is None else (point.rank,)
    return OPS[point.op].case(w, *rank)


def _key(point: Point, contender: Contender) -> tuple:
    return point.op, point.dtype, point.rank, point.threads, contender.provider, contender.isa


def _rows(point: Point, case: Case, measured: dict, turns: dict, reasons: dict) -> list[dict]:
    seconds = {contender.provider: s.done for contender, s in measured.items()}
    moved = 2 * case.whole.nbytes
    rows = []
    for contender in [*measured, *reasons]:
        row: dict = point._asdict() | {
            "shape": list(case.whole.shape),
            "megabytes": case.whole.nbytes / 2**20,
            "provider": contender.provider,
            "isa": contender.isa,
        }
        if contender in reasons:
            rows.append(row | {"unmeasured": reasons[contender]})
            continue
        own = measured[contender]
        extra = 0 if contender.provider in ("floor", "copy") else case.extra
        row |= {
            "seconds": own.done,
            "host_seconds": own.returned,
            "repeats": turns[contender],
            "floor_ratio": own.done / seconds["floor"],
            "speedup_vs_idiom": seconds["idiom"] / own.done if "idiom" in seconds else None,
            "gb_per_s": (moved + extra) / own.done / 1e9,
        }
        if "copy" in seconds:
            row["copy_share"] = row["gb_per_s"] / (moved / seconds["copy"] / 1e9)
        rows.append(row)
    return rows
