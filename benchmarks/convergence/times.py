"""From curves to times: when a run reaches a loss, which setting of an arm is best at that, and ratios of times.

A time is in example-forwards or in seconds, its *axis*. A run that has not reached the target within the budget is
censored there: its time is at least the budget. One that reached it before it was first evaluated is censored from the
other side: a line from the start would invent a time.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.convergence.study import Refused

AXES = ("forwards", "seconds")
Record = dict[str, Any]


class Time(NamedTuple):
    """When a run reached a target; if it did not, the budget at which it was given up.

    Attributes:
        early: it was there at the first evaluation after the start, and ``value`` is when that was.
    """

    value: float
    reached: bool
    early: bool = False

    def order(self) -> tuple[bool, float]:
        """Sooner is less; unreached is last."""
        return (not self.reached, self.value)


class Setting(NamedTuple):
    """What an arm is tuned by."""

    batch: int
    schedule: str
    lr: float
    forwards: int | None = None  # at which the rate has fallen, if not at the study's

    def __str__(self) -> str:
        own = f" in {self.forwards} forwards" if self.forwards else ""
        return f"batch {self.batch}, {self.schedule}{own}, lr {self.lr:g}"


@dataclass(frozen=True)
class Best:
    """The best setting of an arm for one purpose, with its runs by data seed.

    Attributes:
        ends: "lr", "batch": where it is an end of the arm's grid, so that a better one may lie beyond.
    """

    setting: Setting
    runs: dict[int, Record]
    ends: tuple[str, ...]


def time_to(record: Record, target: float, axis: str, budget: float) -> Time:
    """When a run's loss first is at most the target, by interpolation between its checkpoints."""
    points = [(point[axis], point["loss"]) for point in record["checkpoints"]]
    if points[0][1] <= target:
        raise Refused(f"targets: got {target:g}, but the loss starts at {points[0][1]:.4g}; accepted: less")
    for number, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(points)):
        if y1 <= target and number == 0:  # after the budget it says nothing of what was before
            return Time(x1, True, early=True) if x1 <= budget else Time(budget, False)
        if y1 <= target:
            x = x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
            return Time(x, True) if x <= budget else Time(budget, False)
    return Time(budget, False)


def loss_at(record: Record, axis: str, budget: float) -> dict[str, float]:
    """Loss and metric at a budget, by interpolation between checkpoints.

    A run that has ended stays as it is, as its rate is 0. The loss of one that has diverged before is infinite, and its
    metric is that with which it began.
    """
    points, names = record["checkpoints"], ("loss", metric_of(record))
    lost = {**{name: points[0][name] for name in names}, "loss": math.inf}
    if budget > points[-1][axis]:
        return lost if record["status"] == "diverged" else {name: points[-1][name] for name in names}
    for before, after in itertools.pairwise(points):
        if budget <= after[axis]:
            share = (budget - before[axis]) / (after[axis] - before[axis])
            found = {name: before[name] + share * (after[name] - before[name]) for name in names}
            return lost if math.isnan(found["loss"]) else found
    return {name: points[0][name] for name in names}


def holds(record: Record, target: float) -> bool:
    """Whether a run that reached a target is still there at its end."""
    return record["status"] != "diverged" and record["checkpoints"][-1]["loss"] <= target


def timed(record: Record, speed: Sequence[dict[str, Any]]) -> Record:
    """The record with the seconds at each checkpoint: those of its arm's steps, by their example-forwards, added up.

    Args:
        speed: the rows of ``speed.measure``.

    Raises:
        Refused: they have no step of so many.
    """
    cell, done = record["cell"], [0, *record["steps"]["forwards"]]
    own = {r["forwards"]: r["seconds"] for r in speed if (r["arm"], r["batch"]) == (cell["arm"], cell["batch"])}
    taken = [b - a for a, b in itertools.pairwise(done)]
    if missing := {*taken} - own.keys():
        raise Refused(
            f"speed.json: has no step of {cell['arm']} with {cell['batch']} examples and {missing.pop()} "
            "example-forwards; accepted: one of the same study (`benchmarks.convergence speed`)"
        )
    seconds = [0.0, *itertools.accumulate(own[forwards] for forwards in taken)]
    return record | {"checkpoints": [point | {"seconds": seconds[point["step"]]} for point in record["checkpoints"]]}


