"""How perturbations reach the forward pass, and how an update reaches the weights: three modes behind one interface.

    inplace   the weights are written W + point; any closure; exact up to rounding in float32, drifts in 16-bit
    scratch   a layer runs on a perturbed copy in one reused buffer; the weights see updates only
    folded    a low-rank direction acts on the layer's output; the weights see updates only

Imports: modes -> folded -> folds, scratch -> stacked, vectors -> arena -> hooks -> readers, and inplace -> base ->
residual -> step_context; beside: observers.
"""

from .base import Perturbation, StateRule, Update
from .compiled import is_called_compiled, uncompiled
from .folded import Folded
from .hooks import CONV1D, LINEAR, kind_of, modules_of
from .inplace import InPlace
from .modes import MERGES, MODES, Choice, build, check_options, choose, unfolded
from .observers import observing
from .readers import in_several_processes, merge_for
from .residual import Residual
from .scratch import Scratch
from .step_context import Ambient, Autocast, ForwardState, outside_ambient_state, uninterrupted, version_of

__all__ = [
    "CONV1D",
    "LINEAR",
    "MERGES",
    "MODES",
    "Ambient",
    "Autocast",
    "Choice",
    "Folded",
    "ForwardState",
    "InPlace",
    "Perturbation",
    "Residual",
    "Scratch",
    "StateRule",
    "Update",
    "build",
    "check_options",
    "choose",
    "in_several_processes",
    "is_called_compiled",
    "kind_of",
    "merge_for",
    "modules_of",
    "observing",
    "outside_ambient_state",
    "uncompiled",
    "unfolded",
    "uninterrupted",
    "version_of",
]
