"""What a method costs beyond its forwards, counted by running one of its periods dry on tensors without memory."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .mode import ModeOptimizer

# Periods of up to so many steps are taken whole to be counted.
_TAKEN_WHOLE = 20


class Cost(NamedTuple):
    """Of a method in a mode, on the weights as they are."""

    forwards: float  # per step, refreshes spread over their period
    weight_passes: float  # reads and writes of every weight per step; a weight that two modules share is read for each
    # of them in the modes scratch and folded
    state_bytes: int  # kept between steps
    scratch_bytes: int  # largest transient, up to the O((m + n)(r + 8)) of an SVD


def over_a_period(optimizer: ModeOptimizer, count: Callable[[int], Sequence[float]]) -> list[float]:
    """The sums over one period of what ``count`` counts in as many steps as it is told to take.

    Of a long window not all steps are taken: beside the first and the last they are alike.
    """
    period = optimizer.period
    if period <= _TAKEN_WHOLE or getattr(optimizer, "window", None) != period:
        count(1)  # enters a schedule
        return list(count(period))
    # A step is counted after the one before it, which may write its perturbation; so steps are left out after a merge.
    optimizer.merge()
    optimizer.steps = _next_period(optimizer)
    count(1)
    ordinary = [value / 2 for value in count(2)]
    optimizer.merge()
    optimizer.steps = _next_period(optimizer) - 2
    count(1)
    return [ends + (period - 2) * value for ends, value in zip(count(2), ordinary, strict=True)]


def _next_period(optimizer: ModeOptimizer) -> int:
    """The number of its first step."""
    return -(-optimizer.steps // optimizer.period) * optimizer.period


def measure_cost(optimizer: ModeOptimizer) -> Cost:
    """Run a copy of an optimizer for one period: passes are counted and not run, closures return a constant."""
    twin = _dry_twin(optimizer)
    forwards = state_bytes = 0

    def closure() -> Tensor:
        nonlocal forwards
        forwards += 1
        # No two losses are equal: an update by nothing is not a pass.
        losses = [forwards + i / 1024 for i in range(optimizer.members * optimizer.groups)]
        return torch.tensor(losses, dtype=torch.float32, device="cpu")

    perturbation = twin.perturbation

    def count(steps: int) -> list[float]:
        nonlocal state_bytes
        before = [forwards, perturbation.passes]
        for _ in range(steps):
            twin.step(closure)  # type: ignore[arg-type]
            tensors = [t for state in twin.state.values() for t in state.values() if isinstance(t, Tensor)]
            state_bytes = max(state_bytes, sum(t.nbytes for t in tensors) + perturbation.state_bytes)
        return [forwards - before[0], perturbation.passes - before[1]]

    all_forwards, passes = over_a_period(twin, count)
    return Cost(
        all_forwards / twin.period,
        round(passes, 12) / twin.period,  # counted as shares of all elements, which sum to 3.0000000000000044
        state_bytes,
        perturbation.scratch_bytes + perturbation.workspace_bytes,
    )


def _dry_twin(optimizer: ModeOptimizer) -> ModeOptimizer:
    twin = copy.copy(optimizer)
    made: dict[int, nn.Parameter] = {}

    def empty(tensor: Tensor) -> nn.Parameter:
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        return made[id(tensor)]

    twin.param_groups = [{**g, "params": [empty(p) for p in g["params"]]} for g in optimizer.param_groups]
    group_of = {id(old): new for old, new in zip(optimizer.param_groups, twin.param_groups, strict=True)}
    twin.state = defaultdict(dict)
    twin.become_dry(
        [replace(w, tensor=empty(w.tensor), group=group_of[id(w.group)]) for w in optimizer.weights()],
    )
    return twin
