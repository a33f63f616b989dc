"""What methods share whose subspace is that of an estimated gradient: probes, and the SVD of what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from ..directions import Direction, Weight, bucket, draw_factor, product_of_draws
from ..noise import Role
from ..subspace import Basis, gradient_basis, product_basis
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import at_least_one, positive
from .sampling import Sampling

PAPER_PROBE_EPS = 1e-3


class GradientSubspaceOptimizer(LowRankOptimizer):
    """Base of methods that move matrices along U C V^T with U, S, V the truncated SVD of G = (1/h) sum_j rho_j Q_j.

    Args:
        params, defaults, window, scale, exclude, **options: as in ``LowRankOptimizer``.
        probes: h, two-sided probes per refresh.
        eps_probe: their smoothing radius; by default eps, or 1e-3 with scale="paper".
        probe_rank: None: Q_j is dense noise on all weights, shared by all examples. p: Q_j is A B^T / sqrt(p) on the
            matrices alone, and each group of examples has its own, so that there are h * groups of them for the same
            forwards; then h * groups * p >= rank.
    """

    kept: ClassVar[tuple[str, ...]] = Basis._fields  # which of U, S and V are state

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        probes: int,
        eps_probe: float | None = None,
        probe_rank: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, defaults, **options)
        self.eps_probe = None if eps_probe is None else positive("eps_probe", eps_probe)
        self.probes = at_least_one("probes", probes)
        self.probe_rank = None if probe_rank is None else at_least_one("probe_rank", probe_rank)
        self._check_probe_rank()

    def check_schedule(self) -> None:
        super().check_schedule()
        self._check_probe_rank()

    def _check_probe_rank(self) -> None:
        drawn = self.probes * self.groups * (self.probe_rank or 0)
        for w in self.matrices() if self.probe_rank else ():
            if self.rank_of(w) > drawn:
                raise ValueError(
                    f"rank: got {self.rank_of(w)} for {w.name!r} with probe_rank={self.probe_rank}; accepted: up to "
                    f"{drawn}, which is probes * groups * probe_rank"
                )

    def refresh(self, evaluate: Evaluation) -> None:
        """New U, S, V of every matrix from h probes on this step's minibatch; the weights end as they began."""
        radius = self.amounts("eps")
        if self.eps_probe is not None or self.scale == "paper":
            radius = [self.eps_probe or PAPER_PROBE_EPS] * len(radius)
        found = self._dense_probes if self.probe_rank is None else self._lowrank_probes
        for w, basis in found(evaluate, radius):
            self.store(w, **{name: getattr(basis, name) for name in self.kept})

    def _dense_probes(self, evaluate: Evaluation, radius: list[float]) -> Iterator[tuple[Weight, Basis]]:
        """Dense noise on all weights, shared by all examples; G is assembled one matrix at a time."""
        keys = [self.key(Role.PROBE, probe) for probe in range(self.probes)]
        back = [-eps for eps in radius]
        losses = evaluate.population([(self.noise(key), sign) for key in keys for sign in (radius, back)])
        differences = [plus - minus for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        evaluate.clear()
        self.merge()
        range_key = self.key(Role.RANGE_FINDER)
        for device in dict.fromkeys(w.tensor.device for w in self.matrices()):
            matrices = [w for w in self.matrices() if w.tensor.device == device]
            scratch = self.perturbation.workspace(max(w.tensor.numel() for w in matrices), device)
            for w in matrices:
                norm = 2 * radius[w.index] * self.probes
                draws = [(key, difference / norm) for key, difference in zip(keys, differences, strict=True)]
                rank = self.rank_of(w)
                yield (
                    w,
                    gradient_basis(w.tensor.shape, draws, rank, tensor_id=w.id, range_key=range_key, scratch=scratch),
                )

    def _lowrank_probes(self, evaluate: Evaluation, radius: list[float]) -> Iterator[tuple[Weight, Basis]]:
        """A B^T / sqrt(p) on the matrices, each group of examples its own; G is never assembled."""
        p, sampling = self.probe_rank, Sampling(self.probes, self.groups, "antithetic")
        assert p is not None
        numbers = range(self.probes * self.groups)
        keys = [(self.key(Role.LEFT, number), self.key(Role.RIGHT, number)) for number in numbers]
        flat = [self._probe(*pair, p) for pair in keys]
        directions = [flat[i : i + self.groups] for i in range(0, len(flat), self.groups)]
        losses = evaluate.group_losses(sampling.points(directions, radius))
        amounts = [c for row in sampling.differences(losses) for c in row]
        evaluate.clear()
        self.merge()
        for w in self.matrices():
            own = min(p, *w.tensor.shape)
            left = [draw_factor(w, 0, own, key) * c for (key, _), c in zip(keys, amounts, strict=True)]
            right = [draw_factor(w, 1, own, key) for _, key in keys]
            scale = 1.0 / (radius[w.index] * math.sqrt(own))
            yield w, product_basis(torch.cat(left, 1) * scale, torch.cat(right, 1), self.rank_of(w))

    def _probe(self, left: int, right: int, p: int) -> Direction:
        same = bucket(self.matrices(), also=lambda w: min(p, *w.tensor.shape))
        return Direction([product_of_draws(ws, left, right, min(p, *ws[0].tensor.shape)) for ws in same])
