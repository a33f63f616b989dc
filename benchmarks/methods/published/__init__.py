"""Methods as the published code does them, in plain PyTorch: noise from ``torch.normal`` for one parameter at a time,
drawn anew in every pass, and elementwise ops out of place.

MeZO and P-GAP, which `pgap-kernels finetune` compares itself with, are in `pgap_kernels.finetune.baseline`. What the
authors' code does beside the method is left out: weight decay, the forward that HiZOO takes for its log, the copies of
all noise that DiZO keeps by an oversight. We found no public code of AGZO, HELENE, TeZO, SVD-0, LeZO and Sparse-MeZO;
MeZO's Adam is that of a library, on stored gradients, ZO-AdaMU's code does not run, and EGGROLL's is for other
frameworks.
"""

from __future__ import annotations

from pgap_kernels.finetune.baseline import Baseline, BaselineMeZO, BaselinePGAP

from .dense import PIZO, AdaLeZO, DiZO, HiZOO
from .lowrank import LOZO, LOZOM, SubZero
from .one_sided import FZOO, LOREN, ZOMuon

PUBLISHED: dict[str, type[Baseline]] = {
    "adalezo": AdaLeZO,
    "dizo": DiZO,
    "fzoo": FZOO,
    "hizoo": HiZOO,
    "loren": LOREN,
    "lozo": LOZO,
    "lozo-m": LOZOM,
    "mezo": BaselineMeZO,
    "pgap": BaselinePGAP,
    "pizo": PIZO,
    "subzero": SubZero,
    "zo-muon": ZOMuon,
}
