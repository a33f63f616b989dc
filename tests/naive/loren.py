"""LOREN (2511.07971; code: hseung88/loren@b80a32b): noise damped along one learned direction, leave-one-out baseline.

    z_k = u_k - a~ <a~, u_k> (sqrt(rho) + sqrt(rho + s)) / (s sqrt(rho + s)),  s = |a~|^2          a~: a in every row
    f_k = L(W + eps z_k),  w_k = (f_k - mean f) / ((K - 1) eps),  k = 1..K
    per_step:   m <- beta m + sum_k w_k z_k,  W <- (1 - lr wd) W - lr m
    per_query:  for every k in turn  m <- beta m + w_k z_k,  W <- (1 - lr wd) W - lr m          (the code)
    a <- (1 - lr_a wd) a - lr_a sum_k grad_k                  after the loop; in the code inside it
    grad_k = sum_rows (f_k - mean f) (c1 - c2) / (sqrt(rho + s) (K - 1)),  c1 = <a~, u> u - a~,
             c2 = (sqrt(rho) + sqrt(rho + s)) (<a~, u>^2 - s) a~ / (s sqrt(rho + s))

Tensors without a are not damped: z_k = u_k. rho is ``damping``. The code's lr_a is lr_cov eps^2, with which a never
moves. Tensors of fewer than two dimensions are one row and have no momentum; decay reaches every tensor.
"""

import math

import torch
from torch import Tensor

from .common import Loss, State, Weights, perturbed


def curvature(u: Tensor, a: Tensor, damping: float) -> tuple[float, float]:
    """s and sqrt(rho + s)."""
    s = u.numel() / a.numel() * float(a @ a)
    return s, math.sqrt(damping + s)


def damped(u: Tensor, a: Tensor, damping: float) -> Tensor:
    """z of u: the factor along a~ becomes -sqrt(rho) / sqrt(rho + s)."""
    s, root = curvature(u, a, damping)
    return u - a * (a * u).sum() * (math.sqrt(damping) + root) / (s * root)


def gradient_of_a(u: Tensor, a: Tensor, damping: float) -> Tensor:
    """sum_rows (c1 - c2) / sqrt(rho + s)."""
    s, root = curvature(u, a, damping)
    dot = (a * u).sum()
    c1 = dot * u - a
    c2 = (math.sqrt(damping) + root) * (dot**2 - s) * a / (s * root)
    rows = c1 - c2
    return (rows.sum(0) if rows.dim() > 1 else rows) / root


def step(
    weights: Weights,
    loss: Loss,
    u: list[Weights],
    state: State,
    *,
    lr: float,
    eps: float,
    damping: float = 0.1,
    beta: float = 0.9,
    momentum: str = "per_step",
    lr_a: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """State: a, given before the first step (columns; numel of 1-D tensors); m, which starts at zero."""
    a, m, K = dict(state["a"]), dict(state.get("m", {})), len(u)
    z = [{n: damped(draw[n], a[n], damping) if n in a else draw[n] for n in weights} for draw in u]
    f = [loss(perturbed(weights, z_k, eps)) for z_k in z]
    centred = [f_k - sum(f) / K for f_k in f]
    new = {}
    for name, w in weights.items():
        terms = [c / ((K - 1) * eps) * z_k[name] for c, z_k in zip(centred, z, strict=True)]
        if momentum == "per_step":
            terms = [torch.stack(terms).sum(0)]
        for term in terms:
            if w.dim() >= 2:
                term = m[name] = term + (beta * m[name] if name in m else 0.0)
            decay = lr * weight_decay if w.dim() >= 2 else 0.0  # the code decays every tensor
            w = (1 - decay) * w - lr * term
        new[name] = w
        if name not in a:
            continue
        moves = [c / (K - 1) * gradient_of_a(draw[name], a[name], damping) for c, draw in zip(centred, u, strict=True)]
        a[name] = (1 - lr_a * weight_decay) * a[name] - lr_a * sum(moves)
    return new, {"a": a, "m": m}
