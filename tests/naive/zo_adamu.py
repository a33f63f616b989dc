"""ZO-AdaMU (2312.15184, Algorithm 1; its published code does not run): noise around the momentum.

p = sqrt(alpha) n1,  q = h + sqrt(1 - alpha) n2                  h starts at 0
m = beta1 p + (1 - beta1) q,  v = beta2 p^2 + (1 - beta2) q^2
rho = (L(W + eps m) - L(W - eps m)) / (2 eps)
W <- (1 - lr wd) W - lr rho m / sqrt(v + 1e-8),  h <- sign(rho) m
"""

import math

from .common import Loss, State, Weights, descend, two_sided


def annealed(t: int, first: int, total: int, pace: float) -> float:
    """1 while t < T1; then (1 + cos(pi (t - T1) / (T3 - pace (t - T1)(T3 - T2)/(T2 - T1)))) / 2, until T2 = 0.8 T3."""
    last = 0.8 * total
    if t < first:
        return 1.0
    gone = min(t, last) - first
    return (1 + math.cos(math.pi * gone / (total - pace * gone * (total - last) / (last - first)))) / 2


def step(
    weights: Weights,
    loss: Loss,
    p: Weights,
    q: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    e: float = 1e-8,
) -> tuple[Weights, State]:
    """``p`` and ``q`` without h, which is added here. State: h."""
    y = {name: state["h"][name] + q[name] if state else q[name] for name in weights}
    m = {name: beta1 * p[name] + (1 - beta1) * y[name] for name in weights}
    rho = two_sided(loss, weights, m, eps)
    v = {name: beta2 * p[name] ** 2 + (1 - beta2) * y[name] ** 2 for name in weights}
    update = {name: rho * m[name] / (v[name] + e).sqrt() for name in weights}
    sign = (rho > 0) - (rho < 0)
    return descend(weights, update, lr, weight_decay), {"h": {name: sign * m[name] for name in weights}}
