"""Zeroth-order optimizers: closure-based ``torch.optim.Optimizer`` classes, each a short recipe.

A method says which directions, how losses become coefficients and how coefficients become an update. It owns no kernel
and knows no mode.

Imports: registry -> recipes -> gradient_subspace -> lowrank -> base -> (checkpoint, cost), drawing -> sampling, mode ->
model -> evaluation, weights, last -> signal, scores, options; beside them captured -> base.
"""

from .agzo import AGZO
from .base import Cost, Evaluation, NonFiniteLossError, ZOOptimizer
from .captured import CapturedClosure
from .dizo import DiZO
from .eggroll import EGGROLL
from .fzoo import FZOO
from .helene import HELENE
from .hizoo import HiZOO
from .last import LastStep
from .lezo import AdaLeZO, LeZO
from .loren import LOREN
from .lowrank import LowRankOptimizer
from .lozo import LOZO
from .lozo_m import LOZOM
from .mezo import MeZO
from .mezo_moments import MeZOAdam, MeZOMomentum
from .pgap import PGAP
from .pizo import PIZO, PIZOSubZero
from .registry import available_methods, make_optimizer, method_options
from .sampling import Sampling
from .signal import Signal, SignalRule
from .sparse_mezo import SparseMeZO
from .subzero import SubZero
from .svd0 import SVD0
from .tezo import TeZO
from .zo_adamu import ZOAdaMU
from .zo_muon import ZOMuon

__all__ = [
    "AGZO",
    "EGGROLL",
    "FZOO",
    "HELENE",
    "LOREN",
    "LOZO",
    "LOZOM",
    "PGAP",
    "PIZO",
    "SVD0",
    "AdaLeZO",
    "CapturedClosure",
    "Cost",
    "DiZO",
    "Evaluation",
    "HiZOO",
    "LastStep",
    "LeZO",
    "LowRankOptimizer",
    "MeZO",
    "MeZOAdam",
    "MeZOMomentum",
    "NonFiniteLossError",
    "PIZOSubZero",
    "Sampling",
    "Signal",
    "SignalRule",
    "SparseMeZO",
    "SubZero",
    "TeZO",
    "ZOAdaMU",
    "ZOMuon",
    "ZOOptimizer",
    "available_methods",
    "make_optimizer",
    "method_options",
]
