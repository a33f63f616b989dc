"""Fused kernels for zeroth-order fine-tuning: the same noise bits everywhere, one pass over a weight."""

from . import noise
from ._version import __version__
from .backends import use_backend
from .losses import per_example_loss
from .ops import (
    AdamRule,
    AdaMURule,
    HELENERule,
    HiZOORule,
    MomentumRule,
    aligned_core,
    anchor_affine_,
    assemble_gradient_,
    dense_perturb_,
    draw,
    lowrank_forward_,
    lowrank_perturb_,
    masked_perturb_,
    preconditioned_perturb_,
    preconditioned_update_,
    raise_if_skipped,
    seeded_dot,
    squared_norms,
    threshold_bits,
)

__all__ = [
    "AdaMURule",
    "AdamRule",
    "HELENERule",
    "HiZOORule",
    "MomentumRule",
    "__version__",
    "aligned_core",
    "anchor_affine_",
    "assemble_gradient_",
    "dense_perturb_",
    "draw",
    "lowrank_forward_",
    "lowrank_perturb_",
    "masked_perturb_",
    "noise",
    "per_example_loss",
    "preconditioned_perturb_",
    "preconditioned_update_",
    "raise_if_skipped",
    "seeded_dot",
    "squared_norms",
    "threshold_bits",
    "use_backend",
]
