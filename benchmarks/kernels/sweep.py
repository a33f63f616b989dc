"""Times the ops of ops.py: which settings, who takes part, how often, and the rows that come of it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness.timer import Call, Timer, medians, on_gpu, on_host
from benchmarks.kernels.ops import OPS, Case, weights
from pgap_kernels import cpu, use_backend

ISAS = ("avx512_bf16", "avx512", "avx2", "neon", "generic")  # from the best
OWN = ("ours", "two_passes", "to_nearest", "one_by_one", "in_place")  # made of our kernels
PROVIDERS = (*OWN[:1], "reference", "idiom", "torch.compile", "addmm_", "lerp", *OWN[1:])
FLOORS = ("floor", "copy")
PROBE = (1024, 1024)  # a matrix on which one turn of anything is affordable
PROBING = 0.02  # seconds
PATIENCE = 4  # budgets that one turn may take
FEWEST = 3  # turns of whoever is within the budget
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
    tokens: int | None = None

    @property
    def title(self) -> str:
        """To read: "low rank, rank 16, float32, 512 x 512"."""
        parts = [OPS[self.op].title, self.rank and f"rank {self.rank}", self.tokens and f"{self.tokens} tokens"]
        parts.append(self.dtype)
        return ", ".join(str(part) for part in parts if part)


class Contender(NamedTuple):
    provider: str
    isa: str | None
    call: Call
    before: Call | None = None

    @property
    def title(self) -> str:
        return self.provider if self.provider != "ours" else f"ours {self.isa or ''}".strip()


@dataclass
class Sweep:
    """Who is timed, where, and how long at most."""

    device: torch.device
    timer: Timer
    isas: Sequence[str] = ()  # of our CPU kernels, from the best; none on another device
    providers: Collection[str] = PROVIDERS
    wanted: Collection[tuple] | None = None  # (op, dtype, rank, provider, isa): only these, and the floor
    copy: bool = False  # also time ``spare.copy_(W)``, which is a GPU's floor
    repeats: int | None = None  # turns of a contender that is fast enough; None: REPEATS
    warmups: int = 1
    budget: float = 0.25  # seconds for the turns of one contender at one point
    _rates: dict[tuple, float] = field(default_factory=dict)  # seconds per weight, of what was timed before

    @classmethod
    def of(cls, device: torch.device, isas: Sequence[str] | None) -> Sweep:
        """The usual one of a device."""
        if device.type == "cuda":
            return cls(device, on_gpu(device), copy=True, warmups=3)
        return cls(device, on_host, isas or ())

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
                setting = (point.dtype, point.shape, point.op, point.rank, point.tokens)
                if case is None or made != setting:
                    case = None
                    case = make_case(point, w)
                made = setting
                torch.set_num_threads(point.threads)
                yield self.measure(point, case)
        finally:
            torch.set_num_threads(threads)
            if isa:
                cpu.use_isa(isa)

    def measure(self, point: Point, case: Case) -> list[dict]:
        """A row for the floor and for everybody who takes part, also for those who cannot."""
        whole = case.whole
        most = 0
        turns: dict[Contender, int] = {}
        reasons: dict[Contender, str] = {}
        for contender in self.contenders(point, case):
            if contender.provider in FLOORS:
                most = most or self.repeats or self._repeats(contender.call)
                turns[contender] = most
                continue
            try:
                seconds = self._estimate(point, contender, whole.numel())
            except Exception as error:  # whatever a compiler throws is the finding
                reasons[contender] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            # All is compared with the idiom, so that is timed whatever it takes.
            if seconds > PATIENCE * self.budget and contender.provider != "idiom":
                reasons[contender] = f"about {seconds:.1f} s a call, too long for --budget {self.budget:g}"
            else:
                least = FEWEST if seconds < self.budget else 1
                turns[contender] = min(max(int(self.budget / max(seconds, 1e-9)), least), most)
        calls, before = [c.call for c in turns], [c.before for c in turns]
        times = medians(calls, self.timer, list(turns.values()), self.warmups, before)
        measured = dict(zip(turns, times, strict=True))
        for contender, median in measured.items():
            self._rates[_key(point, contender)] = median.done / whole.numel()
        return _rows(point, case, measured, turns, reasons)

    def contenders(self, point: Point, case: Case) -> Iterator[Contender]:
        """Whoever takes part, the floor first."""
        whole = case.whole
        yield Contender("floor", None, case.floor or partial(whole.add_, 1.0))
        if self.copy:
            spare = torch.empty_like(whole)
            yield Contender("copy", None, lambda: spare.copy_(whole))
        isas = self.isas or (None,)
        found = [_ours("ours", isa, case.ours, case.before) for isa in isas]
        found.append(Contender("reference", None, partial(_by_reference, case.ours), case.before))
        found.append(Contender("idiom", None, case.idiom, case.before))
        found += [Contender(name, None, call, case.before) for name, call in case.others.items()]
        found += [_ours(name, isas[0], call, case.before) for name, call in case.own.items()]
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
        """Seconds of one call, by what was timed before or, on a CPU, by a small matrix: others might take minutes."""
        key = _key(point, contender)
        if key not in self._rates:
            call, size = contender.call, numel
            # On a GPU any turn is affordable, and on a small matrix it would be the launch that is timed.
            if numel > PROBE[0] * PROBE[1] and self.device.type == "cpu":
                small = make_case(point, weights(PROBE, point.dtype, self.device))
                call = next(c.call for c in self.contenders(point, small) if c[:2] == contender[:2])
                size = small.whole.numel()
            if contender.before:
                contender.before()
            call()  # compiles what is compiled
            begin, least = time.perf_counter(), math.inf
            while time.perf_counter() < begin + PROBING:
                least = min(least, self.timer(call).done)
            self._rates[key] = least / size
        return self._rates[key] * numel


def make_case(point: Point, w: torch.Tensor) -> Case:
    """The op's at that point, of these weights."""
    return OPS[point.op].case(w, *(x for x in (point.rank, point.tokens) if x is not None))


def _by_reference(call: Call) -> None:
    with use_backend("reference"):
        call()


def _ours(provider: str, isa: str | None, call: Call, before: Call | None) -> Contender:
    def prepare() -> None:
        if isa:
            cpu.use_isa(isa)
        if before:
            before()

    return Contender(provider, isa, call, prepare)


def _key(point: Point, contender: Contender) -> tuple:
    return point.op, point.dtype, point.rank, point.threads, point.tokens, contender.provider, contender.isa


def _rows(point: Point, case: Case, measured: dict, turns: dict, reasons: dict) -> list[dict]:
    seconds = {contender.provider: s.done for contender, s in measured.items()}
    moved = 2 * case.whole.nbytes
    rows = []
    for contender in [*measured, *reasons]:
        row: dict = point._asdict() | {
            "shape": list(case.sized_by.shape),
            "megabytes": case.sized_by.nbytes / 2**20,
            "provider": contender.provider,
            "isa": contender.isa,
        }
        if contender in reasons:
            rows.append(row | {"unmeasured": reasons[contender]})
            continue
        own = measured[contender]
        extra = 0 if contender.provider in FLOORS else case.extra
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
