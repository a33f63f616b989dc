"""Zeroth-order optimizers: closure-based ``torch.optim.Optimizer`` classes, each a short recipe over the ops."""

from .base import NonFiniteLossError, ZOOptimizer
from .mezo import MeZO
from .pgap import PGAP

__all__ = ["PGAP", "MeZO", "NonFiniteLossError", "ZOOptimizer"]
