"""sum z(key) T, sum T^2 or sum (T - T0)^2 per tensor, in float64, without atomics.

Each program writes the sum of a tile; in a second launch, one program per tensor adds these up in order. The result
depends on the tensor alone.
"""

import torch
import triton
import triton.language as tl

from ..arguments import ReductionArguments
from .cache import counter_table, to_device_cached
from .config import DENSE, Config
from .launch import launch, noise_on
from .noise import group_noise
from .rounding import TYPES
from .table import EXTRA0, FIELDS, FIRST_TILE, IN, TILES, dense_table
from .tiles import BLOCK, address, counters, load_lane, locate, pick_lane

ANCHOR = EXTRA0


@triton.jit
def reduce_kernel(
    table,
    key_ptr,
    counters_ptr,
    parts_ptr,
    FORM: tl.constexpr,  # dot, square or distance
    TYPE: tl.constexpr,
    ANCHOR_TYPE: tl.constexpr,
    NOISE: tl.constexpr,
):
    """The sum of one tile."""
    tile = locate(table)
    place = address(tile, IN, TYPE)
    if FORM == "dot":
        z0, z1, z2, z3 = group_noise(tile.group, counters(counters_ptr), tile.tensor_id, tl.load(key_ptr), NOISE)
    elif FORM == "distance":
        anchor = address(tile, ANCHOR, ANCHOR_TYPE)
    total = tl.zeros((BLOCK // 8, 8), tl.float64)
    for lane in range(4):
        x = load_lane(tile, place, lane, TYPE)
        if FORM == "distance":
            x = x - load_lane(tile, anchor, lane, ANCHOR_TYPE)
        other = x
        if FORM == "dot":
            other = pick_lane(lane, z0, z1, z2, z3)
        total += x.to(tl.float64) * other.to(tl.float64)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.reshape(total, (BLOCK,)), 0))


@triton.jit
def sum_tiles_kernel(entries_ptr, parts_ptr, totals_ptr, STEP: tl.constexpr):
    """The sum of one tensor's tiles, in order."""
    t = tl.program_id(0).to(tl.int64)
    entry = entries_ptr + t * FIELDS
    first, count = tl.load(entry + FIRST_TILE), tl.load(entry + TILES)
    total = tl.zeros((STEP,), tl.float64)
    for begin in range(0, count, STEP):
        i = begin + tl.arange(0, STEP)
        total += tl.load(parts_ptr + first + i, mask=i < count, other=0.0)
    tl.store(totals_ptr + t, tl.sum(total, 0))


def reduce(tensors, arguments: ReductionArguments):
    """``ops.seeded_dot`` and ``ops.squared_norms`` in two launches."""
    device, dtype, anchors, keys = tensors[0].device, tensors[0].dtype, arguments.anchors, arguments.keys
    table = dense_table(tensors, tensors, arguments.tensor_ids, arguments.slices, False, anchors)
    parts = torch.empty(max(table.programs, 1), dtype=torch.float64, device=device)
    totals = torch.empty(len(tensors), dtype=torch.float64, device=device)
    launch(
        reduce_kernel,
        table.programs,
        device,
        DENSE[dtype],
        table=table.pointers,
        key_ptr=to_device_cached(device, keys) if len(keys) else None,
        counters_ptr=counter_table(device),
        parts_ptr=parts,
        FORM="dot" if len(keys) else "distance" if anchors else "square",
        TYPE=TYPES[dtype],
        ANCHOR_TYPE=TYPES[anchors[0].dtype] if anchors else None,
        NOISE=noise_on(device, arguments.distribution, arguments.tier),
    )
    totals_of = {"entries_ptr": table.pointers.entries, "parts_ptr": parts, "totals_ptr": totals}
    launch(sum_tiles_kernel, len(tensors), device, Config(), **totals_of, STEP=1024)
    return totals
