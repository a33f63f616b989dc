"""Does a 16-bit weight go where its updates send it? Actual movement against the float64 sum of intended updates.

Losses have no say here: every update is prescribed, so that schemes differ only in how they perturb and round. Those of
this package are a ``ZOOptimizer`` in its modes; the others are the passes that they name, on the same noise.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pgap_kernels import draw, noise
from pgap_kernels.directions import Direction, Factor, LowRank, Noise, Pass, Term, Weight
from pgap_kernels.noise import Role
from pgap_kernels.optim import Evaluation, ZOOptimizer
from pgap_kernels.perturbation.residual import joined

SEED, EPS, SIGMA = 0, 1e-3, 0.02
_START, _PERSISTENT, _FACTORS, _CORES = 1 << 40, 1 << 41, 1 << 42, 1 << 43  # step numbers that no walk reaches


class Plan(NamedTuple):
    """Prescribed updates: RMS per step along a new direction each, and along one that stays."""

    steps: int
    fresh: float
    persistent: float = 0.0
    window: int = 1 << 62  # after so many steps what a window has gathered is merged


class Walk:
    """One matrix as the weight of a linear layer, and directions of RMS 1: dense, or U Z V^T if it has a rank."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, rank: int | None = None) -> None:
        rows, columns = shape
        self.model = nn.Linear(columns, rows, bias=False, dtype=dtype)
        self.weight = Weight(0, "weight", self.model.weight, noise.tensor_id("weight"), {})
        self.start = (SIGMA * draw(shape, _key(_START), self.weight.id)).to(dtype)
        self.inputs = torch.ones(1, columns, dtype=dtype)
        self.rank = rank
        if rank:
            factors = [draw((n, rank), _key(_FACTORS), i) for i, n in enumerate(shape)]
            self.left, self.right = (torch.linalg.qr(f).Q.contiguous() for f in factors)
            self.scale = math.sqrt(rows * columns) / rank

    def direction(self, step: int) -> Direction:
        """The direction of a step."""
        if not self.rank:
            return Direction([Noise([self.weight], {_key(step): [1.0]})])
        left, right = Factor.stored([self.left]), Factor.stored([self.right])
        return Direction([LowRank([self.weight], left, right, [Term([self._drawn(step)], [self.scale])])])

    def matrix(self, *steps: int) -> Tensor:
        """The sum of the directions of steps, in float64."""
        total = sum(self._drawn(step).double() for step in steps)
        return self.scale * (self.left.double() @ total @ self.right.double().T) if self.rank else total

    def _drawn(self, step: int) -> Tensor:
        """z of a step, or its core Z."""
        if self.rank:
            return draw((self.rank, self.rank), _key(_CORES + step), self.weight.id)
        return draw(self.start.shape, _key(step), self.weight.id)

    @lru_cache(maxsize=4)  # noqa: B019  (a walk lives as long as its section)
    def _sum_of_fresh(self, steps: int) -> Tensor:
        return self.matrix(*range(steps))

    def intended(self, plan: Plan) -> Tensor:
        """Where a plan leads from the start."""
        along = plan.persistent * plan.steps * self.matrix(_PERSISTENT) if plan.persistent else 0.0
        return plan.fresh * self._sum_of_fresh(plan.steps) + along

    def updates(self, plan: Plan, step: int) -> list[tuple[Direction, list[float]]]:
        """The updates of a step."""
        persistent = [(self.direction(_PERSISTENT), [plan.persistent])] if plan.persistent else []
        return [*persistent, (self.direction(step), [plan.fresh])]


def _key(step: int) -> int:
    return noise.derive(SEED, step, Role.DENSE)


# ---- schemes: each walks a plan and returns where the weights end, by what one looks at -----------------------------

Positions = dict[str, Tensor]
Run = Callable[[Walk, Plan], Positions]


def passes(number: int, stochastic: bool = False) -> Run:
    """4: +eps, -2 eps, +eps, update. 3: the last two are one. 2: that is also the next +eps. 1: no perturbation."""

    def run(walk: Walk, plan: Plan) -> Positions:
        for step in range(plan.steps):
            z, update = walk.direction(step), walk.updates(plan, step)
            plus, over = [(z, [EPS])], [(z, [-2 * EPS])]
            ahead = [(walk.direction(step + 1), [EPS])] if step + 1 < plan.steps else []
            writes = {
                4: [plus, over, plus, update],
                3: [plus, over, [*update, *plus]],
                2: [*([plus] if step == 0 else []), over, [*update, *plus, *ahead]],
                1: [update],
            }[number]
            for i, terms in enumerate(writes):
                key = noise.derive(SEED, step, Role.ROUNDING, i) if stochastic else None
                for part in Direction.sum(terms):
                    Pass(part, rounding_key=key).run()
        return {"": walk.model.weight.double()}

    return run


def ceiling(walk: Walk, plan: Plan) -> Positions:
    """All updates added up in float64 and rounded once, to nearest: no weight of the dtype can be nearer."""
    return {"": (walk.start.double() + walk.intended(plan)).to(walk.start.dtype).double()}


