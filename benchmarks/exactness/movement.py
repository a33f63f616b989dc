"""Does a 16-bit weight go where its updates send it? Actual movement against the float64 sum of intended updates.

No losses here: every update is prescribed, so that all that differs between schemes is how weights are perturbed and
rounded. Schemes of this package are its own classes; the others are the passes that they name, on the same noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pgap_kernels import draw, noise
from pgap_kernels.noise import Role
from pgap_kernels.perturbation import Dense, Folded, InPlace, Part, Residual, Scratch, Subspace, Term, Update, Weight
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
        self.model = nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
        self.weight = Weight("weight", self.model.weight, noise.tensor_id("weight"), {})
        self.start = (SIGMA * draw(shape, _key(_START), self.weight.id)).to(dtype)
        self.inputs = torch.ones(1, columns, dtype=dtype)
        self.rank = rank
        if rank:
            factors = [draw((n, rank), _key(_FACTORS), i) for i, n in enumerate(shape)]
            self.left, self.right = (torch.linalg.qr(f).Q.contiguous() for f in factors)
            self.scale = math.sqrt(rows * columns) / rank
        self.fresh = lru_cache(maxsize=2)(self._direction)  # a schedule of two passes asks for each twice
        self.persistent = self._direction(_PERSISTENT)

    def _direction(self, step: int) -> Part:
        if not self.rank:
            return Dense([self.weight], _key(step))
        core = draw((self.rank, self.rank), _key(_CORES + step), self.weight.id)
        return Subspace([self.weight], [self.left], [self.right], [core], [self.scale])

    @lru_cache(maxsize=4)  # noqa: B019  (a walk lives as long as its section)
    def sum_of_fresh(self, steps: int) -> Tensor:
        """All new directions of a plan, added up in float64."""
        if not self.rank:
            total = torch.zeros(self.start.shape, dtype=torch.float64)
            for step in range(steps):
                total += draw(self.start.shape, _key(step), self.weight.id)
            return total
        cores = torch.zeros(self.rank, self.rank, dtype=torch.float64)
        for step in range(steps):
            cores += draw((self.rank, self.rank), _key(_CORES + step), self.weight.id)
        return self._product(cores)

    def matrix(self, part: Part) -> Tensor:
        """A direction in float64."""
        if isinstance(part, Subspace):
            return self._product(part.cores[0].double())
        assert isinstance(part, Dense)
        return draw(self.start.shape, part.key, self.weight.id).double()

    def _product(self, core: Tensor) -> Tensor:
        return self.scale * (self.left.double() @ core @ self.right.double().T)

    def intended(self, plan: Plan) -> Tensor:
        """Where a plan leads from the start."""
        along = plan.persistent * plan.steps * self.matrix(self.persistent) if plan.persistent else 0.0
        return plan.fresh * self.sum_of_fresh(plan.steps) + along

    def steps_of(self, plan: Plan, step: int) -> list[tuple[Part, float]]:
        """The updates of a step."""
        persistent = [(self.persistent, plan.persistent)] if plan.persistent else []
        return [*persistent, (self.fresh(step), plan.fresh)]


def _key(step: int) -> int:
    return noise.derive(SEED, step, Role.DENSE)


def _rounding_key(step: int, write: int) -> int:
    return noise.derive(SEED, step, Role.ROUNDING, write)


# ---- schemes: each walks a plan and returns where the weights stand, by what one looks at ---------------------------

Positions = dict[str, Tensor]
Run = Callable[[Walk, Plan], Positions]


def passes(number: int, stochastic: bool = False) -> Run:
    """4: +eps, -2 eps, +eps, update. 3: the last two are one. 2: that is also the next +eps. 1: no perturbation."""

    def run(walk: Walk, plan: Plan) -> Positions:
        for step in range(plan.steps):
            z, writes = walk.fresh(step), []
            if number > 2 or (number == 2 and step == 0):
                writes.append([(z, EPS)])
            if number > 1:
                writes.append([(z, -2 * EPS)])
            back = [(z, EPS)] if number > 1 else []
            if number == 4:
                writes.append(back)
                back = []
            ahead = [(walk.fresh(step + 1), EPS)] if number == 2 and step + 1 < plan.steps else []
            writes.append([*walk.steps_of(plan, step), *back, *ahead])
            for i, terms in enumerate(writes):
                rounding = {"rounding": "stochastic", "rounding_key": _rounding_key(step, i)} if stochastic else {}
                z.write([Term(part, [amount]) for part, amount in terms], [0.0], rounding)
        return {"": walk.model.weight.double()}

    return run


def ceiling(walk: Walk, plan: Plan) -> Positions:
    """All updates added up in float64 and rounded once, to nearest: no weight of the dtype can be nearer."""
    return {"": (walk.start.double() + walk.intended(plan)).to(walk.start.dtype).double()}


def own(kind: type[InPlace] | type[Scratch], two_pass: bool = False, residual: bool = False) -> Run:
    """One of the package's modes, with forwards in between."""

    def run(walk: Walk, plan: Plan) -> Positions:
        weights = [walk.weight]
        mode = kind(weights, walk.model) if issubclass(kind, Scratch) else InPlace(weights, two_pass)
        mode.residual = Residual(weights) if residual else None
        for step in range(plan.steps):
            z, last = [walk.fresh(step)], step + 1 == plan.steps
            mode.begin(_rounding_key(step, 1 << 20))
            for sign in (1, -1):
                mode.stand(z, lambda _, sign=sign: sign * EPS)  # type: ignore[misc]
                mode.forward(lambda: walk.model(walk.inputs))
            terms = [([part], lambda _, a=amount: a) for part, amount in walk.steps_of(plan, step)]
            following = None if last else ([walk.fresh(step + 1)], lambda _: EPS)
            closing = (step + 1) % plan.window == 0
            mode.commit(Update(terms, lambda _: 0.0, closing, following), _rounding_key(step, mode.written))
        positions: Positions = {}
        if isinstance(mode, Folded) and mode.pending and not residual:
            (window,) = mode.windows.values()
            left, core, right = (t.double() for t in (window.left, window.core, window.right))
            positions[", before the merge"] = window.keep * walk.model.weight.double() + left @ core @ right.T
        mode.merge()
        mode.release()
        positions[""] = walk.model.weight.double()
        if mode.residual is not None:
            positions[", with its plane"] = joined(walk.model.weight, mode.residual.planes["weight"]).double()
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
    Scheme("ours: inplace", own(InPlace)),
    Scheme("ours: inplace, two_pass", own(InPlace, two_pass=True), long=False),
    Scheme("ours: inplace, U Z V^T", own(InPlace), low_rank=True, long=False),
    Scheme("ours: scratch", own(Scratch)),
    Scheme("ours: scratch + residual", own(Scratch, residual=True)),
    Scheme("ours: folded", own(Folded), low_rank=True),
    Scheme("ours: folded + residual", own(Folded, residual=True), low_rank=True),
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
        along = walk.matrix(walk.persistent)
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
