"""MeZO and P-GAP in plain PyTorch: MeZO after its published code; P-GAP, whose code is not public, after its paper.
Noise comes from ``torch.normal``, one parameter at a time; elementwise ops are out of place.

These are the yardstick for the fused kernels, so they are deliberately not made faster. Both have
``step(closure) -> float`` and ``seconds`` like the optimizers of `pgap_kernels.optim`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Closure = Callable[[], torch.Tensor]
Basis = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Baseline:
    """What both methods share: the clock, a seed per step, and the two-sided estimate."""

    def __init__(self, model: torch.nn.Module, *, lr: float, eps: float, seed: int) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.lr = lr
        self.eps = eps
        self.seeds = torch.Generator().manual_seed(seed)
        self.seconds = {"forward": 0.0, "perturb": 0.0, "refresh": 0.0}

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """One step on one batch; returns the mean of the two losses. ``closure`` returns the loss of that batch."""
        zo_seed = self._draw_seed()
        with self._timed("perturb"):
            self._perturb(zo_seed, 1)
        first = self._forward(closure)
        with self._timed("perturb"):
            self._perturb(zo_seed, -2)
        second = self._forward(closure)
        with self._timed("perturb"):
            self._perturb(zo_seed, 1)
            self._update(zo_seed, (first - second) / (2 * self.eps))
        return (first + second) / 2

    def _directions(self, zo_seed: int) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Every parameter with its part of the direction; the same seed gives the same direction again."""
        torch.manual_seed(zo_seed)
        for parameter in self.parameters.values():
            yield parameter, dense_noise(parameter)

    def _perturb(self, zo_seed: int, scale: float) -> None:
        for parameter, z in self._directions(zo_seed):
            parameter.data = parameter.data + scale * z * self.eps

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        for parameter, z in self._directions(zo_seed):
            parameter.data = parameter.data - self.lr * (projected_gradient * z)

    def _draw_seed(self) -> int:
        return int(torch.randint(1_000_000_000, (), generator=self.seeds))

    def _forward(self, closure: Closure) -> float:
        with self._timed("forward"):
            return closure().item()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[part] += self._now() - start

    def _now(self) -> float:
        # Work on a GPU is queued, so wait for it before reading the clock.
        if any(parameter.is_cuda for parameter in self.parameters.values()):
            torch.cuda.synchronize()
        return time.perf_counter()


class BaselineMeZO(Baseline):
    """MeZO: a dense Gaussian direction over all trainable parameters, drawn anew from its seed in all four passes."""


