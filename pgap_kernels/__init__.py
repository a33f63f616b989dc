"""Fused kernels for zeroth-order fine-tuning: the same noise bits everywhere, one pass over a weight."""

from . import noise
from ._version import __version__
from .ops import aligned_core, assemble_gradient_, dense_perturb_, draw, lowrank_perturb_

__all__ = ["__version__", "aligned_core", "assemble_gradient_", "dense_perturb_", "draw", "lowrank_perturb_", "noise"]
