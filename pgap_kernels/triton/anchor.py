"""W <- round(fma(c, X, W0)) with X = Delta, or W - W0 in float32; one read of each, one write."""

import triton
import triton.language as tl

from ..arguments import AnchorArguments
from .cache import broadcast_scalars, counter_table, keys_on
from .config import DENSE
from .guard import guard
from .launch import launch
from .rounding import TYPES, stochastic, update_of
from .table import EXTRA0, IN, OUT, dense_table
from .tiles import address, counters, load_tile, locate, store_tile, tile_words

ANCHOR = EXTRA0


@triton.jit
def anchor_kernel(
    table,
    skip_ptr,
    counters_ptr,
    coefficient_ptr,
    rounding_key_ptr,
    ANCHOR_TYPE: tl.constexpr,
    DELTA_TYPE: tl.constexpr,  # Delta's dtype, and IN is Delta; None: IN is W
    UPDATE: tl.constexpr,
):
    """One tile of one tensor."""
    tile = locate(table)
    if tl.load(skip_ptr) != 0:
        return
    SOURCE_TYPE: tl.constexpr = UPDATE.dtype if DELTA_TYPE is None else DELTA_TYPE
    x = load_tile(tile, address(tile, IN, SOURCE_TYPE), SOURCE_TYPE)
    origin = load_tile(tile, address(tile, ANCHOR, ANCHOR_TYPE), ANCHOR_TYPE)
    if DELTA_TYPE is None:
        x = x - origin
    value = tl.fma(x, tl.load(coefficient_ptr + tile.scalar), origin)
    if UPDATE.stochastic:
        word = tile_words(tile, counters(counters_ptr), tl.load(rounding_key_ptr))
        value = stochastic(value, word, UPDATE.dtype)
    store_tile(tile, address(tile, OUT, UPDATE.dtype), value, UPDATE.dtype)


def anchor_affine_(weights, out, arguments: AnchorArguments):
    """``ops.anchor_affine_`` in one launch."""
    device, anchors, deltas = weights[0].device, arguments.anchors, arguments.deltas
    (coefficient,), per_tensor = broadcast_scalars(device, arguments.coefficient)
    table = dense_table(out, deltas or weights, arguments.tensor_ids, arguments.slices, per_tensor, anchors)
    launch(
        anchor_kernel,
        table.programs,
        device,
        DENSE[weights[0].dtype],
        table=table.pointers,
        skip_ptr=guard(device, arguments.coefficient),
        counters_ptr=counter_table(device),
        coefficient_ptr=coefficient,
        rounding_key_ptr=keys_on(device, arguments.rounding_key),
        ANCHOR_TYPE=TYPES[anchors[0].dtype],
        DELTA_TYPE=TYPES[deltas[0].dtype] if deltas else None,
        UPDATE=update_of(weights[0], None, arguments.rounding_key),
    )
