"""MeZO-Adam (Malladi et al., 2305.17333; its medium_models hand rho z to AdamW as the gradient).

rho = (L(W + eps z) - L(W - eps z)) / (2 eps),  g = rho z
m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
W <- (1 - lr wd) W - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + e)          t from 1
"""

from .common import Loss, State, Weights, descend, two_sided


def step(
    weights: Weights,
    loss: Loss,
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    e: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """State: t, steps taken; m and v, which start at zero."""
    t = state.get("t", 0) + 1
    rho = two_sided(loss, weights, z, eps)
    m, v, update = {}, {}, {}
    for name in weights:
        g = rho * z[name]
        m[name] = (1 - beta1) * g + (beta1 * state["m"][name] if state else 0.0)
        v[name] = (1 - beta2) * g**2 + (beta2 * state["v"][name] if state else 0.0)
        update[name] = m[name] / (1 - beta1**t) / ((v[name] / (1 - beta2**t)).sqrt() + e)
    return descend(weights, update, lr, weight_decay), {"t": t, "m": m, "v": v}
