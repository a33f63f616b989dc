"""AGZO (2601.17261): perturbations in the row space of a layer's inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import noise, ops
from ..directions import Direction, Factor, Part, Weight, bucket
from ..noise import Role
from ..perturbation import CONV1D, LINEAR, kind_of
from ..subspace import orthonormal
from .base import Evaluation, Params
from .lowrank import LowRankOptimizer
from .options import at_least_one


class AGZO(LowRankOptimizer):
    """Activation-guided zeroth-order steps.

    The forward at W shows H (n, tokens), the inputs of every linear layer. Its weight moves along R A^T:

        Omega (tokens, r) ~ N(0, 1),  A <- qr(H Omega),  K times A <- qr(H (H^T A));  R (m, r) ~ N(0, 1) in every step
        g = (L(W + eps R A^T) - L(W)) / eps,   W <- (1 - lr wd) W - lr g R A^T

    Everything else takes dense noise, layers whose forward is not that of ``nn.Linear`` or Conv1D included; a head tied
    with an embedding is a linear layer. 2 forwards, one of which shows H; where layers are compiled 3, as that one runs
    uncompiled and its loss may be rounded otherwise (a compiled loss behind layers that are not goes unnoticed). 2
    weight passes in place; R A^T is not scaled. ``sides=2``, the form of independent reproductions, takes the two-sided
    g: 3 forwards and passes. State: A, n r floats of a matrix.

    H has a column for every token of the batch, padding too, except for those that are not finite (a row that is all
    padding may be NaN); of a layer that is called more than once, those of its first call. It is looked at while the
    layer runs and not kept; A is computed in float32, under autocast too. Signs of the QR are fixed, so that runs
    repeat. One-sided differences lose their digits in 16-bit losses: reduce them in float32. Several processes would
    each have the basis of their own batch: the integrations refuse that.

    Args:
        params, lr, weight_decay: as in ``MeZO``; the model, or named parameters and ``model=``.
        eps: smoothing radius (the paper's mu), per param group.
        rank: r, of the basis of a layer's inputs, per param group.
        iterations: K, power iterations that make the basis.
        sides: 1: one-sided, L(W + eps D) against L(W); 2: two-sided, plus the forward at W that shows H.
        basis_interval: steps between new bases.
        exclude: names of linear layers' weights that take dense noise instead.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "AGZO"
    sees_inputs: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 1,
        iterations: int = 3,
        sides: int = 1,
        basis_interval: int = 1,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, defaults, window=basis_interval, exclude=exclude, **options)
        if self.model is None:
            raise ValueError("model: got None; accepted: the model whose layers' inputs AGZO looks at")
        if sides not in (1, 2):
            raise ValueError(f"sides: got {sides!r}; accepted: 1 or 2")
        self.iterations, self.sides = at_least_one("iterations", iterations), sides
        self._clean: float | None = None

    def may_be_lowrank(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights of linear layers, transformers' Conv1D included."""
        found = super().may_be_lowrank(weights)
        if self.model is None:
            return []
        kinds = {
            noise.canonical_name(f"{name}.weight".lstrip(".")): kind_of(module)
            for name, module in self.model.named_modules()
        }
        self._input_side: dict[int, int] = {}
        for w in found:
            for name in set(w.names) - set(w.read_by):  # another module reads these
                if kinds.get(name) in (LINEAR, CONV1D):
                    self._input_side[w.index] = 0 if kinds[name] == CONV1D else 1
        return [w for w in found if w.index in self._input_side]

    def side_of(self, weight: Weight) -> str:
        """Which factor A is: a linear layer has y = x W^T, a Conv1D y = x W."""
        return ("left", "right")[self._input_side[weight.index]]

    def lacks(self, weight: Weight, name: str) -> bool:
        """Whether a matrix has no A, whatever side that is on."""
        return super().lacks(weight, self.side_of(weight))

    def by_rank(self) -> list[list[Weight]]:
        return [same for weights in super().by_rank() for same in bucket(weights, also=self.side_of)]

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self._clean = None
        self.refresh_if_due("A", evaluate)
        direction = self.planned(self.steps)
        if self.sides == 2:
            plus, minus = evaluate.two_sided(direction)
            amount, loss = (plus - minus) / 2, (plus + minus) / 2
        else:
            # At other times than a refresh, and where its loss is that of another program.
            clean = evaluate.loss() if self._clean is None else self._clean
            loss = evaluate.loss(direction)
            amount = loss - clean
            evaluate.slopes.append(amount / self.radius()[0])
        self.apply_update([(direction, self.descent(amount))], flush=self.refreshes_at(self.steps + 1))
        return loss

    def direction(self, step: int, number: int = 0) -> Direction:
        """R A^T on the linear layers, dense noise on the rest."""
        parts: list[Part] = []
        for weights in self.by_rank():
            side = self.side_of(weights[0])
            drawn = Factor.drawn(self.key(Role.LEFT, number, step), self.rank_of(weights[0]))
            basis = Factor.stored(self.stored(weights, side))
            parts += self.low_rank(weights, *((drawn, basis) if side == "right" else (basis, drawn)))
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def refresh(self, evaluate: Evaluation) -> None:
        """A of every linear layer, from a forward at W."""
        missing = {w.index for w in self.matrices()}
        bases: list[tuple[Weight, Tensor]] = []

        def see(weight: Weight, x: Tensor) -> None:
            if weight.index in missing and x.is_floating_point():  # not the indices of a tied embedding
                missing.remove(weight.index)
                size = weight.tensor.shape[self._input_side[weight.index]]
                x = x[: len(x) // self.members] if len(x) % self.members == 0 else x  # the copies are the same rows
                rows = x.new_empty(size, size) if x.is_meta else x.reshape(-1, size)  # run dry, no layer is called
                bases.append((weight, self.basis(weight, rows.float())))

        self.merge()
        self._clean = evaluate.observed(see)
        for weight, a in bases:
            self.store(weight, **{self.side_of(weight): a})
        lost = [w.name for w in self.matrices() if w.index in missing and self.lacks(w, "A")]
        if lost:
            raise RuntimeError(
                f"closure: the layer of {lost[0]!r} was not called, so its inputs are not known; freeze its weight, or "
                f"pass exclude=[{lost[0]!r}]"
            )

    def basis(self, weight: Weight, rows: Tensor) -> Tensor:
        """A (n, r) of inputs (tokens, n); those that are not finite do not count."""
        key = self.key(Role.RANGE_FINDER)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)
        rows = torch.ldexp(rows, -torch.frexp(rows.abs().amax()).exponent)  # A is the same, and no square overflows
        omega = ops.draw((len(rows), self.rank_of(weight)), key, weight.id, device=rows.device)
        # This runs inside the caller's forward. (On the meta device, where costs are counted, there is no autocast.)
        with contextlib.nullcontext() if rows.is_meta else torch.autocast(rows.device.type, enabled=False):
            a = orthonormal(rows.T @ omega)
            for _ in range(self.iterations):
                a = orthonormal(rows.T @ (rows @ a))
        return a
