"""P-GAP (2510.18228, Algorithm 1): perturbations in the subspace of an estimated gradient, aligned with it.

Every k steps, for each matrix, from h probes Q_j on all tensors:

    G = (1/h) sum_j rho_j Q_j  ~  U diag(S) V^T              rho_j two-sided, no update

Every step:

    alpha = (sum_i S_i Z_init[i,i] - xi sqrt(delta) |S|) / (|S|^2 + 1e-12)
    Z = Z_init - alpha diag(S)                               so <S, Z> = xi sqrt(delta) |S|
    D = scale U Z V^T on matrices, dense noise z on the rest
    rho = (L(W + eps D) - L(W - eps D)) / (2 eps),  W <- (1 - lr wd) W - lr rho D

The paper has scale 1; "subzero" is sqrt(m n)/r, with which |D| is that of dense noise.
"""

import math

import torch
from torch import Tensor

from .common import Loss, State, Weights, combined, two_sided

Basis = tuple[Tensor, Tensor, Tensor]  # U (m, r), S (r,), V (n, r)


def refresh(weights: Weights, loss: Loss, probes: list[Weights], *, eps: float) -> Weights:
    """G of every matrix. Forwards: +Q_1, -Q_1, +Q_2, ..."""
    rho = [two_sided(loss, weights, Q, eps) for Q in probes]
    G = combined([r / len(probes) for r in rho], probes)
    return {name: G[name] for name, w in weights.items() if w.dim() == 2}


def truncated_svd(G: Tensor, rank: int) -> Basis:
    """U, S, V of the ``rank`` largest singular values."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank].T


def aligned(S: Tensor, Z_init: Tensor, xi: float, delta: float) -> Tensor:
    """Z: Z_init with its component along S moved to xi sqrt(delta)."""
    alpha = (S @ Z_init.diagonal() - xi * math.sqrt(delta) * S.norm()) / (S.norm() ** 2 + 1e-12)
    return Z_init - alpha * S.diag()


def step(
    weights: Weights,
    loss: Loss,
    bases: dict[str, Basis],
    Z_init: Weights,
    xi: dict[str, float],
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    delta: float = 2.0,
    scale: str = "subzero",
    weight_decay: float = 0.0,
    eps_dense: float | None = None,
    dense_lr_ratio: float = 1.0,
) -> tuple[Weights, State]:
    """``bases``, ``Z_init`` and ``xi`` of the matrices, ``z`` of the other tensors.

    Those move by eps_dense z in the forwards, and by dense_lr_ratio lr (L+ - L-) / (2 eps_dense) z in the update; decay
    goes by lr.
    """
    direction = dict(z)
    for name, (U, S, V) in bases.items():
        factor = {"subzero": math.sqrt(weights[name].numel()) / len(S), "paper": 1.0}[scale]
        direction[name] = factor * U @ aligned(S, Z_init[name], xi[name], delta) @ V.T
    radius = {name: eps if name in bases or eps_dense is None else eps_dense for name in weights}
    plus = loss({name: w + radius[name] * direction[name] for name, w in weights.items()})
    minus = loss({name: w - radius[name] * direction[name] for name, w in weights.items()})
    new = {}
    for name, w in weights.items():
        rho = (plus - minus) / (2 * radius[name])
        rate = lr if name in bases else dense_lr_ratio * lr
        decay = lr * weight_decay if w.dim() >= 2 else 0.0
        new[name] = (1 - decay) * w - rate * rho * direction[name]
    return new, state
