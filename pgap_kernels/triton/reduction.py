"""sum z(key) T, sum T^2 or sum (T - T0)^2 per tensor, in float64, without atomics.

One program sums a tile and writes its part; a second launch, one program per tensor, sums the parts in their order. The
result depends on the tensor alone.
"""

import torch
import triton
import triton.language as tl

from .config import DENSE, Config
from .launch import TYPES, dense_table, iota, is_nvidia, launch, on
from .noise import group_noise
from .tiles import (
    BLOCK,
    COLUMNS,
    EXTRA,
    FIELDS,
    FIRST_TILE,
    IN,
    TENSOR_ID,
    TILES,
    address,
    counters,
    is_whole,
    load_lane,
    locate,
    offsets,
    pick,
)


@triton.jit
def reduce_kernel(
    map_ptr,
    table_ptr,
    keys_ptr,
    iota_ptr,
    parts_ptr,
    TYPE: tl.constexpr,
    ANCHOR_TYPE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    FAST: tl.constexpr,
    FORM: tl.constexpr,  # dot, square or distance
):
    """The part of one tile."""
    entry, row, group, base = locate(map_ptr, table_ptr)
    offset = (group << 12) - base
    columns = tl.load(entry + COLUMNS)
    whole = is_whole(entry, group, base)
    r = offsets()
    if FORM == "dot":
        tensor_id = tl.load(entry + TENSOR_ID).to(tl.uint32)
        z0, z1, z2, z3 = group_noise(group, counters(iota_ptr), tensor_id, tl.load(keys_ptr), DISTRIBUTION, FAST)
    place, anchor = address(entry, IN, 1, row, offset, TYPE), address(entry, EXTRA, 2, row, offset, ANCHOR_TYPE)
    total = tl.zeros((BLOCK // 8, 8), tl.float64)
    for lane in range(4):
        x = load_lane(place, lane, r, offset, columns, whole, TYPE)
        if FORM == "distance":
            x = x - load_lane(anchor, lane, r, offset, columns, whole, ANCHOR_TYPE)
        other = x
        if FORM == "dot":
            other = pick(lane, z0, z1, z2, z3)
        total += x.to(tl.float64) * other.to(tl.float64)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.reshape(total, (BLOCK,)), 0))


@triton.jit
def collect_kernel(table_ptr, parts_ptr, totals_ptr, STEP: tl.constexpr):
    """The sum of one tensor's parts."""
    t = tl.program_id(0).to(tl.int64)
    entry = table_ptr + t * FIELDS
    first, count = tl.load(entry + FIRST_TILE), tl.load(entry + TILES)
    total = tl.zeros((STEP,), tl.float64)
    for begin in range(0, count, STEP):
        i = begin + tl.arange(0, STEP)
        total += tl.load(parts_ptr + first + i, mask=i < count, other=0.0)
    tl.store(totals_ptr + t, tl.sum(total, 0))


def reduce(tensors, arguments):
    """``ops.seeded_dot`` and ``ops.squared_norms`` in two launches."""
    anchors, keys, tensor_ids, slices, distribution, tier = arguments
    device, dtype = tensors[0].device, tensors[0].dtype
    table = dense_table(tensors, tensors, tensor_ids, slices, False, anchors)
    parts = torch.empty(max(table.tiles, 1), dtype=torch.float64, device=device)
    totals = torch.empty(len(tensors), dtype=torch.float64, device=device)
    launch(
        reduce_kernel,
        table.tiles,
        device,
        DENSE[dtype],
        map_ptr=table.map,
        table_ptr=table.entries,
        keys_ptr=on(device, keys) if len(keys) else iota(device),
        iota_ptr=iota(device),
        parts_ptr=parts,
        TYPE=TYPES[dtype],
        ANCHOR_TYPE=TYPES[anchors[0].dtype] if anchors else TYPES[dtype],
        DISTRIBUTION=distribution,
        FAST=tier == "fast" and is_nvidia(device),
        FORM="dot" if len(keys) else "distance" if anchors else "square",
    )
    arguments = {"table_ptr": table.entries, "parts_ptr": parts, "totals_ptr": totals}
    launch(collect_kernel, len(tensors), device, Config(), **arguments, STEP=1024)
    return totals
