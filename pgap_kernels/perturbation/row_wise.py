"""Layers that can be given a vector of their own for each row: slices of a batch at different points run together.

    linear       y = x W^T + b_rows
    LayerNorm    y = (x - mean) / sqrt(var + eps) * w_rows + b_rows         in float32, rounded once
    RMSNorm      y = w_rows * x / sqrt(mean x^2 + eps)                      as the class rounds it

Each is what the layer computes with one vector for all rows, at every row with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hooks import CONV1D, LINEAR, ModuleUse

# The module, its input, and the vectors that move: by name, each of shape (rows, 1, ..., 1, size).
RowWise = Callable[[nn.Module, Tensor, Mapping[str, Tensor]], Tensor]


def row_wise(use: ModuleUse) -> RowWise | None:
    """What runs a module with vectors for each row, whichever of its vectors move; None if nothing does."""
    module = use.module
    if "forward" in module.__dict__ or module._buffers or module._modules:
        return None
    if use.kind in (LINEAR, CONV1D) and type(module.weight) is nn.Parameter:  # subclasses may know F.linear alone
        return _linear if use.kind == LINEAR else _conv1d
    if type(module).forward is nn.LayerNorm.forward:
        return _layer_norm
    # Of their classes there are many, all written out in Python, and none that does anything else when it is tried.
    return _broadcast if type(module).__name__.endswith("RMSNorm") and _broadcasts(module) else None


def _linear(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    return _product(x, module.weight.t(), moved["bias"])  # type: ignore[operator]


def _conv1d(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    return _product(x, module.weight, moved["bias"])  # type: ignore[arg-type]


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (*x.shape[:-1], bias.shape[-1])
    # Added inside the product: added to its output, a small bias would be lost in 16 bits.
    return torch.addmm(bias.expand(shape).reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1]), weight).view(shape)


def _layer_norm(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    y = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
    weight, bias = (moved.get(name, module._parameters[name]) for name in ("weight", "bias"))
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)  # autocast leaves it in float32


def _broadcast(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    before = dict(module._parameters)
    module._parameters.update(moved)  # type: ignore[arg-type]
    try:
        return type(module).forward(module, x)  # the instance has a ``StackedForward``
    finally:
        module._parameters.update(before)


@torch.no_grad()
def _broadcasts(module: nn.Module) -> bool:
    """Whether a module with vectors for each row gives each row what it gives all with the row's vectors."""
    vectors = {name: p for name, p in module._parameters.items() if p is not None}
    if not vectors or any(p.dim() != 1 or not p.is_floating_point() for p in vectors.values()):
        return False
    like = next(iter(vectors.values()))
    x = torch.linspace(-2, 2, 6 * len(like), dtype=torch.float32, device=like.device).to(like.dtype).view(2, 3, -1)
    rows = {name: torch.stack([p, 1 - 2 * p]).unsqueeze(1) for name, p in vectors.items()}
    try:
        together = _broadcast(module, x, rows)
        alone = [_broadcast(module, x, {name: v[i, 0] for name, v in rows.items()})[i] for i in (0, 1)]
    except (RuntimeError, TypeError, ValueError):  # a forward that insists on vectors, or on more than one input
        return False
    return isinstance(together, Tensor) and torch.equal(together, torch.stack(alone))
