"""TeZO (2501.19057): perturbations with factors drawn once and a diagonal core tau drawn at every step.

    D = scale U diag(tau) V^T on matrices, dense noise z on the rest       scale: 1, or 1/sqrt(r)
    rho = (L(W + eps D) - L(W - eps D)) / (2 eps)
    sgd:       W <- W - lr rho D
    momentum:  m <- beta1 m + (1 - beta1) rho tau,  W <- W - lr scale U diag(m) V^T
    adam:      v <- beta2 v + (1 - beta2) rho^2 tau^2,
               W <- W - lr scale U diag(m) V^T / sqrt(scale^2 (U*U) diag(v) (V*V)^T + e)           elementwise

Tensors without factors take rho z in every variant.
"""

import math

from .common import Loss, State, Weights, descend, two_sided


def step(
    weights: Weights,
    loss: Loss,
    U: Weights,
    V: Weights,
    tau: Weights,
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    normalise: bool = True,
    rule: str = "sgd",
    beta1: float = 0.9,
    beta2: float = 0.999,
    e: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """``normalise`` is the scale 1/sqrt(r). State: m and v, r-vectors that start at zero."""
    left = {name: U[name] / math.sqrt(len(tau[name])) if normalise else U[name] for name in tau}
    direction = {**{name: left[name] @ tau[name].diag() @ V[name].T for name in tau}, **z}
    rho = two_sided(loss, weights, direction, eps)
    update = {name: rho * direction[name] for name in weights}
    m, v = {}, {}
    for name in tau if rule != "sgd" else ():
        m[name] = (1 - beta1) * rho * tau[name] + (beta1 * state["m"][name] if state else 0.0)
        v[name] = (1 - beta2) * rho**2 * tau[name] ** 2 + (beta2 * state["v"][name] if state else 0.0)
        update[name] = left[name] @ m[name].diag() @ V[name].T
        if rule == "adam":
            update[name] /= (left[name] ** 2 @ v[name].diag() @ (V[name] ** 2).T + e).sqrt()
    return descend(weights, update, lr, weight_decay), {"m": m, "v": v} if m else {}
