"""P-GAP (arXiv 2510.18228): perturbations in the subspace of an estimated gradient, aligned with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .. import checks, ops
from ..directions import Direction, Factor, Weight
from ..noise import Role
from ..subspace import Basis
from .base import Evaluation, Params
from .gradient_subspace import GradientSubspaceOptimizer
from .options import at_least_one, positive
from .sampling import Sampling


class PGAP(GradientSubspaceOptimizer):
    """Projected gradient-aligned perturbations.

    Every ``window`` steps, h two-sided probes along dense noise Q_j on all weights estimate each matrix's gradient,
    G = (1/h) sum_j rho_j Q_j, whose truncated SVD gives U, S, V. Every step draws Z (r x r), shifts it along S so that
    <S, Z> = xi sqrt(delta) |S|, and takes a two-sided step along  D = scale * U Z V^T:

        rho = (L(W + eps D) - L(W - eps D)) / (2 eps),   W <- (1 - lr wd) W - lr rho D.

    Tensors that are not matrices take dense noise as their D. A step of n directions has on average 2n + 2h/window
    forwards and, in place, 2n + 1 + (2h + 1)/window weight passes; folded with a window, (2h + 1)/window. Probes are
    not stored, and G is assembled for one matrix at a time. State: U, S and V of each matrix, (m + n + 1) r floats.

    Args:
        params: a model, named parameters or param groups.
        lr, eps, weight_decay: as in ``MeZO``.
        rank: r, of the subspaces, per param group; a matrix too small for it, such as a LoRA factor, takes its
            shorter side.
        window: steps between refreshes of the subspaces; the first step refreshes.
        probes: h, two-sided probes per refresh.
        delta: alignment strength, per param group, >= 0; 1 keeps the estimator unbiased within the subspace, with
            xi="per_matrix"; 0 removes the aligned part.
        delta_steps: if given, delta falls linearly to 0 over this many steps.
        xi: sign of the alignment, drawn in every step for each matrix ("per_matrix") or once for all ("global"), or
            always +1 ("fixed", not with baseline="loo": differences from each other cancel what all directions share).
        scale: "subzero": sqrt(m n)/r, which gives D the norm of dense noise, so that MeZO's eps and lr carry over;
            "paper": 1.
        exclude: names (fnmatch patterns, e.g. "*embed*") of matrices that take dense noise instead.
        eps_probe: smoothing radius of the probes; by default eps, or 1e-3 with scale="paper".
        eps_dense: eps of tensors that take dense noise, in all param groups; by default the group's.
        lr_dense: lr of tensors that take dense noise, by default the group's. It counts as a ratio to ``lr``, so
            schedules and groups with their own lr scale it; their decay still follows lr.
        probe_rank: if given, probes are low-rank, on the matrices alone, and each group of examples (``groups=``) has
            its own: probes * groups directions for the same forwards.
        directions: n, directions (cores Z) per step and group of examples.
        baseline: as in ``MeZO``.
        **options: model, seed, tensor_ids, on_nonfinite, mode and its options, of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "PGAP"
    plans_ahead: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        window: int = 100,
        probes: int = 10,
        delta: float = 2.0,
        delta_steps: int | None = None,
        xi: str = "per_matrix",
        scale: str = "subzero",
        exclude: Sequence[str] = (),
        eps_probe: float | None = None,
        eps_dense: float | None = None,
        lr_dense: float | None = None,
        probe_rank: int | None = None,
        directions: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank, "delta": delta}
        super().__init__(
            params,
            defaults,
            window=window,
            scale=scale,
            exclude=exclude,
            probes=probes,
            eps_probe=eps_probe,
            probe_rank=probe_rank,
            **options,
        )
        self.sampling = Sampling.checked(directions, self.groups, self.members, baseline)
        self.delta_steps = None if delta_steps is None else at_least_one("delta_steps", delta_steps)
        self.xi = checks.choice("xi", xi, ("per_matrix", "global", "fixed"))
        if self.xi == "fixed" and baseline == "loo":
            raise ValueError(
                "baseline: got 'loo' with xi='fixed', where what is aligned is the same in all directions and cancels; "
                "accepted: 'antithetic' or 'clean', or another xi"
            )
        self.eps_dense = None if eps_dense is None else positive("eps_dense", eps_dense)
        if lr_dense is not None:
            self.dense_lr_ratio = positive("lr_dense", lr_dense, zero=True) / positive("lr", lr)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        positive("delta", group["delta"], zero=True)

    @property
    def bases(self) -> dict[str, Basis]:
        """U, S and V of the matrices that have had a refresh, by name."""
        states = ((w.name, self.state[w.tensor]) for w in self.matrices())
        return {name: Basis(*(state[f] for f in Basis._fields)) for name, state in states if "left" in state}

    # ---- the step -----------------------------------------------------------------------------------------------

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        return self.sampled_step(evaluate, "left")

    def direction(self, step: int, number: int = 0) -> Direction:
        """scale * U Z V^T on the matrices, dense noise on the rest."""
        parts = [part for weights in self.by_rank() for part in self._aligned(weights, step, number)]
        return Direction([*parts, *self.noise(self.key(Role.DENSE, number, step), self.dense_buckets())])

    def _aligned(self, weights: list[Weight], step: int, number: int) -> Direction:
        cores: dict[int, Any] = {}
        deltas = self.amounts("delta")
        for delta in dict.fromkeys(deltas[w.index] for w in weights):  # one op call for each delta
            same = [w for w in weights if deltas[w.index] == delta]
            cores |= zip(
                map(id, same), self._cores(same, positive("delta", delta, zero=True), step, number), strict=True
            )
        left, right = (Factor.stored(self.stored(weights, side)) for side in ("left", "right"))
        return self.low_rank(weights, left, right, [cores[id(w)] for w in weights])

    def _cores(self, weights: list[Weight], delta: float, step: int, number: int) -> list:
        if self.delta_steps is not None:
            delta *= max(0.0, 1.0 - step / self.delta_steps)
        return ops.aligned_core(
            self.stored(weights, "singular_values"),
            self.key(Role.CORE, number, step),
            tensor_ids=[w.id for w in weights],
            delta=delta,
            sign_key=None if self.xi == "fixed" else self.key(Role.SIGN, number, step),
            sign_ids=[0] * len(weights) if self.xi == "global" else None,
        )

    def radius(self) -> list[float]:
        radius, lowrank = super().radius(), {*self.lowrank_indices()}
        if self.eps_dense is None:
            return radius
        return [eps if i in lowrank else self.eps_dense for i, eps in enumerate(radius)]
