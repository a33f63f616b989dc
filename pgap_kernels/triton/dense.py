"""Dense seeded noise, one read and one write of W, or none of it read.

delta = a_1 z_1;  delta = fma(a_j, z_j, delta), j = 2 ..;  delta = -0 where a mask does not keep
delta = fma(-d, W, delta) if d != 0;   W <- round(W + delta)              stage by stage
G <- delta                                                                with READ = False
"""

import itertools

import torch
import triton
import triton.language as tl

from .config import DENSE, FOUR_EACH
from .launch import TYPES, dense_table, guard, iota, is_nvidia, launch, on, widened
from .noise import group_noise, group_words
from .rounding import narrow, stochastic
from .tiles import (
    BLOCK,
    COLUMNS,
    EXTRA,
    IN,
    OUT,
    ROWS,
    SCALAR,
    TENSOR_ID,
    address,
    counters,
    is_whole,
    load_tile,
    locate,
    offsets,
    stack,
    store_tile,
)


@triton.jit
def tile_noise(group, r, tensor_id, key, DISTRIBUTION: tl.constexpr, FAST: tl.constexpr):
    """z of a tile, stacked."""
    z0, z1, z2, z3 = group_noise(group, r, tensor_id, key, DISTRIBUTION, FAST)
    return stack(z0, z1, z2, z3)


@triton.jit
def tile_words(group, r, tensor_id, key):
    """Words of a tile's elements, stacked."""
    x0, x1, x2, x3 = group_words(group, r, tensor_id, key)
    return stack(x0, x1, x2, x3)


@triton.jit
def landed(value, delta, decay, DECAY: tl.constexpr):
    """W + delta with the decay, in float32."""
    if DECAY:
        if decay != 0:
            delta = tl.fma(value, -decay, delta)
    return value + delta


