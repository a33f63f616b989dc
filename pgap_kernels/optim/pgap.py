"""P-GAP (arXiv 2510.18228): perturbations in the subspace of an estimated gradient, aligned with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from .. import checks, ops
from ..noise import Role
from ..perturbation import Direction, Part, Subspace, Weight, buckets
from ..subspace import Basis, gradient_basis
from .base import Closure, Cost, Params, ZOOptimizer, at_least_one, positive

PAPER_PROBE_EPS = 1e-3


class PGAP(ZOOptimizer):
    """Projected gradient-aligned perturbations.

    Every ``window`` steps, h two-sided probes along dense noise Q_j on all weights estimate per matrix
    G = (1/h) sum_j rho_j Q_j, whose truncated SVD gives U, S, V. Every step draws Z (r x r), shifts it along S so that
    <S, Z> = xi sqrt(delta) |S|, and takes a two-sided step along  scale * U Z V^T:

        rho = (L(W + eps D) - L(W - eps D)) / (2 eps),   W <- (1 - lr wd) W - lr rho D.

    Tensors that are not matrices take dense noise in the same step. 2 + 2h/window forwards a step, and
    3 + (2h + 1)/window weight passes in place, (2h + 1)/window folded; the probes are not stored and G is assembled
    one matrix at a time.

    Args:
        params: a model, named parameters or param groups.
        lr, eps, weight_decay: as in ``MeZO``.
        rank: r; a matrix whose short side is smaller uses that (LoRA factors).
        window: steps between refreshes of the subspaces; the first step refreshes.
        probes: h, probes per refresh.
        delta: alignment strength, >= 0; 1 keeps the estimator unbiased within the subspace, 0 removes the aligned part.
        delta_steps: if given, delta falls linearly to 0 over so many steps.
        xi: sign of the alignment: "per_matrix" random, "global" random (one per step), or "fixed" +1.
        scale: "subzero": sqrt(m n)/r, the norm of dense noise, so that MeZO's eps and lr carry over; "paper": 1.
        exclude: names (fnmatch patterns, e.g. "*embed*") of matrices that take dense noise instead.
        eps_probe: smoothing radius of the probes; by default eps, or 1e-3 with scale="paper".
        eps_dense, lr_dense: of tensors that take dense noise, in every group; by default the group's eps and lr.
            lr_dense is kept as a ratio to ``lr``, so schedules and groups with their own lr scale it; decay goes by lr.
        **options: model, seed, tensor_ids, on_nonfinite, mode and its options, of ``ZOOptimizer``.
    """

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
        **options: Any,
    ) -> None:
        self.rank = at_least_one("rank", rank)
        if rank > ops.MAX_RANK:
            raise ValueError(f"rank: got {rank}; accepted: 1 to {ops.MAX_RANK}, the most the kernels take")
        self.window = at_least_one("window", window)
        self.probes = at_least_one("probes", probes)
        self.delta = positive("delta", delta, zero=True)
        self.delta_steps = None if delta_steps is None else at_least_one("delta_steps", delta_steps)
        self.xi = checks.choice("xi", xi, ("per_matrix", "global", "fixed"))
        self.scale = checks.choice("scale", scale, ("subzero", "paper"))
        if isinstance(exclude, str):
            raise TypeError(f"exclude: got the string {exclude!r}; accepted: a list of name patterns")
        self.exclude = tuple(exclude)
        self.eps_probe = None if eps_probe is None else positive("eps_probe", eps_probe)
        self.eps_dense = None if eps_dense is None else positive("eps_dense", eps_dense)
        self.bases: dict[str, Basis] = {}
        self._refresh_due = True
        # The ratio, not the value, is kept: a scheduler then moves both learning rates.
        self.dense_lr_ratio = 1.0
        if lr_dense is not None:
            self.dense_lr_ratio = positive("lr_dense", lr_dense, zero=True) / positive("lr", lr)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)

    def is_dense(self, weight: Weight) -> bool:
        """Whether a tensor takes dense noise: not a matrix, or excluded by name."""
        return weight.tensor.dim() != 2 or any(fnmatchcase(weight.name, pattern) for pattern in self.exclude)

    def matrices(self) -> list[Weight]:
        """The weights that are perturbed in a subspace."""
        return [w for w in self.weights() if not self.is_dense(w) and w.tensor.numel()]

    def rank_of(self, weight: Weight) -> int:
        """r of a matrix."""
        return min(self.rank, *weight.tensor.shape)

    def delta_at(self, step: int) -> float:
        """delta of a step under its schedule."""
        if self.delta_steps is None:
            return self.delta
        return self.delta * max(0.0, 1.0 - step / self.delta_steps)

    def subspace_names(self) -> list[str]:
        return [w.name for w in self.matrices()]

    def cost(self) -> Cost:
        matrices = self.matrices()
        share = sum(w.tensor.numel() for w in matrices) / sum(w.tensor.numel() for w in self.weights())
        passes = {
            "inplace": (2 + 1 / self.window if self.two_pass else 3) + (2 * self.probes + 1) / self.window,
            "scratch": 3 + 2 * self.probes / self.window,
            "folded": 3 * (1 - share) + (2 * self.probes + share) / self.window,
        }
        state = sum(4 * self.rank_of(w) * (sum(w.tensor.shape) + 1) for w in matrices)
        if self.mode != "inplace":  # a Z, and C
            state += sum(4 * self.rank_of(w) ** 2 for w in matrices) * (2 if self.mode == "folded" else 1)
        gradient = max((4 * w.tensor.numel() for w in matrices), default=0)
        scratch = self.perturbation.scratch_bytes
        # A refresh assembles G in the buffer of the forwards, where that is large enough.
        return Cost(passes[self.mode], state, scratch if scratch >= gradient else scratch + gradient)

    # ---- the step -----------------------------------------------------------------------------------------------

    def estimate_and_update(self, closure: Closure) -> float:
        if self._refreshes_at(self.steps) or any(w.name not in self.bases for w in self.matrices()):
            self._refresh_due = True
        if self._refresh_due:
            with self.timed("refresh"):
                self.refresh(closure)
            self._refresh_due = False
        with self.timed("perturb"):
            (direction,) = self.plan(self.steps)
        plus, minus = self.two_sided(direction, closure)
        self.land([(direction, self._step(plus - minus))], closing=self._refreshes_at(self.steps + 1))
        return (plus + minus) / 2

    def _refreshes_at(self, step: int) -> bool:
        return step % self.window == 0

    def directions(self, step: int) -> list[Direction]:
        """scale * U Z V^T on the matrices, dense noise on the rest."""
        parts: list[Part] = []
        sign_key = None if self.xi == "fixed" else self.key(Role.SIGN, step=step)
        for bucket in buckets(self.matrices(), also=self.rank_of):
            ids = [w.id for w in bucket]
            bases = [self.bases[w.name] for w in bucket]
            cores = ops.aligned_core(
                [b.singular_values for b in bases],
                self.key(Role.CORE, step=step),
                tensor_ids=ids,
                delta=self.delta_at(step),
                sign_key=sign_key,
                sign_ids=[0] * len(ids) if self.xi == "global" else None,
            )
            left, right = [b.left for b in bases], [b.right for b in bases]
            parts.append(Subspace(bucket, left, right, cores, [self._scale(w) for w in bucket]))
        dense = [w for w in self.weights() if self.is_dense(w)]
        return [[*parts, *self.dense(self.key(Role.DENSE, step=step), dense)]]

    def _scale(self, weight: Weight) -> float:
        return math.sqrt(weight.tensor.numel()) / self.rank_of(weight) if self.scale == "subzero" else 1.0

    def radius(self, weight: Weight) -> float:
        if self.eps_dense is not None and self.is_dense(weight):
            return self.eps_dense
        return super().radius(weight)

    def _probe_eps(self, weight: Weight) -> float:
        if self.eps_probe is not None:
            return self.eps_probe
        return super().radius(weight) if self.scale == "subzero" else PAPER_PROBE_EPS

    def _step(self, difference: float):
        def step(weight: Weight) -> float:
            ratio = self.dense_lr_ratio if self.is_dense(weight) else 1.0
            return -ratio * weight.group["lr"] * difference / (2 * self.radius(weight))

        return step

    # ---- the refresh --------------------------------------------------------------------------------------------

    def refresh(self, closure: Closure) -> None:
        """New U, S, V of every matrix from h probes on this step's minibatch; the weights end as they began."""
        keys = [self.key(Role.PROBE, probe) for probe in range(self.probes)]
        differences = []
        for key in keys:
            plus, minus = self.two_sided(self.dense(key), closure, self._probe_eps)
            differences.append(plus - minus)
        self.stand([], self._probe_eps)
        self.merge()  # what a window has gathered belongs to its own subspaces
        range_key = self.key(Role.RANGE_FINDER)
        for device in dict.fromkeys(w.tensor.device for w in self.matrices()):
            matrices = [w for w in self.matrices() if w.tensor.device == device]
            scratch = self.perturbation.spare(max(w.tensor.numel() for w in matrices), device)
            for w in matrices:
                norm = 2 * self._probe_eps(w) * self.probes
                draws = [(key, difference / norm) for key, difference in zip(keys, differences, strict=True)]
                rank, shape = self.rank_of(w), w.tensor.shape
                self._keep(
                    w.name,
                    gradient_basis(shape, draws, rank, tensor_id=w.id, range_key=range_key, scratch=scratch),
                )
        self._ahead = None

    def _keep(self, name: str, basis: Basis) -> None:
        """A matrix's new basis, in the memory of the one before: captured forwards read it there."""
        before = self.bases.get(name)
        if before is None or before.left.shape != basis.left.shape:
            self.bases[name] = basis
            return
        for old, new in zip(before, basis, strict=True):
            old.copy_(new)

    # ---- state --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return {"bases": {name: tuple(basis) for name, basis in self.bases.items()}, "refresh_due": self._refresh_due}

    def check_method_state(self, state: dict[str, Any]) -> None:
        if not state["bases"]:
            return
        own = {w.name: self.rank_of(w) for w in self.matrices()}
        saved = {name: len(singular_values) for name, (_, singular_values, _) in state["bases"].items()}
        wrong = sorted(set(own.items()) ^ set(saved.items()))
        if wrong:
            name = wrong[0][0]
            raise ValueError(
                f"state_dict: got rank {saved.get(name)} for {name!r} (None: no subspace); accepted: {own.get(name)}, "
                "as in this optimizer"
            )

    def load_method_state(self, state: dict[str, Any]) -> None:
        devices = {w.name: w.tensor.device for w in self.matrices()}
        self.bases = {name: basis for name, basis in self.bases.items() if name in state["bases"]}
        for name, basis in state["bases"].items():
            self._keep(name, Basis(*(t.to(devices[name], copy=True) for t in basis)))
        self._refresh_due = state["refresh_due"]
