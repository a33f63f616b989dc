"""AdaLeZO (2604.18264; code: WangFei-2019/UnifiedZO): layers drawn by what they were worth.

p = (1 - gamma) softmax(Q / max Q / tau) + gamma / L             k draws with replacement
rho two-sided along z on the layers that were drawn
W_i <- W_i - lr rho z count_i min(1 / (k p_i + 1e-8), clip);   Q_i <- (1 - ema) Q_i + ema |rho|
"""

import math

from .common import Loss, State, Weights, perturbed


def probabilities(Q: list[float], tau: float, gamma: float) -> list[float]:
    """Uniform while all Q are 0."""
    most = max(Q)
    powers = [math.exp((q / most if most else 0.0) / tau) for q in Q]
    return [(1 - gamma) * power / sum(powers) + gamma / len(Q) for power in powers]


def step(
    weights: Weights,
    loss: Loss,
    z: Weights,
    layers: list[list[str]],
    uniform: list[float],
    state: State,
    *,
    lr: float,
    eps: float,
    tau: float = 0.6,
    gamma: float = 0.1,
    clip: float = 4.0,
    ema: float = 0.1,
) -> tuple[Weights, State]:
    """``uniform``: k numbers that say which layers are drawn. State: Q."""
    Q = state.get("Q", [0.0] * len(layers))
    p, k = probabilities(Q, tau, gamma), len(uniform)
    drawn = [next(i for i in range(len(p)) if x < sum(p[: i + 1]) or i == len(p) - 1) for x in uniform]
    direction = {name: z[name] for i in {*drawn} for name in layers[i]}
    plus = loss({**weights, **perturbed({n: weights[n] for n in direction}, direction, eps)})
    minus = loss({**weights, **perturbed({n: weights[n] for n in direction}, direction, -eps)})
    rho = (plus - minus) / (2 * eps)
    new = dict(weights)
    for i in {*drawn}:
        for name in layers[i]:
            new[name] = weights[name] - lr * rho * drawn.count(i) * min(1 / (k * p[i] + 1e-8), clip) * z[name]
    return new, {"Q": [(1 - ema) * q + ema * abs(rho) if i in drawn else q for i, q in enumerate(Q)]}
