"""Methods of dense noise as the published code does them: PIZO, DiZO, HiZOO, AdaLeZO."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pgap_kernels.finetune.baseline import Baseline, BaselineMeZO, Closure, dense_noise
from pgap_kernels.optim.lezo import layer_number

from .draws import Directions
from .one_sided import OneSided


class PIZO(OneSided):
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
        seeds, losses = self._losses(closure, self.pool)
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


class AdaLeZO(Baseline):
    """WangFei-2019/UnifiedZO: MeZO on layers that a bandit draws, each layer's noise from a seed of its own."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        share: float = 0.2,
        tau: float = 0.6,
        gamma: float = 0.1,
        clip: float = 4.0,
        ema: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.share, self.tau, self.gamma, self.clip, self.ema = share, tau, gamma, clip, ema
        found: dict[str, list[torch.nn.Parameter]] = {}
        for name, w in self.parameters.items():
            found.setdefault(layer_number(name) or "", []).append(w)
        self.layers = [*found.values()]
        self.worth = torch.zeros(len(self.layers))
        self.drawn: dict[int, float] = {}  # layers, and what their updates are multiplied by

    def step(self, closure: Closure) -> float:
        count, k = len(self.layers), max(1, int(self.share * len(self.layers)))
        most = self.worth.max().item() or 1.0
        chances = (1 - self.gamma) * torch.softmax(self.worth / most / self.tau, 0) + self.gamma / count
        draws = Counter(torch.multinomial(chances, k, replacement=True).tolist())
        self.drawn = {i: n * min(1 / (k * chances[i].item() + 1e-8), self.clip) for i, n in draws.items()}
        return super().step(closure)

    def _directions(self, zo_seed: int) -> Directions:
        for _, w, z in self._of_layers(zo_seed):
            yield w, z

    def _of_layers(self, zo_seed: int) -> Iterator[tuple[int, torch.nn.Parameter, Tensor]]:
        for i in self.drawn:
            torch.manual_seed(zo_seed + i)
            for w in self.layers[i]:
                yield i, w, dense_noise(w)

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        for i, w, z in self._of_layers(zo_seed):
            w.data = w.data - self.lr * (projected_gradient * self.drawn[i] * z)
        for i in self.drawn:
            self.worth[i] = (1 - self.ema) * self.worth[i] + self.ema * abs(projected_gradient)
