"""Methods as the published code does them, in plain PyTorch: noise from ``torch.normal`` for one parameter at a time,
drawn anew in every pass, and elementwise ops out of place.

MeZO and P-GAP, which `pgap-kernels finetune` compares itself with, are in `pgap_kernels.finetune.baseline`. What the
authors' code does beside the method is left out: weight decay, the forward that HiZOO takes for its log, the copies of
all noise that DiZO keeps by an oversight. There is no public code of AGZO and HELENE, and EGGROLL's runs in other
frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pgap_kernels.finetune.baseline import Baseline, BaselineMeZO, BaselinePGAP, Closure, dense_noise

Directions = Iterator[tuple[torch.nn.Parameter, Tensor]]


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
                self.right[name] = _normal((w.shape[1], self.rank), w)
            yield w, _normal((len(w), self.rank), w) @ self.right[name].T

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
            noise = dense_noise(w) if v is None else _normal((len(w), self.rank), w)
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
            core = _normal((left.shape[1], right.shape[0]), w)
            yield w, left @ core @ right * math.sqrt(w.numel() / core.numel())


class PIZO(Baseline):
    """stan-anony/MeZO-GV, with the pool of the paper's Algorithm 2; v is stored, a tensor of each weight's size.

    The noise that builds v is the noise that was evaluated, as in trainer_fwa.py.
    """

    def __init__(self, model: torch.nn.Module, *, pool: int = 4, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(model, **options)
        self.pool, self.top = pool, math.floor(alpha * pool)
        self.guide: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        self.guide = {}
        seeds = [self._draw_seed() for _ in range(self.pool)]
        losses = [self._one_sided(closure, zo_seed) for zo_seed in seeds]
        with self._timed("perturb"):
            order = sorted(range(self.pool), key=losses.__getitem__)
            guide = {name: torch.zeros_like(w) for name, w in self.parameters.items()}
            for place, i in enumerate(order):
                weight = 1 / self.top if place < self.top else -1 / (self.pool - self.top)
                torch.manual_seed(seeds[i])
                for name, w in self.parameters.items():
                    guide[name] = guide[name] + weight * dense_noise(w)
            self.guide = guide
        return super().step(closure)

    def _one_sided(self, closure: Closure, zo_seed: int) -> float:
        with self._timed("perturb"):
            self._perturb(zo_seed, 1)
        loss = self._forward(closure)
        with self._timed("perturb"):
            self._perturb(zo_seed, -1)
        return loss

    def _directions(self, zo_seed: int) -> Directions:
        if not self.guide:
            return super()._directions(zo_seed)
        return ((w, self.guide[name]) for name, w in self.parameters.items())


class DiZO(BaselineMeZO):
    """Skilteee/DiZO: MeZO, and projections that scale W - W0 of some weights and divide by the same to undo it.

    As in `pgap_kernels.optim.DiZO`, each iteration of a projection is a step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        select: Sequence[str] = ("*k_proj.weight", "*v_proj.weight"),
        kappa: int = 50,
        iterations: int = 10,
        eps_p: float = 0.1,
        tau: float = 0.2,
        s: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.kappa, self.iterations, self.steps = kappa, iterations, 0
        self.eps_p, self.tau, self.s = eps_p, tau, s
        names = [name for name in self.parameters if any(fnmatchcase(name, pattern) for pattern in select)]
        self.anchor = {name: self.parameters[name].detach().clone() for name in names}
        self.ratio: dict[str, float] = {}

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        place = self.steps % (self.kappa + self.iterations)
        self.steps += 1
        return super().step(closure) if place < self.kappa else self._project(closure, place - self.kappa)

    def _project(self, closure: Closure, iteration: int) -> float:
        with self._timed("perturb"):
            if iteration == 0:
                self.ratio = dict.fromkeys(self.anchor, 1.0)
            norm = {name: (self.parameters[name] - w0).norm().item() + 1e-8 for name, w0 in self.anchor.items()}
            draws = dict(zip(norm, torch.randn(len(norm)).tolist(), strict=True))
            z = {name: max(-self.tau * n / self.eps_p, min(draws[name], self.tau * n / self.eps_p))
                 for name, n in norm.items()}  # fmt: skip
            ends = [
                {name: c + sign * self.eps_p * z[name] / norm[name] for name, c in self.ratio.items()}
                for sign in (1, -1)
            ]
        losses = [self._scaled(closure, end) for end in ends]
        slope = (losses[0] - losses[1]) / (2 * self.eps_p)
        for name, c in self.ratio.items():
            self.ratio[name] = max(1 - self.tau, min(c - self.s * slope * z[name], 1 + self.tau))
        if iteration == self.iterations - 1:
            with self._timed("perturb"):
                self._scale(self.ratio)
        return sum(losses) / 2

    def _scaled(self, closure: Closure, ratios: dict[str, float]) -> float:
        with self._timed("perturb"):
            self._scale(ratios)
        loss = self._forward(closure)
        with self._timed("perturb"):
            self._scale({name: 1 / c for name, c in ratios.items()})
        return loss

    def _scale(self, ratios: dict[str, float]) -> None:
        for name, w0 in self.anchor.items():
            w = self.parameters[name]
            w.data = w0 + ratios[name] * (w.data - w0)


class HiZOO(Baseline):
    """Yanjun-Zhao/HiZOO: noise over the root of an estimated diagonal Hessian, which the update uses as it has become.

    H is of the weights' dtype; of 16 bits, it never moves.
    """

    def __init__(self, model: torch.nn.Module, *, alpha: float = 1e-8, **options: Any) -> None:
        super().__init__(model, **options)
        self.alpha = alpha
        self.curvature = {name: torch.ones_like(w) for name, w in self.parameters.items()}
        self.losses: list[float] = []

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        self.losses = []
        self._forward(closure)
        return super().step(closure)

    def _forward(self, closure: Closure) -> float:
        self.losses.append(super()._forward(closure))
        return self.losses[-1]

    def _directions(self, zo_seed: int) -> Directions:
        torch.manual_seed(zo_seed)
        return ((w, dense_noise(w) / torch.sqrt(self.curvature[name])) for name, w in self.parameters.items())

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        clean, plus, minus = self.losses
        bend = abs(plus + minus - 2 * clean) / (2 * self.eps**2)
        torch.manual_seed(zo_seed)
        for name, w in self.parameters.items():
            z, h = dense_noise(w), self.curvature[name]
            self.curvature[name] = (1 - self.alpha) * h + self.alpha * bend * h * z * z
            w.data = w.data - self.lr * (projected_gradient * z / torch.sqrt(self.curvature[name]))


PUBLISHED: dict[str, type[Baseline]] = {
    "dizo": DiZO,
    "hizoo": HiZOO,
    "lozo": LOZO,
    "lozo-m": LOZOM,
    "mezo": BaselineMeZO,
    "pgap": BaselinePGAP,
    "pizo": PIZO,
    "subzero": SubZero,
}


def _normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=shape, device=like.device, dtype=like.dtype)