class Prescribed(ZOOptimizer):
    """Two forwards along a new direction in each step, then the updates of a plan whatever the losses were."""

    method = "Prescribed"
    plans_ahead = True

    def __init__(self, walk: Walk, plan: Plan, **options: Any) -> None:
        self.walk, self.plan = walk, plan
        super().__init__(walk.model, {"lr": 0.0, "eps": EPS, "weight_decay": 0.0}, seed=SEED, **options)

    def lowrank_indices(self) -> list[int] | None:
        return [0] if self.walk.rank else None

    def direction(self, step: int, number: int = 0) -> Direction:
        return self.walk.direction(step)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        plus, minus = evaluate.two_sided(self.planned(self.steps))
        self.apply_update(self.walk.updates(self.plan, self.steps), flush=(self.steps + 1) % self.plan.window == 0)
        return (plus + minus) / 2


def own(mode: str, **options: Any) -> Run:
    """One of the package's modes, with its forwards."""

    def run(walk: Walk, plan: Plan) -> Positions:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "16-bit weights are perturbed in place")  # that is the point
            optimizer = Prescribed(walk, plan, mode=mode, **options)
        for _ in range(plan.steps):
            optimizer.step(lambda: walk.model(walk.inputs).float().mean())
        positions: Positions = {}
        if mode == "folded" and optimizer.pending and not optimizer.residual:
            seen = walk.model.weight.detach().float()
            for part in optimizer.perturbation.window:  # type: ignore[attr-defined]
                part.select([0], [seen]).apply([seen])
            positions[", before the merge"] = seen.double()
        optimizer.detach()
        positions[""] = walk.model.weight.double()
        if optimizer.residual:
            plane = optimizer.state_dict()["zo"]["residual"]["weight"]
            positions[", with its plane"] = joined(walk.model.weight, plane).double()
        return positions

    return run


class Scheme(NamedTuple):
    """A way to perturb and to round; ``low_rank``: along U Z V^T."""

    name: str
    run: Run
    low_rank: bool = False
    long: bool = True  # shown in the table of persistent directions too


SCHEMES = [
    Scheme("in place, 4 passes (MeZO), to nearest", passes(4)),
    Scheme("in place, 3 passes, to nearest", passes(3)),
    Scheme("in place, 2 passes, to nearest", passes(2), long=False),
    Scheme("in place, 3 passes, stochastic everywhere", passes(3, stochastic=True), long=False),
    Scheme("scratch, update to nearest", passes(1)),
    Scheme("ours: inplace", own("inplace")),
    Scheme("ours: inplace, two_pass", own("inplace", two_pass=True), long=False),
    Scheme("ours: inplace, U Z V^T", own("inplace"), low_rank=True, long=False),
    Scheme("ours: scratch", own("scratch")),
    Scheme("ours: scratch + residual", own("scratch", residual=True)),
    Scheme("ours: folded", own("folded"), low_rank=True),
    Scheme("ours: folded, window", own("folded", merge="window"), low_rank=True),
    Scheme("ours: folded, window + residual", own("folded", merge="window", residual=True), low_rank=True),
    Scheme("exact sum, rounded once to nearest", ceiling),
]


# ---- measuring ------------------------------------------------------------------------------------------------------


def figures(walk: Walk, plan: Plan, position: Tensor) -> dict[str, float]:
    """Correlation, RMS error, and the share of the intended progress along the persistent direction."""
    intended, actual = walk.intended(plan), position - walk.start.double()
    found = {
        "correlation": _cosine(actual - actual.mean(), intended - intended.mean()),
        "intended_rms": intended.square().mean().sqrt().item(),
        "rms_error": (actual - intended).square().mean().sqrt().item(),
    }
    if plan.persistent:
        along = walk.matrix(_PERSISTENT)
        found["progress"] = ((actual * along).sum() / (intended * along).sum()).item()
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    norm = (a.norm() * b.norm()).item()
    return (a * b).sum().item() / norm if norm else 0.0


def plans(args: argparse.Namespace) -> list[Plan]:
    """New directions only at each size, then a persistent direction within noise."""
    new = [Plan(args.movement_steps, size) for size in args.sizes]
    return [*new, *(Plan(args.persistent_steps, n, s, args.merge_every) for s, n in ((2e-7, 1e-6), (1e-6, 1e-5)))]


@torch.no_grad()
def rows(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each dtype, plan, scheme and what one looks at."""
    shape = (args.matrix, args.matrix)
    tasks = [(d, p, s) for d in args.movement_dtype for p in plans(args) for s in SCHEMES if s.long or not p.persistent]
    walks: dict[tuple[str, bool], Walk] = {}
    with tqdm(total=sum(p.steps for _, p, _ in tasks), desc="movement", unit="step", dynamic_ncols=True) as bar:
        for dtype, plan, scheme in tasks:
            key = (dtype, scheme.low_rank)
            if key not in walks:
                walks[key] = Walk(shape, getattr(torch, dtype), args.movement_rank if scheme.low_rank else None)
            walk = walks[key]
            walk.model.weight.copy_(walk.start)
            for suffix, position in scheme.run(walk, plan).items():
                yield {
                    "section": "movement",
                    "table": "persistent" if plan.persistent else "random",
                    "scheme": scheme.name + suffix,
                    "dtype": dtype,
                    "elements": walk.start.numel(),
                    **plan._asdict(),
                    **figures(walk, plan, position),
                }
            bar.update(plan.steps)
