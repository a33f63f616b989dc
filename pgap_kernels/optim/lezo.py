"""LeZO (2410.09823) and AdaLeZO (2604.18264): only some layers move in a step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from .. import noise
from ..directions import Weight, bucket
from ..noise import Role
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import at_least_one, fraction, positive


def layer_number(name: str) -> str | None:
    """The first number that is a whole part of a parameter's name; None if there is none."""
    found = re.search(r"(?<![^.])\d+(?![^.])", name)
    return found and found[0]


class LayerwiseOptimizer(ZOOptimizer):
    """Base of methods that move some layers in a step.

    A layer is all weights whose name has the same first number, and those without one together; where no name has one,
    each module is a layer.
    """

    def layers(self) -> dict[str, list[Weight]]:
        """The weights of each layer by its number or name, whatever the order in which they were given."""
        numbers = {w.index: layer_number(w.name) for w in self.weights()}
        found: dict[str, list[Weight]] = {}
        for w in self.weights():
            number = numbers[w.index]
            module = "" if any(numbers.values()) else w.name.rpartition(".")[0]
            found.setdefault(number or module, []).append(w)
        names = sorted(found, key=lambda name: (int(name), "") if name.isdecimal() else (-1, name))
        return {name: sorted(found[name], key=lambda w: w.name) for name in names}

    def uniform(self, number: int) -> float:
        """The n-th number of a step, from 0 to below 1."""
        return noise.derive(self.seed, self.steps, Role.DATA, number) / 2**64


class LeZO(LayerwiseOptimizer):
    """MeZO on a random share of the layers, new in every step; the others stay as they are.

        rho = (L(W + eps z) - L(W - eps z)) / (2 eps),   W <- (1 - lr wd) W - lr rho z,   z = 0 on the layers left out

    Layers are as in ``LayerwiseOptimizer``. 2 forwards; 3 passes over the weights that move. No state. The paper's
    repository has a description and no code.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        sparsity: share of the layers that is left out, from 0 to below 1; at least one layer moves.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "LeZO"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        sparsity: float = 0.75,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.sparsity = fraction("sparsity", sparsity)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        layers = [*self.layers().values()]
        count = max(1, round((1 - self.sparsity) * len(layers)))
        order = sorted(range(len(layers)), key=lambda i: self.uniform(i))
        moved = sorted(order[:count])
        z = self.noise(self.key(Role.DENSE), bucket([w for i in moved for w in layers[i]]))
        plus, minus = evaluate.two_sided(z)
        self.apply_update([(z, self.descent((plus - minus) / 2))])
        return (plus + minus) / 2


class AdaLeZO(LayerwiseOptimizer):
    """Layers drawn by how much they have mattered, with weights that make up for it.

        p = (1 - gamma) softmax(Q / max Q / tau) + gamma / L             uniform at first; k draws with replacement
        rho two-sided along z on the layers drawn;   W_i <- W_i - lr rho z count_i min(1 / (k p_i), clip)
        Q_i <- (1 - ema) Q_i + ema |rho|                                  of the layers drawn

    What is applied to a layer is what was evaluated, times its weight. 2 forwards; 3 passes over the weights that move.
    State: Q, a number of each layer.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``.
        share: layers drawn in a step over all layers, k/L; at least one is drawn.
        tau: temperature of the draw: the larger, the more evenly layers are drawn.
        gamma: share of uniform exploration, from 0 to below 1.
        clip: the most that the importance weight of a drawn layer can be.
        ema: weight of the newest observation in a layer's score Q, above 0, at most 1.
        interval: steps between draws of the layers.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "AdaLeZO"
    saved_attributes: ClassVar[dict[str, Any]] = {"worth": None, "drawn": None, "chances": None}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        share: float = 0.2,
        tau: float = 0.6,
        gamma: float = 0.1,
        clip: float = 4.0,
        ema: float = 0.1,
        interval: int = 1,
        **options: Any,
    ) -> None:
        self.worth: dict[str, float] | None  # Q by layer
        self.drawn: list[str] | None
        self.chances: dict[str, float] | None  # with which ``drawn`` were drawn
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.share, self.ema = positive("share", share), positive("ema", ema)
        for name in ("share", "ema"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted: a number above 0, at most 1")
        self.tau, self.clip = positive("tau", tau), positive("clip", clip)
        self.gamma, self.interval = fraction("gamma", gamma), at_least_one("interval", interval)

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        layers = self.layers()
        names = [*layers]
        worth = dict.fromkeys(names, 0.0) | (self.worth or {})  # layers that are frozen now keep theirs
        count = max(1, math.floor(self.share * len(layers)))
        due = self.steps % self.interval == 0
        if due or self.drawn is None or self.chances is None or self.chances.keys() != layers.keys():
            chances = probabilities([worth[name] for name in names], self.tau, self.gamma)
            self.chances = dict(zip(names, chances, strict=True))
            self.drawn = [names[pick(chances, self.uniform(i))] for i in range(count)]
        moved = [name for name in names if name in self.drawn]
        key = self.key(Role.DENSE)
        z = self.noise(key, bucket([w for name in moved for w in layers[name]]))
        plus, minus = evaluate.two_sided(z)
        scale = [1.0] * len(self.weights())
        for name in moved:
            weight = self.drawn.count(name) * min(1 / (count * self.chances[name] + 1e-8), self.clip)
            for w in layers[name]:
                scale[w.index] = weight
        amounts = [a * s for a, s in zip(self.descent((plus - minus) / 2), scale, strict=True)]
        self.apply_update([(z, amounts)])
        radius = self.radius()
        for name in moved:
            slope = abs(scores.spsa(plus, minus, radius[layers[name][0].index]))
            worth[name] = (1 - self.ema) * worth[name] + self.ema * slope
        self.worth = worth
        return (plus + minus) / 2


def probabilities(worth: Sequence[float], tau: float, gamma: float) -> list[float]:
    """p of each layer; see ``AdaLeZO``."""
    most = max(worth)
    weights = [math.exp(q / most / tau if most else 0.0) for q in worth]
    total = math.fsum(weights)
    return [(1 - gamma) * w / total + gamma / len(worth) for w in weights]


def pick(chances: Sequence[float], uniform: float) -> int:
    """The index that a number from 0 to below 1 stands for."""
    below = 0.0
    for i, chance in enumerate(chances):
        below += chance
        if uniform < below:
            return i
    return len(chances) - 1
