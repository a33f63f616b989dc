"""PIZO (2601.04710, Algorithm 2): a direction combined from a pool of M draws by their losses. MeZO-GV, MeZO-Greedy.

    F_i = L(W + eps z_i),  i < M                             sorted ascending, ties to the lower i
    GV:      v = mean of the floor(alpha M) best z - mean of the others
    Greedy:  v = the best z
    g = (L(W + eps v) - L(W - eps v)) / (2 eps),  W <- (1 - lr wd) W - lr g v

``normalise_v`` divides v by the norm of its coefficients, so that its elements have variance 1 (not in the paper).
``history`` (the published code) keeps the best draw of a step as the first of the next pool, where it is evaluated
again.
"""

import math

from .common import Loss, State, Weights, combined, descend, perturbed, two_sided


def coefficients(losses: list[float], *, alpha: float, greedy: bool) -> list[float]:
    """c of v = sum_i c_i z_i."""
    M = len(losses)
    order = sorted(range(M), key=lambda i: losses[i])  # stable
    if greedy:
        return [1.0 if i == order[0] else 0.0 for i in range(M)]
    top = math.floor(alpha * M)
    if not 1 <= top < M:
        raise ValueError(f"alpha: got {alpha}; accepted: 1 <= floor(alpha M) < M, where M is {M}")
    return [1 / top if i in order[:top] else -1 / (M - top) for i in range(M)]


def step(
    weights: Weights,
    loss: Loss,
    z: list[Weights],
    state: State,
    *,
    lr: float,
    eps: float,
    alpha: float = 0.5,
    greedy: bool = False,
    history: bool = False,
    normalise_v: bool = False,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """``z``: M new draws, with ``history`` M - 1 after the first step. Forwards: the pool in order, +v, -v."""
    pool = [state["best"], *z] if state else z
    F = [loss(perturbed(weights, draw, eps)) for draw in pool]
    c = coefficients(F, alpha=alpha, greedy=greedy)
    norm = math.sqrt(sum(c_i**2 for c_i in c)) if normalise_v else 1.0
    v = combined([c_i / norm for c_i in c], pool)
    g = two_sided(loss, weights, v, eps)
    new = descend(weights, {name: g * v[name] for name in weights}, lr, weight_decay)
    return new, {"best": pool[F.index(min(F))]} if history else {}