@triton.jit
def lane_bits(bits_ptr, first, size):
    """Bits first + 8 i + j of a mask of ``size`` bits, (BLOCK / 8, 8): a row's 8 lie in two bytes."""
    e = first + tl.arange(0, BLOCK // 8)[:, None] * 8
    byte = e >> 3
    low = tl.load(bits_ptr + byte, mask=(e >= 0) & (e < size), other=0).to(tl.uint8).to(tl.int32)
    high = tl.load(bits_ptr + byte + 1, mask=(e >= -8) & ((byte + 1) * 8 < size), other=0).to(tl.uint8).to(tl.int32)
    return ((low | high << 8) >> ((e & 7).to(tl.int32) + tl.arange(0, 8)[None, :])) & 1


@triton.jit(do_not_specialize=["stages", "draws", "stride"])
def dense_kernel(
    map_ptr,
    table_ptr,
    skip_ptr,  # not 0: a device scalar is not finite, nothing is written
    keys_ptr,
    coefficients_ptr,
    decay_ptr,
    rounding_ptr,
    iota_ptr,
    ends_ptr,  # draws before the end of each stage
    stages,
    draws,  # of the only stage
    stride,  # columns of coefficients, decay and mask level
    mask_key_ptr,
    mask_level_ptr,
    TYPE: tl.constexpr,
    READ: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    FAST: tl.constexpr,
    STAGED: tl.constexpr,  # more than one stage
    DRAWS: tl.constexpr,  # of the only stage; 0: any number, looped
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASK: tl.constexpr,
):
    """One tile of one tensor; formula at the top of the file."""
    entry, row, group, base = locate(map_ptr, table_ptr)
    if tl.load(skip_ptr) != 0:
        return
    offset = (group << 12) - base  # column of the tile's first element; negative where the row begins inside the tile
    columns = tl.load(entry + COLUMNS)
    tensor_id = tl.load(entry + TENSOR_ID).to(tl.uint32)
    scalar = tl.load(entry + SCALAR)
    whole = is_whole(entry, group, base)
    r, counter = offsets(), counters(iota_ptr)
    source = address(entry, IN, 1, row, offset, TYPE)
    value = tl.zeros((BLOCK // 8, 8, 2, 2), tl.float32)
    w = value.to(TYPE)  # the value between stages
    if STAGED:
        w = narrow(load_tile(source, r, offset, columns, whole, TYPE), TYPE)
    begin = 0
    for stage in range(stages if STAGED else 1):
        end = tl.load(ends_ptr + stage) if STAGED else draws
        # From -0 the first fma is the product, sign of zero included; a stage without draws adds +0.
        delta = tl.full((BLOCK // 8, 8, 2, 2), tl.where(begin == end, 0.0, -0.0) if STAGED else -0.0, tl.float32)
        if DRAWS > 0:
            for j in tl.static_range(DRAWS):
                z = tile_noise(group, counter, tensor_id, tl.load(keys_ptr + j), DISTRIBUTION, FAST)
                delta = tl.fma(z, tl.load(coefficients_ptr + j * stride + scalar), delta)
        else:
            for j in range(begin, end):
                z = tile_noise(group, counter, tensor_id, tl.load(keys_ptr + j), DISTRIBUTION, FAST)
                delta = tl.fma(z, tl.load(coefficients_ptr + j * stride + scalar), delta)
        begin = end
        if READ:
            if STAGED:
                value = w.to(tl.float32)
            else:  # late, so that W takes no registers while the noise is made
                value = load_tile(source, r, offset, columns, whole, TYPE)
            if MASK == "threshold":
                delta = tl.where(tl.abs(value) <= tl.load(mask_level_ptr + scalar), delta, -0.0)
            elif MASK == "share":
                word = tile_words(group, counter, tensor_id, tl.load(mask_key_ptr))
                delta = tl.where(word.to(tl.int64) < tl.load(mask_level_ptr + scalar), delta, -0.0)
            elif MASK == "bits":
                bits_ptr = tl.load(entry + EXTRA).to(tl.pointer_type(tl.int8))
                first, size = row * columns + offset, tl.load(entry + ROWS) * columns
                k0, k1 = lane_bits(bits_ptr, first, size), lane_bits(bits_ptr, first + 1024, size)
                k2, k3 = lane_bits(bits_ptr, first + 2048, size), lane_bits(bits_ptr, first + 3072, size)
                delta = tl.where(stack(k0, k1, k2, k3) != 0, delta, -0.0)
            value = landed(value, delta, tl.load(decay_ptr + stage * stride + scalar), DECAY)
            if STOCHASTIC:
                word = tile_words(group, counter, tensor_id, tl.load(rounding_ptr + stage))
                value = stochastic(value, word, TYPE)
            if STAGED:
                w = narrow(value, TYPE)
        else:
            value = delta
    if STAGED:
        value = w.to(tl.float32)
    store_tile(address(entry, OUT, 0, row, offset, TYPE), r, offset, columns, whole, value, TYPE)


def _run(out, source, arguments, decay, rounding_keys, stages, **mask):
    keys, coefficients, tensor_ids = arguments.keys, arguments.coefficients, arguments.tensor_ids
    slices, distribution, tier = arguments.slices, arguments.distribution, arguments.tier
    device = out[0].device
    tables, per_tensor = widened(device, coefficients, decay, mask.get("level", decay))
    tensors = dense_table(out, source, tensor_ids, slices, per_tensor, mask.get("bits", ()), same_shape=False)
    ends = list(itertools.accumulate(stages))
    keys = on(device, keys)
    staged = len(stages) > 1 or stages[0] == 0
    launch(
        dense_kernel,
        tensors.tiles,
        device,
        FOUR_EACH if staged else DENSE[out[0].dtype],
        map_ptr=tensors.map,
        table_ptr=tensors.entries,
        skip_ptr=guard(device, coefficients, decay, *([mask["level"]] if "level" in mask else [])),
        keys_ptr=keys,
        coefficients_ptr=tables[0],
        decay_ptr=tables[1],
        rounding_ptr=keys if rounding_keys is None else on(device, rounding_keys),
        ends_ptr=on(device, torch.tensor(ends, dtype=torch.int32)),
        iota_ptr=iota(device),
        stages=len(stages),
        draws=stages[0],
        stride=tables[0].shape[1],
        mask_key_ptr=on(device, mask["key"]) if "key" in mask else keys,
        mask_level_ptr=tables[2],
        TYPE=TYPES[out[0].dtype],
        READ=bool(source),
        DISTRIBUTION=distribution,
        FAST=tier == "fast" and is_nvidia(device),
        STAGED=staged,
        DRAWS=stages[0] if len(stages) == 1 and stages[0] in (1, 2) else 0,
        DECAY=decay.device == device or bool(decay.any()),
        STOCHASTIC=rounding_keys is not None and out[0].dtype != torch.float32,
        MASK=mask.get("kind", "none"),
    )


def dense_perturb_(weights, out, arguments):
    """``ops.dense_perturb_`` in one launch."""
    _run(out, weights, arguments, arguments.decay, arguments.rounding_keys, arguments.stages)


def assemble_gradient_(gradients, arguments):
    """``ops.assemble_gradient_`` in one launch."""
    _run(gradients, [], arguments, torch.zeros(1, 1), None, [len(arguments.keys)])


def masked_perturb_(weights, out, arguments):
    """``ops.masked_perturb_`` in one launch."""
    kind, key, level, bits = arguments.mask, arguments.mask_key, arguments.mask_level, arguments.mask_bits
    stages = [len(arguments.keys)]
    mask = {"kind": kind, "key": key, "level": level, "bits": bits}
    _run(out, weights, arguments, arguments.decay, arguments.rounding_key, stages, **mask)
