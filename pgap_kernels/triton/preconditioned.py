"""Weights and their state in one read and one write; rules and scalars in ``ops.preconditioned``.

g = sum_j c_j z_j,  b = sum_j r_j z_j;   new state and delta by the rule;  delta = fma(-d, W, delta) if d != 0
W <- round(W + delta)
"""

import triton
import triton.language as tl

from .config import FOUR_EACH
from .dense import landed, tile_noise
from .launch import TYPES, dense_table, guard, iota, is_nvidia, launch, on, widened
from .noise import group_words
from .rounding import stochastic
from .tiles import (
    BLOCK,
    COLUMNS,
    EXTRA,
    IN,
    OUT,
    SCALAR,
    SECOND,
    TENSOR_ID,
    address,
    counters,
    is_whole,
    lanes,
    load_lane,
    locate,
    offsets,
    pick,
    store_lane,
)


@triton.jit
def rule_lane(
    z,
    g,
    b,
    first_place,
    second_place,
    lane,
    r,
    offset,
    columns,
    whole,
    s_ptr,  # the rule's scalars, ``stride`` apart
    stride,
    RULE: tl.constexpr,
):
    """delta of one lane; its state is read and written."""
    first = load_lane(first_place, lane, r, offset, columns, whole, tl.float32)
    if RULE == "perturb":
        delta = tl.div_rn(b, tl.sqrt_rn(first))
    elif RULE == "momentum":
        first = tl.fma(first, tl.load(s_ptr + stride), g)
        delta = tl.fma(first, -tl.load(s_ptr), b)
    elif RULE == "hizoo":
        grown = tl.load(s_ptr + 2 * stride) * first
        new = tl.fma(grown, z * z, tl.load(s_ptr + stride) * first)
        delta = tl.fma(tl.div_rn(g, tl.sqrt_rn(new)), -tl.load(s_ptr), tl.div_rn(b, tl.sqrt_rn(first)))
        first = new
    else:
        first = tl.fma(first, tl.load(s_ptr + stride), tl.load(s_ptr + 2 * stride) * g)
        second = load_lane(second_place, lane, r, offset, columns, whole, tl.float32)
        if RULE == "adam":
            second = tl.fma(second, tl.load(s_ptr + 3 * stride), tl.load(s_ptr + 4 * stride) * (g * g))
            scale = tl.sqrt_rn(second * tl.load(s_ptr + 5 * stride)) + tl.load(s_ptr + 6 * stride)
        else:
            if RULE == "helene_refresh":
                second = tl.fma(second, tl.load(s_ptr + 6 * stride), tl.load(s_ptr + 7 * stride) * (g * g))
            floor = tl.load(s_ptr + 4 * stride)
            above = tl.where(second > floor, second, floor)
            scale = tl.fma(above, tl.load(s_ptr + 3 * stride), tl.load(s_ptr + 5 * stride))
        delta = tl.fma(tl.div_rn(first, scale), -tl.load(s_ptr), b)
        if RULE != "helene":
            store_lane(second_place, lane, r, offset, columns, whole, second, tl.float32)
    if RULE != "perturb":
        store_lane(first_place, lane, r, offset, columns, whole, first, tl.float32)
    return delta


@triton.jit(do_not_specialize=["draws", "stride"])
def preconditioned_kernel(
    map_ptr,
    table_ptr,
    skip_ptr,
    keys_ptr,
    gradient_ptr,  # c
    restore_ptr,  # r
    scalars_ptr,  # of the rule, in its order
    decay_ptr,
    rounding_ptr,
    iota_ptr,
    draws,
    stride,  # columns of the four tables
    TYPE: tl.constexpr,
    RULE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    FAST: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One tile of one tensor; formula at the top of the file."""
    entry, row, group, base = locate(map_ptr, table_ptr)
    if tl.load(skip_ptr) != 0:
        return
    offset = (group << 12) - base
    columns = tl.load(entry + COLUMNS)
    tensor_id = tl.load(entry + TENSOR_ID).to(tl.uint32)
    scalar = tl.load(entry + SCALAR)
    whole = is_whole(entry, group, base)
    r, counter = offsets(), counters(iota_ptr)
    first_place = address(entry, EXTRA, 2, row, offset, tl.float32)
    second_place = first_place
    if RULE == "adam" or RULE == "helene" or RULE == "helene_refresh":
        second_place = address(entry, SECOND, 3, row, offset, tl.float32)
    source, target = address(entry, IN, 1, row, offset, TYPE), address(entry, OUT, 0, row, offset, TYPE)
    decay = tl.load(decay_ptr + scalar)
    g = tl.full((BLOCK // 8, 8, 2, 2), -0.0, tl.float32)
    b, z = g, g
    for j in range(draws):
        z = tile_noise(group, counter, tensor_id, tl.load(keys_ptr + j), DISTRIBUTION, FAST)
        g = tl.fma(z, tl.load(gradient_ptr + j * stride + scalar), g)
        b = tl.fma(z, tl.load(restore_ptr + j * stride + scalar), b)
    g0, g1, g2, g3 = lanes(g)
    b0, b1, b2, b3 = lanes(b)
    z0, z1, z2, z3 = lanes(z)
    x0, x1, x2, x3 = counter, counter, counter, counter
    if STOCHASTIC:
        x0, x1, x2, x3 = group_words(group, counter, tensor_id, tl.load(rounding_ptr))
    for lane in range(4):
        noise = (pick(lane, z0, z1, z2, z3), pick(lane, g0, g1, g2, g3), pick(lane, b0, b1, b2, b3))
        place = (first_place, second_place, lane, r, offset, columns, whole)
        delta = rule_lane(*noise, *place, scalars_ptr + scalar, stride, RULE)
        value = landed(load_lane(source, lane, r, offset, columns, whole, TYPE), delta, decay, DECAY)
        if STOCHASTIC:
            value = stochastic(value, pick(lane, x0, x1, x2, x3), TYPE)
        store_lane(target, lane, r, offset, columns, whole, value, TYPE)


def preconditioned_(weights, out, state0, state1, arguments):
    """``ops.preconditioned_update_`` and ``ops.preconditioned_perturb_`` in one launch."""
    keys, gradient, restore, scalars, rule, decay, tensor_ids, rounding_key, slices, distribution, tier = arguments
    device, dtype = weights[0].device, weights[0].dtype
    tables, per_tensor = widened(device, gradient, restore, scalars, decay)
    tensors = dense_table(out, weights, tensor_ids, slices, per_tensor, state0, state1)
    keys = on(device, keys)
    launch(
        preconditioned_kernel,
        tensors.tiles,
        device,
        FOUR_EACH,
        map_ptr=tensors.map,
        table_ptr=tensors.entries,
        skip_ptr=guard(device, gradient, restore, scalars, decay),
        keys_ptr=keys,
        gradient_ptr=tables[0],
        restore_ptr=tables[1],
        scalars_ptr=tables[2],
        decay_ptr=tables[3],
        rounding_ptr=keys if rounding_key is None else on(device, rounding_key),
        iota_ptr=iota(device),
        draws=len(keys),
        stride=tables[0].shape[1],
        TYPE=TYPES[dtype],
        RULE=rule,
        DISTRIBUTION=distribution,
        FAST=tier == "fast" and is_nvidia(device),
        DECAY=decay.device == device or bool(decay.any()),
        STOCHASTIC=rounding_key is not None and TYPES[dtype] != tl.float32,
    )
