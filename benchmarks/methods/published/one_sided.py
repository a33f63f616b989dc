"""Methods with several one-sided directions, each from the same weights: FZOO, LOREN, ZO-Muon, and PIZO's pool."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from pgap_kernels.finetune.baseline import Baseline, Closure, dense_noise

from .draws import Directions, normal


class OneSided(Baseline):
    """Losses at W + eps z for one seed after another; the weights are restored after each."""

    def _one_sided(self, closure: Closure, zo_seed: int) -> float:
        with self._timed("perturb"):
            self._perturb(zo_seed, 1)
        loss = self._forward(closure)
        with self._timed("perturb"):
            self._perturb(zo_seed, -1)
        return loss

    def _losses(self, closure: Closure, count: int) -> tuple[list[int], list[float]]:
        seeds = [self._draw_seed() for _ in range(count)]
        return seeds, [self._one_sided(closure, zo_seed) for zo_seed in seeds]


class FZOO(OneSided):
    """DKmiyan/FZOO: signs, and a step divided by the losses' standard deviation (of the population, as there)."""

    def __init__(self, model: torch.nn.Module, *, probes: int = 8, **options: Any) -> None:
        super().__init__(model, **options)
        self.probes = probes

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        seeds, losses = self._losses(closure, self.probes)
        clean = self._forward(closure)
        with self._timed("perturb"):
            deviation = statistics.pstdev(losses)
            for zo_seed, loss in zip(seeds, losses, strict=True):
                self._update(zo_seed, (loss - clean) / (self.probes * deviation))
        return clean

    def _directions(self, zo_seed: int) -> Directions:
        torch.manual_seed(zo_seed)
        for w in self.parameters.values():
            yield w, torch.randint(0, 2, w.shape, device=w.device).to(w.dtype) * 2 - 1


class LOREN(OneSided):
    """hseung88/loren: a step of momentum for each direction in turn, of noise damped along a vector of each matrix.

    That vector moves between the directions there, by less than float32 holds: here it stays.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        probes: int = 6,
        damping: float = 0.1,
        beta: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.probes, self.damping, self.beta = probes, damping, beta
        self.vector = {name: normal((w.shape[-1],), w) for name, w in self.parameters.items()}
        self.momentum = {name: torch.zeros_like(w) for name, w in self.parameters.items() if w.dim() > 1}

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        seeds, losses = self._losses(closure, self.probes)
        mean = statistics.fmean(losses)
        with self._timed("perturb"):
            for zo_seed, loss in zip(seeds, losses, strict=True):
                self._update(zo_seed, (loss - mean) / ((self.probes - 1) * self.eps))
        return mean

    def _directions(self, zo_seed: int) -> Directions:
        torch.manual_seed(zo_seed)
        for name, w in self.parameters.items():
            u = dense_noise(w)
            tiled = self.vector[name].expand_as(w).reshape(-1)
            s, root = tiled.dot(tiled), math.sqrt(self.damping)
            both = torch.sqrt(self.damping + s)
            yield w, u - (tiled * (tiled.dot(u.reshape(-1)) * (root + both) / (s * both))).view_as(w)

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        names = iter(self.parameters)
        for w, z in self._directions(zo_seed):
            moved, name = projected_gradient * z, next(names)
            if name in self.momentum:
                moved = self.momentum[name] = self.beta * self.momentum[name] + moved
            w.data = w.data - self.lr * moved


class ZOMuon(OneSided):
    """OPTML-Group/ZO-Muon, llm: P u_i multiplied out in every pass, all u_i stored, and an orthogonalised update.

    As there, every seed draws a P of its own in a step that changes it, and the update takes the last.
    """

    def __init__(
        self, model: torch.nn.Module, *, rank: int = 64, window: int = 100, directions: int = 4, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.rank, self.window, self.directions, self.steps = rank, window, directions, 0
        self.basis: dict[str, Tensor] = {}
        self.drawn: dict[int, dict[str, Tensor]] = {}  # by the seed: of matrices u_i, of all else z_i

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        self.drawn = {}
        seeds, losses = self._losses(closure, self.directions)
        clean = self._forward(closure)
        with self._timed("perturb"):
            for name, w in self.parameters.items():
                slopes = [(loss - clean) / self.eps for loss in losses]
                mean = sum(slope * self.drawn[seed][name] for slope, seed in zip(slopes, seeds, strict=True))
                mean = mean / self.directions
                if w.dim() == 2:
                    w.data = w.data - self.lr * (self.basis[name] @ _orthogonalised(mean))
                else:
                    w.data = w.data - 1e-7 * mean
        self.steps += 1
        return clean

    def _directions(self, zo_seed: int) -> Directions:
        torch.manual_seed(zo_seed)
        drawn = self.drawn.setdefault(zo_seed, {})
        for name, w in self.parameters.items():
            if w.dim() != 2:
                drawn[name] = dense_noise(w)
                yield w, drawn[name]
                continue
            if self.steps % self.window == 0:
                q, r = torch.linalg.qr(torch.randn((len(w), min(self.rank, len(w))), device=w.device))
                self.basis[name] = (q * r.diagonal().sign()).to(w.dtype)
            drawn[name] = normal((self.basis[name].shape[1], w.shape[1]), w)
            yield w, self.basis[name] @ drawn[name]


def _orthogonalised(matrix: Tensor) -> Tensor:
    """By five Newton-Schulz iterations, in the matrix's own type."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x
