"""What recipes draw and estimate with: keys, noise, fresh directions, and the slopes along them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import noise
from ..directions import Direction, Noise, Weight
from ..noise import Role
from .evaluation import Evaluation
from .mode import ModeOptimizer
from .sampling import Sampling
from .signal import signal_of


class DirectionOptimizer(ModeOptimizer):
    """The part of ``ZOOptimizer`` that recipes call before their update."""

    def key(self, role: Role, probe: int = 0, step: int | None = None) -> int:
        """The key of a step's draw of a role; of this step by default."""
        return noise.derive(self.seed, self.steps if step is None else step, role, probe)

    def noise(self, key: int, buckets: Sequence[list[Weight]] | None = None, distribution: str = "normal") -> Direction:
        """The direction z(key) on weights in lists that can share a pass, by default on all."""
        lists = self.buckets() if buckets is None else buckets
        return Direction([Noise(weights, {key: [1.0] * len(weights)}, distribution) for weights in lists])

    def descent(self, amount: float) -> list[float]:
        """-lr amount / eps of each weight: a step along a direction, amount / eps being the slope along it."""
        return [-lr * amount / eps for lr, eps in zip(self.rates(), self.radius(), strict=True)]

    def planned(self, step: int) -> Direction:
        """The first direction of a step, made once."""
        if self._planned is None or self._planned[0] != step:
            self._planned = (step, self.direction(step))
        return self._planned[1]

    def estimate(self, evaluate: Evaluation, sampling: Sampling) -> tuple[list[tuple[Direction, float]], float]:
        """An estimate of the gradient from fresh directions, each with its amount as ``descent`` takes it, and the loss
        to report."""
        groups, radius = sampling.groups, self.radius()
        numbers = range(1, sampling.directions * groups)
        flat = [self.planned(self.steps), *(self.direction(self.steps, number) for number in numbers)]
        directions = [flat[i : i + groups] for i in range(0, len(flat), groups)]
        losses = evaluate.group_losses(sampling.points(directions, radius))
        if evaluate.rows and len({*radius}) == 1:
            rows = torch.cat([r.reshape(-1, groups * r.shape[-1]) for r in evaluate.rows])
            evaluate.signal = signal_of(rows, groups, sampling.baseline, radius[0])
            self.signal_rule.note(evaluate.signal)
        if self.lr_rule and evaluate.signal.squared_norm is None and not self.perturbation.dry:
            raise ValueError(
                f"lr_rule: got {self.lr_rule!r} without a loss per row of two examples or more in a group; accepted: "
                "with members or groups of 2 or more, and such losses"
            )
        amounts = [amount for row in sampling.differences(losses) for amount in row]
        evaluate.slopes += [amount * len(flat) / radius[0] for amount in amounts]
        return list(zip(flat, amounts, strict=True)), sampling.reported(losses)

    def to_host(self, values: Tensor, made_up: float = 1.0) -> list[float]:
        """Values of a reduction on the host; made up when run dry, where equal ones could make a pass an empty one."""
        return [made_up] * values.numel() if values.is_meta else values.flatten().tolist()