class BaselinePGAP(Baseline):
    """P-GAP: every ``window`` steps a gradient estimate from dense probes and a full SVD per matrix; each step a core
    Z aligned with the singular values, multiplied out to U Z Vᵀ in all four passes. Tensors that are not matrices, or
    have no more than ``rank`` rows or columns, follow MeZO. Directions are scaled to the norm of dense noise.

    Args:
        full_refresh: with False a refresh is sampled instead: one probe, and one SVD per distinct shape whose factors
            serve all matrices of that shape. Its steps cost the same as usual; its losses are not those of P-GAP.

    Attributes:
        refresh_seconds: one full refresh; extrapolated from the sample (``probes`` × one probe, each SVD × the
            number of matrices of its shape) without ``full_refresh``. ``seconds["refresh"]`` is measured.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        eps: float,
        rank: int,
        window: int,
        probes: int,
        delta: float,
        seed: int,
        full_refresh: bool = True,
    ) -> None:
        super().__init__(model, lr=lr, eps=eps, seed=seed)
        self.rank = rank
        self.window = window
        self.probes = probes
        self.delta = delta
        self.full_refresh = full_refresh
        self.basis: dict[str, Basis] = {}
        self.steps = 0
        self.refresh_seconds = 0.0
        self.matrices = {name: p for name, p in self.parameters.items() if p.dim() == 2 and min(p.shape) > rank}

    def step(self, closure: Closure) -> float:
        if self.steps % self.window == 0:
            self._refresh(closure)
        self.steps += 1
        return super().step(closure)

    @torch.no_grad()
    def _refresh(self, closure: Closure) -> None:
        with self._timed("refresh"):
            probes = self.probes if self.full_refresh else 1
            start = self._now()
            gradient = self._probe(closure, probes)
            probing = (self._now() - start) * self.probes / probes
            self.refresh_seconds = probing + self._decompose(gradient)

    def _probe(self, closure: Closure, probes: int) -> dict[str, torch.Tensor]:
        """Mean over the probes of (difference of losses / 2 eps) times the probe, for all matrices at once."""
        gradient = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        for _ in range(probes):
            zo_seed = self._draw_seed()
            self._perturb_dense(zo_seed, 1)
            first = closure().item()
            self._perturb_dense(zo_seed, -2)
            second = closure().item()
            self._perturb_dense(zo_seed, 1)
            projected_gradient = (first - second) / (2 * self.eps)
            torch.manual_seed(zo_seed)
            for name, parameter in self.parameters.items():
                q = dense_noise(parameter)
                if name in gradient:
                    gradient[name] = gradient[name] + projected_gradient * q / probes
        return gradient

    def _perturb_dense(self, zo_seed: int, scale: float) -> None:
        torch.manual_seed(zo_seed)
        for parameter in self.parameters.values():
            parameter.data = parameter.data + scale * dense_noise(parameter) * self.eps

    def _decompose(self, gradient: dict[str, torch.Tensor]) -> float:
        """Set the basis of every matrix; returns the seconds that an SVD of every matrix takes."""
        if self.full_refresh:
            start = self._now()
            self.basis = {name: self._truncated_svd(g) for name, g in gradient.items()}
            return self._now() - start
        seconds = 0.0
        by_shape: dict[torch.Size, Basis] = {}
        count = Counter(g.shape for g in gradient.values())
        for g in gradient.values():
            if g.shape not in by_shape:
                start = self._now()
                by_shape[g.shape] = self._truncated_svd(g)
                seconds += (self._now() - start) * count[g.shape]
        self.basis = {name: by_shape[g.shape] for name, g in gradient.items()}
        return seconds

    def _truncated_svd(self, gradient: torch.Tensor) -> Basis:
        u, s, vt = torch.linalg.svd(gradient.float(), full_matrices=False)
        # Copies, so that the factors beyond the rank are freed.
        return u[:, : self.rank].clone(), s[: self.rank].clone(), vt[: self.rank].T.clone()

    def _directions(self, zo_seed: int) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        torch.manual_seed(zo_seed)
        for name, parameter in self.parameters.items():
            if name not in self.basis:
                yield parameter, dense_noise(parameter)
                continue
            u, s, v = self.basis[name]
            z = aligned_core(s, self.delta)
            norm = math.sqrt(parameter.numel()) / self.rank
            yield parameter, (norm * (u @ z @ v.T)).to(parameter.dtype)


#: By the name of the method.
BASELINES: dict[str, type[Baseline]] = {"mezo": BaselineMeZO, "pgap": BaselinePGAP}


def dense_noise(parameter: torch.Tensor) -> torch.Tensor:
    """Standard normal noise of the parameter's shape, type and device."""
    return torch.normal(mean=0, std=1, size=parameter.shape, device=parameter.device, dtype=parameter.dtype)


def aligned_core(singular_values: torch.Tensor, delta: float) -> torch.Tensor:
    """A Gaussian r×r core whose inner product with diag(S) is moved to ±sqrt(delta)·‖S‖, the sign drawn at random."""
    s = singular_values
    z = torch.normal(mean=0, std=1, size=(len(s), len(s)), device=s.device, dtype=s.dtype)
    sign = 2 * torch.randint(2, (), device=s.device) - 1
    excess = (s * z.diagonal()).sum() - sign * math.sqrt(delta) * s.norm()
    return z - excess / (s.norm() ** 2 + 1e-12) * torch.diag(s)
