"""SubZero (2410.08989; code: zimingyy/SubZero@cf6effd): perturbations in a random orthonormal subspace.

    U = qr(Gaussian, m x r), V = qr(Gaussian, n x r)         every T0 steps; ``common.orthonormal``
    D = sqrt(m n)/r U Z V^T on matrices, dense noise z on the rest
    rho = (L(W + eps D) - L(W - eps D)) / (2 eps), or one-sided (L(W + eps D) - L(W)) / eps
    W <- W - lr rho D

The scale stands in the code, not in the paper's equations. Tensors of LoRA and prefix tuning are taken in their most
nearly square factorisation: D has the shape of U and V's product and is viewed as W's. No decay.
"""

import math

from .common import Loss, State, Weights, descend, perturbed, two_sided


def nearly_square(numel: int) -> tuple[int, int]:
    """Rows <= columns with the smallest difference."""
    rows = max(d for d in range(1, math.isqrt(numel) + 1) if numel % d == 0)
    return rows, numel // rows


def step(
    weights: Weights,
    loss: Loss,
    U: Weights,
    V: Weights,
    Z: Weights,
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    one_sided: bool = False,
) -> tuple[Weights, State]:
    """``U``, ``V`` and ``Z`` of the matrices, ``z`` of the other tensors. One-sided, L(W) comes first."""
    direction = dict(z)
    for name, core in Z.items():
        scale = math.sqrt(weights[name].numel()) / len(core)
        direction[name] = (scale * U[name] @ core @ V[name].T).view(weights[name].shape)
    if one_sided:
        clean = loss(weights)
        rho = (loss(perturbed(weights, direction, eps)) - clean) / eps
    else:
        rho = two_sided(loss, weights, direction, eps)
    return descend(weights, {name: rho * direction[name] for name in weights}, lr), state
