"""Plain-PyTorch implementation of every op: the definition that the other backends are tested against.

Runs on any device with float64. Dense ops give the very bits of the C++ and Triton kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from . import anchor, dense, forward, lowrank, preconditioned
from .lowrank import aligned_core
from .noise import box_muller, fma, noise, stochastic_round, words
from .reduction import reduce

name = "reference"


def _writing(function: Callable) -> Callable:
    """An op that also writes tensors made in inference mode, as kernels do: torch writes them only inside of it."""

    @functools.wraps(function)
    def run(*tensors: Any) -> None:
        inside = any(isinstance(t, torch.Tensor) and t.is_inference() for t in tree_leaves(tensors))
        with torch.inference_mode() if inside else contextlib.nullcontext():
            function(*tensors)

    return run


anchor_affine_ = _writing(anchor.anchor_affine_)
assemble_gradient_ = _writing(dense.assemble_gradient_)
dense_perturb_ = _writing(dense.dense_perturb_)
masked_perturb_ = _writing(dense.masked_perturb_)
lowrank_forward_ = _writing(forward.lowrank_forward_)
lowrank_perturb_ = _writing(lowrank.lowrank_perturb_)
preconditioned_ = _writing(preconditioned.preconditioned_)

__all__ = [
    "aligned_core",
    "anchor_affine_",
    "assemble_gradient_",
    "box_muller",
    "dense_perturb_",
    "fma",
    "lowrank_forward_",
    "lowrank_perturb_",
    "masked_perturb_",
    "name",
    "noise",
    "preconditioned_",
    "reduce",
    "refusal",
    "stochastic_round",
    "words",
]


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend does not serve the op there, or None."""
    if device.type == "mps":
        return "needs float64, which MPS lacks"
    return None
