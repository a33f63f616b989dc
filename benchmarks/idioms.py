"""What PyTorch code does today in place of each op, as lean as it gets: in place, one temporary where one is enough."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def normal(w: Tensor, a: float) -> None:
    """MeZO's perturbation."""
    w.add_(torch.normal(0.0, 1.0, w.shape, dtype=w.dtype, device=w.device), alpha=a)


def masked_normal(w: Tensor, a: float, share: float) -> None:
    """The same on a random share of the weights."""
    z = torch.normal(0.0, 1.0, w.shape, dtype=w.dtype, device=w.device)
    w.add_(z.mul_(torch.rand(w.shape, device=w.device) < share), alpha=a)


def adam(w: Tensor, m: Tensor, v: Tensor, rho: float, lr: float) -> None:
    """An Adam step along a projected gradient, with the noise drawn again."""
    g = torch.normal(0.0, 1.0, w.shape, dtype=torch.float32, device=w.device).mul_(rho)
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=1e-3)
    w.sub_((m / v.sqrt().add_(1e-8)).mul_(lr))


def low_rank(w: Tensor, u: Tensor, z: Tensor, v: Tensor, a: float) -> None:
    """SubZero's perturbation without a product of W's size, factors in W's dtype."""
    w.addmm_(u @ z, v.T, alpha=a)


def compiled_normal(w: Tensor, a: float) -> None:
    """MeZO's perturbation as torch.compile fuses it: one pass, with the compiler's own generator."""
    _compiled()(w, a)


@functools.cache
def _compiled():
    return torch.compile(_normal_like, fullgraph=True, dynamic=False)


def _normal_like(w: Tensor, a: float) -> None:
    w.add_(torch.randn_like(w), alpha=a)
