"""HiZOO (2402.15173; code: Yanjun-Zhao/HiZOO@4f99055): noise scaled by an estimated diagonal Hessian.

D = z / sqrt(H)                                          H starts at 1
rho = (L(W + eps D) - L(W - eps D)) / (2 eps)
H <- (1 - alpha) H + alpha |L(W + eps D) + L(W - eps D) - 2 L(W)| H z^2 / (2 eps^2)
W <- (1 - lr wd) W - lr rho z / sqrt(H)                  with the new H; the code decays every tensor
"""

from torch import ones_like

from .common import Loss, State, Weights, descend, perturbed


def step(
    weights: Weights,
    loss: Loss,
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    alpha: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """State: H. Forwards: W, +D, -D."""
    H = state["H"] if state else {name: ones_like(w) for name, w in weights.items()}
    direction = {name: z[name] / H[name].sqrt() for name in weights}
    clean = loss(weights)
    plus = loss(perturbed(weights, direction, eps))
    minus = loss(perturbed(weights, direction, -eps))
    rho = (plus - minus) / (2 * eps)
    bend = abs(plus + minus - 2 * clean) / (2 * eps**2)
    H = {name: (1 - alpha) * h + alpha * bend * h * z[name] ** 2 for name, h in H.items()}
    return descend(weights, {name: rho * z[name] / H[name].sqrt() for name in weights}, lr, weight_decay), {"H": H}
