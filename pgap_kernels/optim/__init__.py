"""Zeroth-order optimizers: closure-based ``torch.optim.Optimizer`` classes, each a short recipe.

A method says which directions, how losses become coefficients and how coefficients become an update. It owns no kernel
and knows no mode.

Imports: recipes -> lowrank -> base -> (evaluation, checkpoint, cost) -> model -> weights, options. Scores stand beside.
"""

from .base import Cost, Evaluation, NonFiniteLossError, ZOOptimizer
from .lowrank import LowRankOptimizer
from .mezo import MeZO
from .pgap import PGAP

__all__ = ["PGAP", "Cost", "Evaluation", "LowRankOptimizer", "MeZO", "NonFiniteLossError", "ZOOptimizer"]
