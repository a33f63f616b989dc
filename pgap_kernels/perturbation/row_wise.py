"""Layers that can be given a vector of their own for each row: slices of a batch at different points run together.

    linear       y = x W^T + b_rows
    LayerNorm    y = (x - mean) / sqrt(var + eps) * w_rows + b_rows         in float32, rounded once
    RMSNorm      y = w_rows * x / sqrt(mean x^2 + eps)                      torch's so, others as their class rounds

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
    if type(module).forward is nn.RMSNorm.forward:
        return None if module.eps is None else _rms_norm
    # Every family of models has a class of its own, of a few lines of Python, which is tried on made-up rows. By their
    # name, as nobody knows what a forward of other modules does besides.
    return _with_rows if type(module).__name__.endswith("RMSNorm") and _takes_rows(module) else None


def _linear(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    return _product(x, module.weight.t(), moved["bias"])  # type: ignore[operator]


def _conv1d(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    return _product(x, module.weight, moved["bias"])  # type: ignore[arg-type]


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (*x.shape[:-1], bias.shape[-1])
    # Added inside the product: added to its output, a small bias would be lost in 16 bits.
    rows, x = bias.expand(shape).reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return torch.addmm(rows, x, weight).view(shape)
    return rows.addmm_(x, weight).view(shape)  # no second tensor of the output's size


def _layer_norm(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    y = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
    weight, bias = (moved.get(name, module._parameters[name]) for name in ("weight", "bias"))
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    # On a GPU autocast leaves it in float32.
    return y if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _rms_norm(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    y = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
    return (y * moved["weight"]).to(x.dtype)


def _with_rows(module: nn.Module, x: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
    before = dict(module._parameters)
    module._parameters.update(moved)  # type: ignore[arg-type]
    try:
        return type(module).forward(module, x)  # that of the instance is what has called this
    finally:
        module._parameters.update(before)


@torch.no_grad()
def _takes_rows(module: nn.Module) -> bool:
    """Whether a module with vectors for each row gives each row what it gives all with the row's vectors: tried on two
    rows of numbers that differ, and on two sets of vectors that differ in each element."""
    vectors = {name: p for name, p in module._parameters.items() if p is not None}
    if not vectors or any(p.dim() != 1 or not p.is_floating_point() for p in vectors.values()):
        return False
    like = next(iter(vectors.values()))
    x = torch.linspace(-2, 2, 6 * len(like), dtype=torch.float32, device=like.device).to(like.dtype).view(2, 3, -1)
    rows = {name: torch.stack([p, 1 - 2 * p]).unsqueeze(1) for name, p in vectors.items()}
    try:
        together = _with_rows(module, x, rows)
        alone = [_with_rows(module, x, {name: v[i, 0] for name, v in rows.items()})[i] for i in (0, 1)]
    except (RuntimeError, TypeError, ValueError):  # a forward that insists on vectors, or on more than one input
        return False
    return isinstance(together, Tensor) and torch.equal(together, torch.stack(alone))
