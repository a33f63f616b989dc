"""SubZero (2410.08989): perturbations in a random orthonormal subspace, new every so many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..directions import Direction, Factor, LowRank, Term, Weight, bucket
from ..noise import Role
from ..subspace import orthonormal
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import patterns
from .sampling import Sampling


class SubZero(LowRankOptimizer):
    """Random-subspace zeroth-order steps.

        U = qr(Gaussian, m x r),  V = qr(Gaussian, n x r)            every ``window`` steps
        D = sqrt(m n)/r U Z V^T,  Z (r, r) ~ N(0, 1)                 dense noise on the rest
        rho = (L(W + eps D) - L(W - eps D)) / (2 eps),   W <- (1 - lr wd) W - lr rho D

    The scale is in the code and not in the paper's equations; it gives D the norm of dense noise. 2n forwards for n
    directions; 2n + 1 weight passes in place, 1/window folded with a window. State: U and V, (m + n) r floats of a
    matrix.

    The published code does not correct the signs of QR, so its bases are not uniformly distributed; here they are. Its
    tensors of LoRA, prefix and prompt tuning are taken in their most nearly square factorisation: ``reshape``.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``; the method has no decay.
        rank: r, of the subspaces, per param group; a matrix too small for it takes its shorter side. One of a single
            row or column takes dense noise, as in the code: in a fixed subspace it would only move along a line.
        window: steps between new U and V.
        scale: as in ``PGAP``.
        reshape: names of matrices that are viewed as nearly square: 8 x 2560 as 128 x 160. They cannot be folded.
        exclude: names of matrices that take dense noise instead.
        directions: as in ``PGAP``.
        baseline: as in ``MeZO``; "clean" is the published code's ``one_side``.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "SubZero"
    plans_ahead: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 64,
        window: int = 1000,
        scale: str = "subzero",
        reshape: Sequence[str] = (),
        exclude: Sequence[str] = (),
        directions: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        self.reshape: tuple[str, ...] = ()
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=window, scale=scale, exclude=exclude, **options)
        self.reshape = patterns("reshape", reshape, self._known_names())
        self.sampling = self.sampling_of(directions, baseline)

    def sampling_of(self, directions: int, baseline: str) -> Sampling:
        """How a step tries its directions; checks these options."""
        return Sampling.checked(directions, self.groups, self.members, baseline)

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def shape_of(self, weight: Weight) -> tuple[int, int]:
        """Rows and columns of a matrix, as it is viewed."""
        if any(map(weight.matches, self.reshape)):
            return nearly_square(weight.tensor.numel())
        return super().shape_of(weight)

    def may_be_lowrank(self, weights: Sequence[Weight]) -> list[Weight]:
        """Matrices of more than one row and column, as they are viewed."""
        return [w for w in super().may_be_lowrank(weights) if min(self.shape_of(w)) > 1]

    def by_rank(self) -> list[list[Weight]]:
        viewed = {w.index for w in self.matrices() if any(map(w.matches, self.reshape))}
        return [same for ws in super().by_rank() for same in bucket(ws, also=lambda w: w.index in viewed)]

    # ---- the step ---------------------------------------------------------------------------------------------------

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        return self.sampled_step(evaluate, "left")

    def direction(self, step: int, number: int = 0) -> Direction:
        """scale * U Z V^T on the matrices, dense noise on the rest."""
        parts = [self._projected(ws, self.drawn_cores(ws, number, step)) for ws in self.by_rank()]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def _projected(self, weights: Sequence[Weight], cores: Sequence[Tensor]) -> LowRank:
        left, right = (Factor.stored(self.stored(weights, side)) for side in ("left", "right"))
        shapes = [self.shape_of(w) for w in weights] if self.reshape else None
        return LowRank(weights, left, right, [Term(cores, [self.scale_of(w) for w in weights])], shapes)

    def refresh(self, evaluate: Evaluation) -> None:
        """New U and V of every matrix."""
        self.merge()  # what a window has gathered belongs to the old ones
        for w in self.matrices():
            rank, shape = self.rank_of(w), self.shape_of(w)
            sides = zip(shape, (Role.LEFT, Role.RIGHT), strict=True)
            left, right = (self._basis(w, (rows, rank), self.key(role)) for rows, role in sides)
            self.store(w, left=left, right=right)

    def _basis(self, weight: Weight, shape: tuple[int, int], key: int) -> Tensor:
        return orthonormal(ops.draw(shape, key, weight.id, device=weight.tensor.device))


def nearly_square(numel: int) -> tuple[int, int]:
    """Rows <= columns of a matrix with so many elements, with the smallest difference."""
    rows = next(d for d in range(math.isqrt(numel), 0, -1) if numel % d == 0)
    return rows, numel // rows
