"""HELENE (2411.10696): annealed momentum over a lazily refreshed diagonal, floored per layer.

    rho = (L(W + eps z) - L(W - eps z)) / (2 eps),  g = rho z
    alpha_t = beta1 + (1 - beta1) exp(-t / T),  m <- beta1 m + alpha_t g               t from 0; no bias correction
    if t mod k = 0:  h <- beta2 h + (1 - beta2) B g^2
    W <- (1 - lr wd) W - lr m / (gamma max(h, floor) + e)

B g^2 is Sophia's Gauss-Newton-Bartlett estimate with the minibatch's g; the paper prints a mean of per-example squares.
"""

import math

from .common import Loss, State, Weights, descend, two_sided


def step(
    weights: Weights,
    loss: Loss,
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    floor: dict[str, float],
    batch_size: int,
    anneal_steps: float,
    refresh_every: int,
    beta1: float = 0.9,
    beta2: float = 0.99,
    gamma: float = 1.0,
    e: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """State: t, steps taken; m and h, which start at zero. ``anneal_steps`` is T, ``refresh_every`` k."""
    t = state.get("t", 0)
    alpha = beta1 + (1 - beta1) * math.exp(-t / anneal_steps)
    rho = two_sided(loss, weights, z, eps)
    m, h, update = {}, {}, {}
    for name in weights:
        g = rho * z[name]
        m[name] = alpha * g + (beta1 * state["m"][name] if state else 0.0)
        if t % refresh_every == 0:
            h[name] = (1 - beta2) * batch_size * g**2 + (beta2 * state["h"][name] if state else 0.0)
        else:
            h[name] = state["h"][name]
        update[name] = m[name] / (gamma * h[name].clamp(min=floor[name]) + e)
    return descend(weights, update, lr, weight_decay), {"t": t + 1, "m": m, "h": h}
