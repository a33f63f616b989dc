"""EGGROLL (2511.16652): evolution strategies with low-rank members, by default in antithetic pairs.

    E_k = A_k B_k^T / sqrt(p) on matrices, dense noise z_k where given; s = +1, -1 for the members 2k, 2k + 1
    F = -L(W + sigma s E),  N members
    jax:  f = (F - mean F) / sqrt(var F + 1e-5);  W <- W + lr sqrt(N) sigma mean_i(f_i s_i E_i)
    llm:  f = F - mean F [/ std F];               W <- W + lr mean_i(f_i s_i E_i) [* sqrt(N)]

"jax" is HyperscaleES' EggRoll with SGD, "llm" the plain update of the transformer code. The mean of a group in place of
the mean of all changes nothing: both members of a pair share it. Tensors without noise do not move. No decay
in either code; here W decays by lr wd first.
"""

import math

import torch
from torch import Tensor

from .common import Loss, State, Weights, combined, descend, perturbed


def step(
    weights: Weights,
    loss: Loss,
    pairs: list[dict[str, tuple[Tensor, Tensor]]],
    z: list[Weights],
    state: State,
    *,
    lr: float,
    sigma: float,
    weight_decay: float = 0.0,
    update: str = "jax",
    antithetic: bool = True,
    normalise: bool = False,
    scale_by_root: bool = False,
) -> tuple[Weights, State]:
    """``pairs``: (A, B) of the matrices per pair; ``z``: noise of other tensors per pair.

    Forwards: +E_0, -E_0, ..., or +E_0, +E_1, ...
    """
    signs = (1.0, -1.0) if antithetic else (1.0,)
    N = len(signs) * len(pairs)
    directions = []
    for factors, noise in zip(pairs, z, strict=True):
        still = {name: 0.0 * w for name, w in weights.items()}
        low_rank = {name: A @ B.T / math.sqrt(A.shape[1]) for name, (A, B) in factors.items()}
        directions.append({**still, **low_rank, **noise})
    members = [(sign, direction) for direction in directions for sign in signs]
    F = torch.tensor([-loss(perturbed(weights, d, sign * sigma)) for sign, d in members], dtype=torch.float64)
    f = F - F.mean()
    amount = lr
    if update == "jax":
        f = f / (F.var(correction=0) + 1e-5).sqrt()
        amount = lr * math.sqrt(N) * sigma
    if normalise:
        f = f / F.std(correction=0)
    if scale_by_root:
        amount = lr * math.sqrt(N)
    c = [float(f_i) * sign / N for f_i, (sign, _) in zip(f, members, strict=True)]
    kept = descend(weights, {name: 0.0 * w for name, w in weights.items()}, lr, weight_decay)
    return perturbed(kept, combined(c, [direction for _, direction in members]), amount), state
