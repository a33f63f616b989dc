"""MeZO with heavy-ball momentum (Malladi et al., 2305.17333; in neither of its code bases).

rho = (L(W + eps z) - L(W - eps z)) / (2 eps)
m <- beta m + rho z                                      no factor 1 - beta
W <- (1 - lr wd) W - lr m
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
    beta: float = 0.9,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """State: m, which starts at zero."""
    rho = two_sided(loss, weights, z, eps)
    m = {name: rho * z[name] + (beta * state["m"][name] if state else 0.0) for name in weights}
    return descend(weights, m, lr, weight_decay), {"m": m}
