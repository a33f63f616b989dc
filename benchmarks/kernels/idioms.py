"""Today's PyTorch code for what each op does, as lean as it gets: in place, with one temporary where one is enough."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@functools.cache
def compiled(idiom: Callable) -> Callable:
    """The idiom as torch.compile fuses it; one compilation serves every size."""
    return torch.compile(idiom, fullgraph=True, dynamic=True)


def _noise(w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if w.is_cuda and torch.compiler.is_compiling():
        # Fused, with the compiler's generator. On a CPU that generator is not vectorised, and `normal`, which stays a
        # call of its own, is faster.
        return torch.randn(w.shape, dtype=dtype or w.dtype, device=w.device)
    return torch.normal(0.0, 1.0, w.shape, dtype=dtype or w.dtype, device=w.device)


def normal(w: Tensor, a: float) -> None:
    """MeZO's perturbation."""
    w.add_(_noise(w), alpha=a)


def rademacher(w: Tensor, a: float) -> None:
    """FZOO's: random signs."""
    w.add_(torch.randint(0, 2, w.shape, dtype=w.dtype, device=w.device).mul_(2).sub_(1), alpha=a)


def two_normals(w: Tensor, a: float) -> None:
    """A switch of probe: the last direction off, the next on."""
    normal(w, -a)
    normal(w, a)


def stochastic(w: Tensor, a: float) -> None:
    """MeZO's perturbation rounded at random: noise below the bits that are cut off (in float16 of normal numbers)."""
    cut = {torch.bfloat16: 16, torch.float16: 13}[w.dtype]
    total = w.float().add_(_noise(w, torch.float32), alpha=a)
    bits = total.view(torch.int32)
    bits.add_(torch.randint(0, 1 << cut, w.shape, dtype=torch.int32, device=w.device)).bitwise_and_(-(1 << cut))
    w.copy_(total)


def scratch(w: Tensor, out: Tensor, a: float) -> None:
    """MeZO's perturbation into another buffer."""
    torch.add(w, _noise(w), alpha=a, out=out)


def draw(w: Tensor) -> Tensor:
    """The noise itself."""
    return _noise(w)


def assemble(g: Tensor, coefficients: Sequence[float]) -> None:
    """Sum of seeded noises, as P-GAP estimates a gradient."""
    g.zero_()
    for a in coefficients:
        normal(g, a)


def masked(w: Tensor, mask: Tensor, a: float) -> None:
    """Sparse-MeZO's: noise where a stored mask keeps it."""
    w.add_(_noise(w).mul_(mask), alpha=a)


def adam(w: Tensor, m: Tensor, v: Tensor, rho: float, lr: float) -> None:
    """An Adam step along a projected gradient, with the noise drawn again."""
    g = _noise(w, torch.float32).mul_(rho)
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=1e-3)
    torch.div(m, torch.sqrt(v, out=g).add_(1e-8), out=g)
    w.sub_(g.mul_(lr).to(w.dtype))  # of one dtype: with float32 it is several times as slow


def anchor(w: Tensor, w0: Tensor, c: float) -> None:
    """DiZO's projection: the distance from an anchor, scaled."""
    w.sub_(w0).mul_(c).add_(w0)


def lerp(w: Tensor, w0: Tensor, c: float) -> None:
    """The same by one call."""
    torch.lerp(w0, w, c, out=w)


def dot(w: Tensor) -> Tensor:
    """<z, W>, with the noise drawn again."""
    return _noise(w).mul_(w).sum(dtype=torch.float32)


def squared_norm(w: Tensor, w0: Tensor) -> Tensor:
    """|W - W0|^2."""
    return torch.linalg.vector_norm(w - w0, dtype=torch.float32).square()


def low_rank(w: Tensor, u: Tensor, z: Tensor, v: Tensor, scale: float, a: float) -> None:
    """SubZero's perturbation (without Z LOZO's): U Z V^T of W's size, scaled, added; factors in W's dtype."""
    w.add_((u @ z @ v.T).mul_(scale), alpha=a)


def quotient(w: Tensor, u: Tensor, m: Tensor, r: Tensor, v: Tensor, e: float, a: float) -> None:
    """TeZO-Adam's update: two products of W's size, their quotient, added; factors in W's dtype."""
    w.add_(((u * m) @ r.T) / ((u.square() * v) @ r.square().T + e).sqrt(), alpha=a)


def addmm(w: Tensor, u: Tensor, z: Tensor, v: Tensor, a: float) -> None:
    """The same without a product of W's size."""
    w.addmm_(u @ z, v.T, alpha=a)


def forward(y: Tensor, x: Tensor, u: Tensor, z: Tensor, v: Tensor) -> None:
    """What U Z V^T adds to a layer's output, by three skinny products."""
    y.add_(((x @ v) @ z.T) @ u.T)


def many_normals(weights: Sequence[Tensor], a: float) -> None:
    """MeZO's perturbation of a model: a loop over its parameters."""
    for w in weights:
        normal(w, a)
