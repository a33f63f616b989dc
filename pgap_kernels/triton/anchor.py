"""W <- round(fma(c, X, W0)) with X = Delta, or W - W0 in float32; one read of each, one write."""

import torch
import triton
import triton.language as tl

from .config import DENSE
from .dense import tile_words
from .launch import TYPES, dense_table, guard, iota, launch, on, widened
from .rounding import stochastic
from .tiles import (
    COLUMNS,
    EXTRA,
    IN,
    OUT,
    SCALAR,
    TENSOR_ID,
    address,
    counters,
    is_whole,
    load_tile,
    locate,
    offsets,
    store_tile,
)


@triton.jit
def anchor_kernel(
    map_ptr,
    table_ptr,
    skip_ptr,
    coefficient_ptr,
    rounding_ptr,
    iota_ptr,
    TYPE: tl.constexpr,
    ANCHOR_TYPE: tl.constexpr,
    DELTA_TYPE: tl.constexpr,
    STORED: tl.constexpr,  # IN is Delta, else W
    STOCHASTIC: tl.constexpr,
):
    """One tile of one tensor."""
    entry, row, group, base = locate(map_ptr, table_ptr)
    if tl.load(skip_ptr) != 0:
        return
    offset = (group << 12) - base
    columns = tl.load(entry + COLUMNS)
    whole = is_whole(entry, group, base)
    r = offsets()
    x = load_tile(address(entry, IN, 1, row, offset, DELTA_TYPE), r, offset, columns, whole, DELTA_TYPE)
    origin = load_tile(address(entry, EXTRA, 2, row, offset, ANCHOR_TYPE), r, offset, columns, whole, ANCHOR_TYPE)
    if not STORED:
        x = x - origin
    value = tl.fma(x, tl.load(coefficient_ptr + tl.load(entry + SCALAR)), origin)
    if STOCHASTIC:
        tensor_id = tl.load(entry + TENSOR_ID).to(tl.uint32)
        value = stochastic(value, tile_words(group, counters(iota_ptr), tensor_id, tl.load(rounding_ptr)), TYPE)
    store_tile(address(entry, OUT, 0, row, offset, TYPE), r, offset, columns, whole, value, TYPE)


def anchor_affine_(weights, out, arguments):
    """``ops.anchor_affine_`` in one launch."""
    anchors, deltas, coefficient, tensor_ids, rounding_key, slices = arguments
    device, dtype = weights[0].device, weights[0].dtype
    (c,), per_tensor = widened(device, coefficient)
    source = deltas or weights
    tensors = dense_table(out, source, tensor_ids, slices, per_tensor, anchors)
    launch(
        anchor_kernel,
        tensors.tiles,
        device,
        DENSE[dtype],
        map_ptr=tensors.map,
        table_ptr=tensors.entries,
        skip_ptr=guard(device, coefficient),
        coefficient_ptr=c,
        rounding_ptr=iota(device) if rounding_key is None else on(device, rounding_key),
        iota_ptr=iota(device),
        TYPE=TYPES[dtype],
        ANCHOR_TYPE=TYPES[anchors[0].dtype],
        DELTA_TYPE=TYPES[source[0].dtype],
        STORED=bool(deltas),
        STOCHASTIC=rounding_key is not None and dtype != torch.float32,
    )
