"""LOREN (2511.07971): noise damped along one direction of each matrix, leave-one-out baseline, momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..directions import Amounts, Direction, Factor, LowRank, Pass, Term, Weight, bucket
from ..noise import Role
from ..perturbation import StateRule
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import fraction, positive


class LOREN(ZOOptimizer):
    """Zeroth-order steps with a low-rank curvature.

    Each matrix (m, n) has a vector a (n,), at first N(0, 1); a~ is a in every row, s = m |a|^2, f_k the K losses:

        z_k = u_k - a~ <a~, u_k> (sqrt(rho) + sqrt(rho + s)) / (s sqrt(rho + s)),   u_k ~ N(0, 1)
        w_k = (L(W + eps z_k) - mean f) / ((K - 1) eps)
        momentum="per_step":   M <- beta M + sum_k w_k z_k,   W <- (1 - lr wd) W - lr M
        momentum="per_query":  for every k in turn  M <- beta M + w_k z_k,   W <- W - lr M

    and with curvature="learned" a <- (1 - lr_a wd) a - lr_a sum_k grad_k after that (``_move``). Weights that are not
    matrices take u_k itself, those of one dimension without momentum. K forwards; in place 2K + 4 weight passes, one of
    them over M for its rank-one term. "per_query" has two passes over M more. State: a, and M of the weight's size.

    The published code (hseung88/loren) takes "per_query" steps, moves a between the queries of a step, by lr_a = 1e-3
    eps^2, with which it never moves in float32, gives vectors a curvature too, and decays every weight.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``; no decay with "per_query".
        probes: K, one-sided directions per step, 2 or more.
        damping: rho, what is added to the curvature a a^T.
        beta: decay rate of the momentum.
        momentum: "per_step": a step of momentum with the sum of all estimates; "per_query": one for each direction in
            turn.
        curvature: whether the curvature's vector a stays as drawn, "frozen", or is "learned".
        lr_a: learning rate of a, if it is learned.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "LOREN"
    takes_residual: ClassVar[bool] = False
    elementwise_state: ClassVar[tuple[str, ...]] = ("momentum",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        probes: int = 6,
        damping: float = 0.1,
        beta: float = 0.9,
        momentum: str = "per_step",
        curvature: str = "frozen",
        lr_a: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.momentum = checks.choice("momentum", momentum, ("per_step", "per_query"))
        self.learns = checks.choice("curvature", curvature, ("frozen", "learned")) == "learned"
        self.damping, self.lr_a = positive("damping", damping), positive("lr_a", lr_a)
        self.beta = fraction("beta", beta)
        if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
            raise ValueError(f"probes: got {probes!r}; accepted: an integer, 2 or more")
        self.probes = probes
        self.check_schedule()

    def check_schedule(self) -> None:
        super().check_schedule()
        if self.momentum == "per_query" and any(group["weight_decay"] for group in self.param_groups):
            raise ValueError("weight_decay: got some with momentum='per_query'; accepted: 0, or momentum='per_step'")

    def matrices(self) -> list[Weight]:
        """The weights with a curvature."""
        return [w for w in self.weights() if w.tensor.dim() == 2 and w.tensor.numel()]

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        matrices, keys = self.matrices(), [self.key(Role.DENSE, k) for k in range(self.probes)]
        for w in matrices:
            if "a" not in self.state[w.tensor]:
                size, key = w.tensor.shape[1], self.key(Role.RIGHT, step=0)
                self.state[w.tensor]["a"] = ops.draw(size, key, w.id, device=w.tensor.device)
        line, shrink = self._rank_one(matrices), self._shrink(matrices)
        dots = [self._dots(matrices, k) for k in range(self.probes)]
        amounts = [{i: -shrink[i] * dot for i, dot in row.items()} for row in dots]
        z = [Direction([*self.noise(key), *line.scaled(row)]) for key, row in zip(keys, amounts, strict=True)]
        losses = evaluate.population([(d, self.radius()) for d in z])
        centred = scores.leave_one_out(losses)
        slopes = [[c / eps for eps in self.radius()] for c in centred]
        evaluate.slopes += [self.probes * c / self.radius()[0] for c in centred]
        evaluate.clear()
        self._update(keys, line, amounts, slopes)
        if self.learns and not self.perturbation.dry:
            self._move(matrices, keys, dots, centred)
        return sum(losses) / len(losses)

    # ---- the direction of each matrix -------------------------------------------------------------------------------

    def _rank_one(self, matrices: Sequence[Weight]) -> Direction:
        """a~ of every matrix."""
        parts = []
        for same in bucket(matrices):
            ones = torch.ones(max(len(w.tensor) for w in same), 1, dtype=torch.float32, device=same[0].tensor.device)
            left = Factor.stored([ones[: len(w.tensor)] for w in same])
            right = Factor.stored([self.state[w.tensor]["a"][:, None] for w in same])
            parts.append(LowRank(same, left, right, [Term(None, [1.0] * len(same))]))
        return Direction(parts)

    def _squares(self, matrices: Sequence[Weight]) -> dict[int, float]:
        """s of every matrix."""
        squares = self.to_host(ops.squared_norms([self.state[w.tensor]["a"] for w in matrices])) if matrices else []
        return {w.index: len(w.tensor) * square for w, square in zip(matrices, squares, strict=True)}

    def _shrink(self, matrices: Sequence[Weight]) -> dict[int, float]:
        """(sqrt(rho) + sqrt(rho + s)) / (s sqrt(rho + s)): along a~ the factor is then -sqrt(rho / (rho + s))."""
        root = math.sqrt(self.damping)
        return {
            i: (root + math.sqrt(self.damping + s)) / (s * math.sqrt(self.damping + s)) if s else 0.0
            for i, s in self._squares(matrices).items()
        }

    def _dots(self, matrices: Sequence[Weight], number: int) -> dict[int, float]:
        """<a~, u_k> of every matrix."""
        found: dict[int, float] = {}
        key = self.key(Role.DENSE, number)
        for same in bucket(matrices):
            rows = [self.state[w.tensor]["a"].expand(w.tensor.shape) for w in same]
            slices = [w.span for w in same if w.span] or None
            dots = ops.seeded_dot(rows, key, tensor_ids=[w.id for w in same], slices=slices)
            found |= dict(zip((w.index for w in same), self.to_host(dots, 1.0 + number), strict=True))
        return found

    # ---- the update -------------------------------------------------------------------------------------------------

    def _update(
        self,
        keys: Sequence[int],
        line: Direction,
        amounts: Sequence[dict[int, float]],
        slopes: Sequence[list[float]],
    ) -> None:
        """W and M after the losses; z_k is u_k plus an amount of ``line``."""
        K, beta, rates = self.probes, self.beta, self.rates()
        moving = {w.index: w for w in self.weights() if w.tensor.dim() > 1 and beta}
        M = {i: self.moment(w) for i, w in moving.items()}
        # M <- decay M + sum of share w z by the rule, and its step; "per_query" is K such steps in one.
        decay, multiple, share = beta, 1.0, [1.0] * K
        if self.momentum == "per_query" and beta:
            decay, multiple = 1.0, sum(beta**j for j in range(1, K + 1))
            share = [(1 - beta ** (K - k)) / (1 - beta) / multiple for k in range(K)]
        terms: list[tuple[Direction, Amounts]] = []
        for key, slope, part in zip(keys, slopes, share, strict=True):
            own = [part * c if i in M else -lr * c for i, (c, lr) in enumerate(zip(slope, rates, strict=True))]
            terms.append((self.noise(key, bucket(self.weights(), also=lambda w: w.index in M)), own))
        sums = {
            i: sum(c * slope[i] * row[i] for c, slope, row in zip(share, slopes, amounts, strict=True))
            for part in line
            for i in part.indices
        }
        before: list[Pass] = []
        after: list[Pass] = []
        if beta:  # the rank-one term enters M ahead of the rule, which multiplies it by ``decay``
            before = self._passes(line, {i: c / decay for i, c in sums.items()}, M)
        else:
            terms.append((line, {i: -rates[i] * c for i, c in sums.items()}))
        if decay != beta:  # what M keeps of the K steps is less than their sum
            kept = [beta ** (K - 1 - k) - share[k] * beta**K for k in range(K)]
            rows = [[c * w for w in slope] for c, slope in zip(kept, slopes, strict=True)]
            noise = Direction.sum(
                [(self.noise(k, bucket(list(moving.values()))), r) for k, r in zip(keys, rows, strict=True)]
            )
            rest = {
                i: sum(c * slope[i] * row[i] for c, slope, row in zip(kept, slopes, amounts, strict=True)) for i in sums
            }
            after = self._passes(noise, [1.0] * len(self.weights()), M, 1 - beta**K) + self._passes(line, rest, M)
        rule = StateRule(
            lambda ws: ops.MomentumRule(lr=[multiple * rates[w.index] for w in ws], beta=decay),
            lambda ws: [[M[w.index] for w in ws]],
            M,
        )
        self.apply_update(terms, rule=rule if beta else None, before=before, after=after)
        for i, w in moving.items():
            self.state[w.tensor]["momentum"] = M[i]

    @staticmethod
    def _passes(direction: Direction, amounts: Amounts, M: dict[int, Tensor], decay: float = 0.0) -> list[Pass]:
        """M <- (1 - decay) M + amount * direction."""
        parts = [part.scaled(amounts) for part in direction]
        on_state = [part.select(range(len(part.weights)), [M[i] for i in part.indices]) for part in parts]
        return [Pass(part, [decay] * len(part.weights)) for part in on_state]

    def _move(
        self, matrices: Sequence[Weight], keys: list[int], dots: list[dict[int, float]], centred: list[float]
    ) -> None:
        """a <- (1 - lr_a wd) a - lr_a / sqrt(rho + s) sum_k c_k (<a~, u_k> 1^T U_k - m kappa (<a~, u_k>^2 - s) a).

        c_k is (f_k - mean f) / (K - 1) and kappa what ``_shrink`` gives; the sum over rows of -a~ cancels.
        """
        squares, kappa = self._squares(matrices), self._shrink(matrices)
        for w in matrices:
            (m, n), s, a = w.tensor.shape, squares[w.index], self.state[w.tensor]["a"]
            own = [row[w.index] for row in dots]
            rows = self.perturbation.workspace(m * n, w.tensor.device)[: m * n].view(m, n)
            draws = [(key, c * dot) for key, c, dot in zip(keys, centred, own, strict=True)]
            ops.assemble_gradient_([rows], draws, tensor_ids=[w.id], slices=[w.span] if w.span else None)
            along = sum(c * (dot**2 - s) for c, dot in zip(centred, own, strict=True))
            gradient = (rows.sum(0) - m * kappa[w.index] * along * a) / math.sqrt(self.damping + s)
            a.mul_(1 - self.lr_a * float(w.group["weight_decay"])).sub_(gradient, alpha=self.lr_a)
