"""Plain-PyTorch implementation of every op: the definition that the other backends are tested against.

Runs on any device with float64. Dense ops give the very bits of the C++ and Triton kernels.
"""

from __future__ import annotations

import torch

from .anchor import anchor_affine_
from .dense import assemble_gradient_, dense_perturb_, masked_perturb_
from .forward import lowrank_forward_
from .lowrank import aligned_core, lowrank_perturb_
from .noise import box_muller, fma, noise, stochastic_round, words
from .preconditioned import preconditioned_
from .reduction import reduce

name = "reference"

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
