"""Every op: schema, fake, checks, docstring, public function. The one door to the backends.

A public function takes lists of tensors, checks everything before anything is written, and passes scalars and keys in
small tensors, in the record of its family (``arguments``). Formulas are those of docs/kernels.md; a weight is rounded
once, when it is written. A file here has its namesakes in ``reference`` and ``triton``.

Under ``torch.compile`` the public functions run as they are, between graphs: their checks read addresses. The ops
themselves, ``torch.ops.pgap_kernels.*``, can be traced; they take the fields of the record as keywords.
"""

from .anchor import anchor_affine_
from .dense import assemble_gradient_, dense_perturb_, draw, masked_perturb_, threshold_bits
from .forward import lowrank_forward_
from .lowrank import MAX_RANK, aligned_core, lowrank_perturb_
from .preconditioned import HELENE, Adam, HiZOO, Momentum, preconditioned_perturb_, preconditioned_update_
from .reduction import seeded_dot, squared_norms
from .skipped import raise_if_skipped

__all__ = [
    "HELENE",
    "MAX_RANK",
    "Adam",
    "HiZOO",
    "Momentum",
    "aligned_core",
    "anchor_affine_",
    "assemble_gradient_",
    "dense_perturb_",
    "draw",
    "lowrank_forward_",
    "lowrank_perturb_",
    "masked_perturb_",
    "preconditioned_perturb_",
    "preconditioned_update_",
    "raise_if_skipped",
    "seeded_dot",
    "squared_norms",
    "threshold_bits",
]
