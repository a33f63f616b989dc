"""Zeroth-order optimizers: closure-based ``torch.optim.Optimizer`` classes, each a short recipe.

A method says which directions, how losses become coefficients and how coefficients become an update. It owns no kernel
and knows no mode.

Imports: registry -> recipes -> gradient_subspace -> lowrank -> base -> (checkpoint, cost), drawing -> sampling, mode ->
model -> evaluation, signal, weights, options; beside them captured -> base.
"""

from .agzo import AGZO
from .base import Cost, Evaluation, NonFiniteLossError, ZOOptimizer
from .captured import CapturedClosure
from .dizo import DiZO
from .eggroll import EGGROLL
from .helene import HELENE
from .loren import LOREN
from .lowrank import LowRankOptimizer
from .lozo import LOZO
from .lozo_m import LOZOM
from .mezo import MeZO
from .pgap import PGAP
from .pizo import PIZO
from .registry import available_methods, make_optimizer, method_options
from .sampling import Sampling
from .signal import Signal, SignalRule

__all__ = [
    "AGZO",
    "EGGROLL",
    "HELENE",
    "LOREN",
    "LOZO",
    "LOZOM",
    "PGAP",
    "PIZO",
    "CapturedClosure",
    "Cost",
    "DiZO",
    "Evaluation",
    "LowRankOptimizer",
    "MeZO",
    "NonFiniteLossError",
    "Sampling",
    "Signal",
    "SignalRule",
    "ZOOptimizer",
    "available_methods",
    "make_optimizer",
    "method_options",
]
