"""ZO-Muon (2602.17155; code: OPTML-Group/ZO-Muon@166a8f3): an orthogonalised update in a random subspace.

    P = qr(Gaussian, m x r) every 100 steps, ``common.orthonormal``;   u_i (r x n) Gaussian,  i = 1..N
    w_i = (L(W + eps P u_i) - L(W)) / eps,   M = 1/N sum_i w_i u_i,   O = NS5(M)
    W <- W - lr P O                          no factor for the shape

Tensors that are not matrices take dense z_i and W <- W - lr_dense 1/N sum_i w_i z_i.
"""

import torch
from torch import Tensor

from .common import Loss, State, Weights, perturbed


def newton_schulz(M: Tensor) -> Tensor:
    """X = M / (|M| + 1e-7); five times A = X X^T, X <- 3.4445 X + (-4.775 A + 2.0315 A A) X; tall ones transposed."""
    X = M.T if M.shape[0] > M.shape[1] else M
    X = X / (torch.linalg.norm(X) + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X.T if M.shape[0] > M.shape[1] else X


def step(
    weights: Weights,
    loss: Loss,
    P: Weights,
    u: list[Weights],
    z: list[Weights],
    state: State,
    *,
    lr: float,
    eps: float,
    lr_dense: float = 1e-7,
    orthogonalise: bool = True,
) -> tuple[Weights, State]:
    """``P`` and ``u`` of the matrices, ``z`` of the others. Forwards: W, +D_1, +D_2, ..."""
    clean, N = loss(weights), len(u)
    w = []
    for own, rest in zip(u, z, strict=True):
        direction = {**rest, **{name: P[name] @ own[name] for name in own}}
        w.append((loss(perturbed(weights, direction, eps)) - clean) / eps)
    new = {}
    for name, weight in weights.items():
        pairs = list(zip(w, u if name in P else z, strict=True))
        mean = sum((c / N * draw[name] for c, draw in pairs[1:]), pairs[0][0] / N * pairs[0][1][name])
        if name in P:
            new[name] = weight - lr * (P[name] @ (newton_schulz(mean) if orthogonalise else mean))
        else:
            new[name] = weight - lr_dense * mean
    return new, state
