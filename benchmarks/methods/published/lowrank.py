"""LOZO, LOZO-M and SubZero as the published code does them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pgap_kernels.finetune.baseline import Baseline, Closure, dense_noise

from .draws import Directions, normal


class LOZO(Baseline):
    """optsuite/LOZO, large_models: u v^T multiplied out in every pass.

    As there, the seed's stream yields v too in the perturbations of a step that changes v, but not in its update: that
    goes along another u than was evaluated.
    """

    def __init__(self, model: torch.nn.Module, *, rank: int = 2, window: int = 50, **options: Any) -> None:
        super().__init__(model, **options)
        self.rank, self.window, self.steps = rank, window, 0
        self.right: dict[str, Tensor] = {}

    def step(self, closure: Closure) -> float:
        loss = super().step(closure)
        self.steps += 1
        return loss

    def _directions(self, zo_seed: int, update: bool = False) -> Directions:
        torch.manual_seed(zo_seed)
        for name, w in self.parameters.items():
            if w.dim() < 2:
                yield w, dense_noise(w)
                continue
            if self.steps % self.window == 0 and not update:
                self.right[name] = normal((w.shape[1], self.rank), w)
            yield w, normal((len(w), self.rank), w) @ self.right[name].T

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        for w, direction in self._directions(zo_seed, update=True):
            w.data = w.data - self.lr * (projected_gradient * direction)


class LOZOM(LOZO):
    """optsuite/LOZO, medium_models: LOZO with a moment of u, and dense moments of what is not a matrix."""

    def __init__(self, model: torch.nn.Module, *, beta: float = 0.9, **options: Any) -> None:
        super().__init__(model, **options)
        self.beta = beta
        self.moments: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        torch.manual_seed(zo_seed)
        for name, w in self.parameters.items():
            v = self.right.get(name)
            noise = dense_noise(w) if v is None else normal((len(w), self.rank), w)
            moment = fresh = projected_gradient * noise
            if name in self.moments:
                kept = self.moments[name]
                if v is not None and self.steps % self.window == 0:
                    kept = kept @ self.before[name].T @ v / len(v)  # from left to right: as large as W
                moment = self.beta * kept + (1 - self.beta) * fresh
            self.moments[name] = moment
            if v is not None:
                self.before[name] = v
            w.data = w.data - self.lr * (moment if v is None else moment @ v.T)


class SubZero(Baseline):
    """zimingyy/SubZero: sqrt(m n) / r * U Z V^T, with U and V from QRs of noise once per window."""

    def __init__(self, model: torch.nn.Module, *, rank: int = 64, window: int = 1000, **options: Any) -> None:
        super().__init__(model, **options)
        self.rank, self.window, self.steps = rank, window, 0
        self.basis: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, closure: Closure) -> float:
        if self.steps % self.window == 0:
            with self._timed("refresh"):
                self._refresh()
        self.steps += 1
        return super().step(closure)

    def _refresh(self) -> None:
        for name, w in self.parameters.items():
            if w.dim() == 2:
                r = min(self.rank, *w.shape)
                noise = (torch.randn((size, r), device=w.device) for size in w.shape)
                left, right = (torch.linalg.qr(z)[0].to(w.dtype) for z in noise)
                self.basis[name] = (left, right.T.contiguous())

    def _directions(self, zo_seed: int) -> Directions:
        torch.manual_seed(zo_seed)
        for name, w in self.parameters.items():
            if name not in self.basis:
                yield w, dense_noise(w)
                continue
            left, right = self.basis[name]
            core = normal((left.shape[1], right.shape[0]), w)
            yield w, left @ core @ right * math.sqrt(w.numel() / core.numel())
