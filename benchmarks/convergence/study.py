"""What is to be run: a study, its arms, and the cells that they consist of."""

from __future__ import annotations

import heapq
import itertools
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgap_kernels.finetune import Config
from pgap_kernels.optim import available_methods

DEFAULT = Path(__file__).with_name("study.toml")
# The learning rate over that of the first step, by the share of the budget of example-forwards that is used up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda used: 1.0,
    "linear": lambda used: max(0.1, 1 - 0.9 * used),
    "linear_to_zero": lambda used: max(0.0, 1 - used),  # that of `pgap-kernels finetune`
    "inverse": lambda used: 1 / (1 + 9 * used),
}


PARTS = ("dev", "test")


class Refused(Exception):
    """What cannot be run or reported, and why."""


@dataclass(frozen=True)
class Cell:
    """One run: a method with its options, a learning rate and schedule, a batch size, and seeds."""

    arm: str
    method: str
    batch: int
    schedule: str
    lr: float
    options: Mapping[str, Any]
    data_seed: int
    direction_seed: int
    forwards: int | None = None  # its budget, by which its rate falls; None: the study's

    @property
    def name(self) -> str:
        """Of its file."""
        arm = "".join(c if c.isalnum() else "-" for c in self.arm)
        own = f"_f{self.forwards}" if self.forwards else ""
        return f"{arm}_b{self.batch}_{self.schedule}_{self.lr:g}{own}_d{self.data_seed}_z{self.direction_seed}"

    @property
    def slices(self) -> int:
        """Points of one forward, each with losses of its own."""
        return self.copies * self.options.get("groups", 1)

    @property
    def copies(self) -> int:
        """Of the minibatch in the batch of a forward."""
        return self.options.get("members", 1)


@dataclass(frozen=True)
class Study:
    """What all cells share, and the cells, the most wanted first.

    Attributes:
        baseline: the arm that times are compared with.
        forwards: the budget of a cell, in example-forwards, unless it has one of its own.
        first_checkpoint: example-forwards before the first evaluation after the start.
        targets: losses by name.
        part: of the data, on which losses and targets are measured: "dev" where settings are chosen, else "test".
        task: options of ``finetune``'s ``Config``: model and data.
    """

    baseline: str
    forwards: int
    first_checkpoint: int
    targets: Mapping[str, float]
    part: str
    task: Mapping[str, Any]
    cells: tuple[Cell, ...]

    def shared(self) -> dict[str, Any]:
        """All but the cells."""
        return {name: value for name, value in asdict(self).items() if name != "cells"}

    def config(self) -> Config:
        """The model and data of the task."""
        return Config(**self.task)

    def budget(self, cell: Cell) -> int:
        """Example-forwards of a cell."""
        return cell.forwards or self.forwards

    def checkpoints(self, cell: Cell) -> Iterator[float]:
        """Example-forwards at which to evaluate a cell, without end; its budget is one of them."""
        regular = (self.first_checkpoint * 2 ** (k / 2) for k in itertools.count())
        yield from heapq.merge(regular, [self.budget(cell)])


_KEYS = {"baseline", "forwards", "first_checkpoint", "targets", "part", "seeds", "task", "arms"}
_ARM_KEYS = {"name", "method", "batch", "schedule", "lr", "options", "forwards"}


def load(file: Path, only: Sequence[str] | None = None) -> Study:
    """Read a study.

    Args:
        file: TOML, as study.toml explains it.
        only: names of arms; all by default.

    Raises:
        Refused: the file cannot be read, or says something that cannot be run.
    """
    try:
        found = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"--config: cannot read {str(file)!r} ({error})") from error
    _check_keys("--config", found, _KEYS)
    for arm in found["arms"]:
        _check_arm(arm)
    names = list(dict.fromkeys(arm["name"] for arm in found["arms"]))
    for option, given in (("--only", only or []), ("baseline", [found["baseline"]])):
        if missing := set(given) - set(names):
            raise Refused(f"{option}: got {missing.pop()!r}; accepted: {', '.join(names)}")
    if found["part"] not in PARTS:
        raise Refused(f"part: got {found['part']!r}; accepted: {', '.join(PARTS)}")
    return Study(
        baseline=found["baseline"],
        forwards=found["forwards"],
        first_checkpoint=found["first_checkpoint"],
        targets=found["targets"],
        part=found["part"],
        task=found["task"],
        cells=tuple(cell for cell in _cells(found) if not only or cell.arm in only),
    )


def _check_keys(where: str, found: Mapping[str, Any], accepted: set[str]) -> None:
    if wrong := set(found) ^ accepted:
        raise Refused(
            f"{where}: {wrong.pop()!r} is unknown or missing; accepted: exactly {', '.join(sorted(accepted))}"
        )


def _check_arm(arm: Mapping[str, Any]) -> None:
    where = f"arms: {arm.get('name')!r}"
    _check_keys(where, {"options": {}, "forwards": None, **arm}, _ARM_KEYS)
    if arm["method"] not in available_methods():
        raise Refused(f"{where}: got method {arm['method']!r}; accepted: {', '.join(available_methods())}")
    if "forwards" in arm and any(SCHEDULES.get(name, lambda used: 0.0)(1.0) for name in arm["schedule"]):
        raise Refused(f"{where}: got forwards with {arm['schedule']}; accepted: schedules that end at 0")
    if wrong := set(arm["schedule"]) - set(SCHEDULES):
        raise Refused(f"{where}: got schedule {wrong.pop()!r}; accepted: {', '.join(SCHEDULES)}")


def _cells(found: Mapping[str, Any]) -> list[Cell]:
    """In the order in which they are to be run: see study.toml."""
    ranked: list[tuple[tuple[int, int, int], Cell]] = []
    seeds = zip(found["seeds"]["data"], found["seeds"]["directions"], strict=True)
    for repeat, (data_seed, direction_seed) in enumerate(seeds):
        for arm in found["arms"]:
            settings = itertools.product(arm["schedule"], arm["batch"], arm["lr"])
            for rank, (schedule, batch, lr) in enumerate(settings):
                setting = (arm["name"], arm["method"], batch, schedule, lr, arm.get("options", {}))
                cell = Cell(*setting, data_seed, direction_seed, arm.get("forwards"))
                wave = 0 if rank == 0 else 1 if repeat == 0 else 2
                ranked.append(((wave, rank, repeat), cell))
    cells = [cell for _, cell in sorted(ranked, key=lambda r: r[0])]  # stable: arms in their order
    twice = [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]
    if twice:
        raise Refused(f"arms: there are several cells {twice[0]!r}; accepted: different ones")
    return cells
