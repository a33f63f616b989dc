"""FZOO (2506.09034; code: DKmiyan/FZOO@d4f8a8b): one-sided sign probes, normalised by the spread of their losses.

    l_0 = L(W),  l_i = L(W + eps u_i),  i = 1..N             u_i of random signs, each from the clean W
    W <- W - lr sum_i (l_i - l_0) u_i / (N std(l_1..l_N))    no step where std is 0

std divides by N - ddof: 0 in the code, 1 in the paper, whose update also has 1/eps. No decay.
"""

import math

from .common import Loss, State, Weights, combined, descend, perturbed


def step(
    weights: Weights, loss: Loss, u: list[Weights], state: State, *, lr: float, eps: float, ddof: int = 0
) -> tuple[Weights, State]:
    """Forwards: W, +u_1, +u_2, ..."""
    N = len(u)
    clean = loss(weights)
    losses = [loss(perturbed(weights, signs, eps)) for signs in u]
    mean = sum(losses) / N
    std = math.sqrt(sum((value - mean) ** 2 for value in losses) / (N - ddof))
    if std == 0:
        return dict(weights), state
    c = [(value - clean) / (N * std) for value in losses]
    return descend(weights, combined(c, u), lr), state
