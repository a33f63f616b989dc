"""MeZO (Malladi et al., 2305.17333, Algorithm 1), and n-SPSA with several draws.

rho_i = (L(W + eps z_i) - L(W - eps z_i)) / (2 eps)      each from the clean W
W <- (1 - lr wd) W - lr/n sum_i rho_i z_i

Leave-one-out (2609.10980): rho_i = (L_i - mean_{j != i} L_j) / eps with L_i = L(W + eps z_i), n forwards.
"""

from .common import Loss, State, Weights, combined, descend, perturbed, two_sided


def step(
    weights: Weights,
    loss: Loss,
    z: list[Weights],
    state: State,
    *,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
    leave_one_out: bool = False,
) -> tuple[Weights, State]:
    """``z``: one dict per probe. Forwards: +z_1, -z_1, +z_2, ..., or +z_1, +z_2, ..."""
    if leave_one_out:
        losses = [loss(perturbed(weights, probe, eps)) for probe in z]
        others = [[other for j, other in enumerate(losses) if j != i] for i in range(len(z))]
        rho = [(own - sum(rest) / len(rest)) / eps for own, rest in zip(losses, others, strict=True)]
    else:
        rho = [two_sided(loss, weights, probe, eps) for probe in z]
    gradient = combined([r / len(z) for r in rho], z)
    return descend(weights, gradient, lr, weight_decay), state
