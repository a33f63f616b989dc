"""MeZO (Malladi et al., 2305.17333, Algorithm 1), and n-SPSA with several draws.

rho_i = (L(W + eps z_i) - L(W - eps z_i)) / (2 eps)      each from the clean W
W <- (1 - lr wd) W - lr/n sum_i rho_i z_i
"""

from .common import Loss, State, Weights, combined, descend, two_sided


def step(
    weights: Weights, loss: Loss, z: list[Weights], state: State, *, lr: float, eps: float, weight_decay: float = 0.0
) -> tuple[Weights, State]:
    """``z``: one dict per probe. Forwards: +z_1, -z_1, +z_2, ..."""
    rho = [two_sided(loss, weights, probe, eps) for probe in z]
    gradient = combined([r / len(z) for r in rho], z)
    return descend(weights, gradient, lr, weight_decay), state