def metric_of(record: Record) -> str:
    """The most telling metric of a run's evaluations, such as its accuracy."""
    return next(name for name in record["checkpoints"][0] if name not in ("step", *AXES, "loss"))


def settings(records: Iterable[Record], arm: str) -> dict[Setting, dict[int, Record]]:
    """The finished runs of an arm by setting and data seed."""
    found: dict[Setting, dict[int, Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["arm"] == arm and record["status"] != "stopped":
            found.setdefault(setting_of(record), {})[cell["data_seed"]] = record
    return found


def setting_of(record: Record) -> Setting:
    """Of its cell."""
    return Setting(*(record["cell"][name] for name in Setting._fields))


def screened(found: dict[Setting, dict[int, Record]]) -> dict[Setting, dict[int, Record]]:
    """What settings are compared by: the runs of the seeds that all of them have.

    Settings without the seed that most of them have are not compared.
    """
    most = Counter(seed for runs in found.values() for seed in sorted(runs)).most_common(1)[0][0]
    candidates = {setting: runs for setting, runs in found.items() if most in runs}
    shared = set.intersection(*(set(runs) for runs in candidates.values()))
    return {setting: {seed: runs[seed] for seed in sorted(shared)} for setting, runs in candidates.items()}


def fastest(found: dict[Setting, dict[int, Record]], target: float, axis: str, budget: float) -> Best:
    """The setting that reaches a target first: with the most runs, then by their median, then by the loss at last."""
    compared = screened(found)

    def order(setting: Setting) -> tuple:
        times = [time_to(run, target, axis, budget) for run in compared[setting].values()]
        return (sum(not t.reached for t in times), median(times).order(), mean_loss(compared[setting], axis, budget))

    return _best(found, compared, min(compared, key=order))


def lowest(found: dict[Setting, dict[int, Record]], axis: str, budget: float) -> Best:
    """The setting with the least mean loss at a budget."""
    compared = screened(found)
    return _best(found, compared, min(compared, key=lambda setting: mean_loss(compared[setting], axis, budget)))


def mean_loss(runs: dict[int, Record], axis: str, budget: float) -> float:
    """Of runs, at a budget."""
    return statistics.fmean(loss_at(run, axis, budget)["loss"] for run in runs.values())


def _best(found: dict[Setting, dict[int, Record]], compared: Iterable[Setting], setting: Setting) -> Best:
    rates = [s.lr for s in compared if s._replace(lr=setting.lr) == setting]
    batches = {s.batch for s in compared}
    ends = ("lr",) if setting.lr in (min(rates), max(rates)) else ()
    if len(batches) > 1 and setting.batch in ({min(batches), max(batches)} - {1}):  # nothing lies beyond 1
        ends += ("batch",)
    return Best(setting, found[setting], ends)


def median(times: Sequence[Time]) -> Time:
    """Unreached ones count as later than any other; of an even number the later of the two in the middle."""
    return sorted(times, key=Time.order)[len(times) // 2]


@dataclass(frozen=True)
class Ratio:
    """Of two arms' times, paired by data order: the geometric mean over the pairs.

    Attributes:
        sign: "" for a ratio; "≥" or "≤" for a bound, as some run of one of the two is censored. Where bounds are
            opposed, those of one pair included, there is no ratio: None.
        low, high: the 95 % interval by Student's t of the logarithms; of two pairs or more without censored runs.
    """

    value: float
    sign: str
    pairs: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.sign} {self.value:.2f}×".strip()
        return f"{self.value:.2f}× ({self.low:.2f} to {self.high:.2f})"


def ratio(pairs: Sequence[tuple[Time, Time]]) -> Ratio | None:
    """Of the first times over the second."""
    above = any(not a.reached or b.early for a, b in pairs)
    below = any(a.early or not b.reached for a, b in pairs)
    if not pairs or (above and below):
        return None
    logs = [math.log(a.value / b.value) for a, b in pairs]
    mean = statistics.fmean(logs)
    sign = "≥" if above else "≤" if below else ""
    if sign or len(logs) < 2:
        return Ratio(math.exp(mean), sign, len(logs))
    from scipy.stats import t

    half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), sign, len(logs), math.exp(mean - half), math.exp(mean + half))
