"""ZO-Muon (2602.17155): steps of equal size in every direction of a random subspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..directions import Direction, Factor, Part, Weight
from ..noise import Role
from ..subspace import orthonormal
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import at_least_one, positive

UPDATES = ("newton-schulz", "sgd")
# Of Muon's quintic iteration (K. Jordan et al., 2024): five steps bring singular values to between 0.7 and 1.2.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class ZOMuon(LowRankOptimizer):
    """Zeroth-order steps with an orthogonalised update.

        P (m, r) orthonormal, new every ``window`` steps;   u_i (r, n) ~ N(0, 1),  i = 1..N
        M = 1/N sum_i (L(W + eps P u_i) - L(W)) / eps u_i,   O = (M M^T)^(-1/2) M by five Newton-Schulz iterations
        W <- (1 - lr wd) W - lr P O

    Everything that is not a matrix takes dense noise, with a learning rate of its own. N + 1 forwards; N + 1 weight
    passes in place. The update is what the estimate is reshaped to. State: P, m r floats of a matrix: the published
    code stores all u_i as well, and in steps that change P evaluates with another P than it applies.

    Args:
        params, eps, weight_decay: as in ``MeZO``.
        lr: learning rate of the matrices, per param group; not 0, as ``lr_dense`` is a ratio to it.
        rank: r, of the perturbation, per param group; at most the shorter side of a matrix, though the code's P may
            have as many columns as rows.
        window: steps between new P.
        directions: N, directions per step.
        update: the matrices move by P M made orthogonal ("newton-schulz"), or by P M itself ("sgd").
        lr_dense: lr of tensors that take dense noise, as a ratio to ``lr`` of the default group; the code's is 1e-7.
        exclude: names of matrices that take dense noise instead.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "ZOMuon"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 64,
        window: int = 100,
        directions: int = 4,
        update: str = "newton-schulz",
        lr_dense: float = 1e-7,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=window, exclude=exclude, **options)
        self.directions = at_least_one("directions", directions)
        self.update = checks.choice("update", update, UPDATES)
        self.dense_lr_ratio = positive("lr_dense", lr_dense, zero=True) / positive("lr", lr)

    def refresh(self, evaluate: Evaluation) -> None:
        """New P of every matrix."""
        self.merge()
        key = self.key(Role.LEFT)
        for w in self.matrices():
            shape = (w.tensor.shape[0], self.rank_of(w))
            self.store(w, left=orthonormal(ops.draw(shape, key, w.id, device=w.tensor.device)))

    def direction(self, step: int, number: int = 0) -> Direction:
        """P u_i on the matrices, dense noise on the rest."""
        parts = [p for ws in self.by_rank() for p in self.low_rank(ws, self._basis(ws), self._drawn(ws, step, number))]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def _basis(self, weights: Sequence[Weight]) -> Factor:
        return Factor.stored(self.stored(weights, "left"))

    def _drawn(self, weights: Sequence[Weight], step: int, number: int) -> Factor:
        return Factor.drawn(self.key(Role.RIGHT, number, step), self.rank_of(weights[0]))

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self.refresh_if_due("left", evaluate)
        tried = [self.direction(self.steps, number) for number in range(self.directions)]
        clean, *losses = evaluate.population([(Direction(), self.radius()), *((d, self.radius()) for d in tried)])
        shares = [(loss - clean) / self.directions for loss in losses]
        evaluate.slopes += [(loss - clean) / self.radius()[0] for loss in losses]
        steps = self._steps(shares)
        dense = [
            (self.noise(self.key(Role.DENSE, number), self.dense_buckets()), self.descent(share))
            for number, share in enumerate(shares)
        ]
        self.apply_update(
            [(steps, [-lr for lr in self.rates()]), *dense], flush=True
        )  # O is new in every step: nothing gathers
        return sum(losses) / len(losses)

    def _steps(self, shares: Sequence[float]) -> Direction:
        """P O of every matrix."""
        radius = self.radius()
        parts: list[Part] = []
        for weights in self.by_rank():
            sums = [
                torch.zeros(w.tensor.shape[1], self.rank_of(w), dtype=torch.float32, device=w.tensor.device)
                for w in weights
            ]
            for number, share in enumerate(shares):
                drawn = self._drawn(weights, self.steps, number).materialised(weights, 1)
                torch._foreach_add_(sums, torch._foreach_mul(drawn, [share / radius[w.index] for w in weights]))
            if self.update == "newton-schulz":
                sums = orthogonalised(sums)
            parts += self.low_rank(weights, self._basis(weights), Factor.stored(sums))
        return Direction(parts)


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices with their singular values brought near 1, those of one shape together.

    X = M / (|M| + 1e-7);   five times:  A = X X^T,  X <- a X + (b A + c A A) X           (wide; else transposed)
    """
    a, b, c = _COEFFICIENTS
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(m.shape for m in matrices):
        numbers = [i for i, m in enumerate(matrices) if m.shape == shape]
        x = torch.stack([matrices[i] for i in numbers])
        tall = shape[0] > shape[1]
        x = x.mT if tall else x
        x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        found |= zip(numbers, (x.mT if tall else x).unbind(), strict=True)
    return [found[i].contiguous() for i in range(len(matrices))]
