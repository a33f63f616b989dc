"""What a method moves along: a direction is a vector of parts, a pass is what a part does to its weights.

    Weight      a tensor and its identity
    Part        what one op call adds to some weights: Noise, LowRank, Blend, Quotient or Anchored; a new kind is a
                file here
    Direction   a vector of parts
    Pass        a part, a decay and a rounding key: runs, has an inverse, is counted

Imports: passes -> blend, and passes, anchored -> direction, noise, lowrank, blend, quotient -> part -> weight.
"""

from .anchored import Anchored, line_through
from .blend import Blend
from .direction import Direction, add_parts, check_amounts
from .lowrank import Factor, LowRank, Term, concatenated, draw_factor, product_of_draws
from .noise import Mask, Noise
from .part import Fold, Operands, Part
from .passes import Pass, RulePass, bytes_of, run_all_or_none, with_padding_kept, write_context
from .quotient import Quotient, Ratio
from .weight import Amounts, Weight, address, address_range, bucket, scalar_if_equal, storage

__all__ = [
    "Amounts",
    "Anchored",
    "Blend",
    "Direction",
    "Factor",
    "Fold",
    "LowRank",
    "Mask",
    "Noise",
    "Operands",
    "Part",
    "Pass",
    "Quotient",
    "Ratio",
    "RulePass",
    "Term",
    "Weight",
    "add_parts",
    "address",
    "address_range",
    "bucket",
    "bytes_of",
    "check_amounts",
    "concatenated",
    "draw_factor",
    "line_through",
    "product_of_draws",
    "run_all_or_none",
    "scalar_if_equal",
    "storage",
    "with_padding_kept",
    "write_context",
]
