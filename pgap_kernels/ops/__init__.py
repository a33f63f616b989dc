"""Every op: schema, fake, checks, docstring, public function. The one door to the backends.

A public function takes lists of tensors, checks everything before anything is written, and passes scalars and keys in
small tensors, in the record of its family (``arguments``). Formulas are those of docs/kernels.md; a weight is rounded
once, when it is written. A file here has its namesakes in ``reference`` and ``triton``.

A compiled function (``torch.compile``) holds the public functions in its graph: their checks run while it is traced,
but for those that read memory (``_library.traceable``). The ops themselves, ``torch.ops.pgap_kernels.*``, take the
fields of the record as keywords.
"""

from ._library import torch_ops, write_into
from .anchor import anchor_affine_
from .dense import assemble_gradient_, dense_perturb_, draw, mask_arguments, masked_perturb_, threshold_bits
from .forward import add_lowrank_, lowrank_forward_
from .lowrank import MAX_RANK, aligned_core, lowrank_perturb_
from .preconditioned import (
    AdamRule,
    AdaMURule,
    HELENERule,
    HiZOORule,
    MomentumRule,
    Rule,
    preconditioned_perturb_,
    preconditioned_update_,
)
from .reduction import seeded_dot, squared_norms
from .skipped import raise_if_skipped

__all__ = [
    "MAX_RANK",
    "AdaMURule",
    "AdamRule",
    "HELENERule",
    "HiZOORule",
    "MomentumRule",
    "Rule",
    "add_lowrank_",
    "aligned_core",
    "anchor_affine_",
    "assemble_gradient_",
    "dense_perturb_",
    "draw",
    "lowrank_forward_",
    "lowrank_perturb_",
    "mask_arguments",
    "masked_perturb_",
    "preconditioned_perturb_",
    "preconditioned_update_",
    "raise_if_skipped",
    "seeded_dot",
    "squared_norms",
    "threshold_bits",
    "torch_ops",
    "write_into",
]
