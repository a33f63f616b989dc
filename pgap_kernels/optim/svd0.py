"""SVD-0: perturbations in the subspace of an estimated gradient, with a plain core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..directions import Direction, Factor, Weight
from ..noise import Role
from .base import Evaluation, Params
from .gradient_subspace import GradientSubspaceOptimizer
from .sampling import Sampling


class SVD0(GradientSubspaceOptimizer):
    """P-GAP's subspace without its alignment:  D = scale * U Z V^T,  Z (r, r) ~ N(0, 1).

    Every ``window`` steps the truncated SVD of a gradient estimate gives U and V, as in ``PGAP``; every step is
    two-sided along D. 2 + 2h/window forwards; 3 + (2h + 1)/window weight passes in place, (2h + 1)/window folded with a
    window; for n directions 2n and 2n + 1 instead of 2 and 3. State: U and V, (m + n) r floats of a matrix.

    Neither the paper's text nor its code is public: this is the implementation in AIM-ZO, whose scale is "paper".

    Args:
        params, rank, window, probes, eps_probe, probe_rank, exclude, directions, baseline: as in ``PGAP``.
        lr, eps, weight_decay: as in ``MeZO``.
        scale: "subzero": the norm of dense noise, so that MeZO's eps and lr carry over; "paper": 1.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "SVD0"
    plans_ahead: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("left", "right")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 64,
        window: int = 1000,
        probes: int = 10,
        scale: str = "subzero",
        exclude: Sequence[str] = (),
        eps_probe: float | None = None,
        probe_rank: int | None = None,
        directions: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank},
            window=window,
            scale=scale,
            exclude=exclude,
            probes=probes,
            eps_probe=eps_probe,
            probe_rank=probe_rank,
            **options,
        )
        self.sampling = Sampling.checked(directions, self.groups, self.members, baseline)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        return self.sampled_step(evaluate, "left")

    def direction(self, step: int, number: int = 0) -> Direction:
        """scale * U Z V^T on the matrices, dense noise on the rest."""
        parts = [p for ws in self.by_rank() for p in self._projected(ws, self.drawn_cores(ws, number, step))]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def _projected(self, weights: Sequence[Weight], cores: Sequence[Tensor]) -> Direction:
        left, right = (Factor.stored(self.stored(weights, side)) for side in ("left", "right"))
        return self.low_rank(weights, left, right, cores)
