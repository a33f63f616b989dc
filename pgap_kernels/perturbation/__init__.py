"""How a direction reaches the forward, and how an update reaches the weights: three modes behind one interface.

    inplace   the weights are written +-eps; any closure; exact to rounding in float32, drifts in 16-bit
    scratch   a layer runs on a perturbed copy in one reused buffer; the weights see updates only
    folded    U Z V^T acts on the layer's output; the weights are written once per window

Imports: choice -> folded -> scratch -> (hooks, arena) and inplace -> base -> (residual) -> direction.
"""

from .base import Perturbation, Update, Write, all_or_nothing
from .choice import MODES, Choice, build, choose
from .direction import Dense, Direction, Part, PerWeight, Subspace, Term, Weight, buckets
from .folded import Folded
from .inplace import InPlace
from .residual import Residual
from .scratch import Scratch
from .surroundings import Autocast, ForwardState, uninterrupted

__all__ = [
    "MODES",
    "Autocast",
    "Choice",
    "Dense",
    "Direction",
    "Folded",
    "ForwardState",
    "InPlace",
    "Part",
    "PerWeight",
    "Perturbation",
    "Residual",
    "Scratch",
    "Subspace",
    "Term",
    "Update",
    "Weight",
    "Write",
    "all_or_nothing",
    "buckets",
    "build",
    "choose",
    "uninterrupted",
]
