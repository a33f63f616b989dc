"""Sparse-MeZO (2402.15751): only the small weights are perturbed and updated.

    h = the (1 - s)-quantile of |W| per tensor               once, before training; s: share left alone
    D = z 1[|W| <= h]                                        at every step, from the clean W
    rho = (L(W + eps D) - L(W - eps D)) / (2 eps),  W <- W - lr rho D

No decay.
"""

from .common import Loss, State, Weights, descend, two_sided


def thresholds(weights: Weights, sparsity: float) -> dict[str, float]:
    """h of every tensor; between two magnitudes it is interpolated linearly."""
    return {name: float(w.abs().flatten().quantile(1 - sparsity)) for name, w in weights.items()}


def step(
    weights: Weights, loss: Loss, z: Weights, h: dict[str, float], state: State, *, lr: float, eps: float
) -> tuple[Weights, State]:
    direction = {name: z[name] * (w.abs() <= h[name]) for name, w in weights.items()}
    rho = two_sided(loss, weights, direction, eps)
    return descend(weights, {name: rho * direction[name] for name in weights}, lr), state
