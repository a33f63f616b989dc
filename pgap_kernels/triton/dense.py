"""Dense seeded noise: one read and one write of W, or a write alone.

delta = a_1 z_1;  delta = fma(a_j, z_j, delta), j = 2 ..;  delta = -0 where a mask drops an element
delta = fma(-d, W, delta) if d != 0;   W <- round(W + delta)              stage by stage
G <- delta                                                                where W is not read
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import AssembleArguments, DenseArguments, MaskedArguments
from .cache import broadcast_scalars, counter_table, keys_on, to_device_cached
from .config import FOUR_EACH, dense_config
from .guard import guard
from .launch import launch, noise_on
from .rounding import add_delta, negative_zero, round_to, stochastic, update_of
from .table import EXTRA0, IN, OUT, ROWS, dense_table
from .tiles import BLOCK, address, counters, load_tile, locate, stack, store_tile, tile_noise, tile_words

MASK_BITS = EXTRA0


class DenseScalars(NamedTuple):
    """Keys and scalars; tables of scalars have a row for each draw or stage."""

    keys: Tensor
    coefficients: Tensor
    decay: Tensor
    rounding_keys: Tensor | None
    stage_bounds: Tensor | None  # draws before each stage, and all of them
    mask_key: Tensor | None
    mask_level: Tensor | None


class DensePass(NamedTuple):
    """Constants of a dense pass."""

    reads: bool  # W; else the noise alone is written
    staged: bool  # more than one stage, or one without draws
    draws: int  # number of draws of the only stage, unrolled; 0: any number, in a loop
    mask: str  # none, threshold, share or bits


@triton.jit
def lane_bits(bits_ptr, first, size):
    """Bits first + 8 i + j of a mask of ``size`` bits, (BLOCK / 8, 8): a row's 8 lie in two bytes."""
    e = first + tl.arange(0, BLOCK // 8)[:, None] * 8
    byte = e >> 3
    low = tl.load(bits_ptr + byte, mask=(e >= 0) & (e < size), other=0).to(tl.uint8).to(tl.int32)
    high = tl.load(bits_ptr + byte + 1, mask=(e >= -8) & ((byte + 1) * 8 < size), other=0).to(tl.uint8).to(tl.int32)
    return ((low | high << 8) >> ((e & 7).to(tl.int32) + tl.arange(0, 8)[None, :])) & 1


@triton.jit
def masked_delta(tile, counter, w, delta, scalars, MASK: tl.constexpr):
    """delta, or -0 where the mask does not keep: adding it leaves every W as it is."""
    if MASK == "threshold":
        delta = tl.where(tl.abs(w) <= tl.load(scalars.mask_level + tile.scalar), delta, negative_zero())
    elif MASK == "share":
        word = tile_words(tile, counter, tl.load(scalars.mask_key))
        delta = tl.where(word.to(tl.int64) < tl.load(scalars.mask_level + tile.scalar), delta, negative_zero())
    elif MASK == "bits":
        bits_ptr = tl.load(tile.entry + MASK_BITS).to(tl.pointer_type(tl.int8))
        first, size = tile.row * tile.columns + tile.offset, tl.load(tile.entry + ROWS) * tile.columns
        k0, k1 = lane_bits(bits_ptr, first, size), lane_bits(bits_ptr, first + 1024, size)
        k2, k3 = lane_bits(bits_ptr, first + 2048, size), lane_bits(bits_ptr, first + 3072, size)
        delta = tl.where(stack(k0, k1, k2, k3) != 0, delta, negative_zero())
    return delta


@triton.jit(do_not_specialize=["stages", "draws", "stride"])
def dense_kernel(
    table,
    skip_ptr,  # not 0: a device scalar is not finite, nothing is written
    counters_ptr,
    scalars,
    stages,
    draws,  # of the only stage
    stride,  # columns of the tables of scalars
    NOISE: tl.constexpr,
    PASS: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """One tile of one tensor; formula at the top of the file."""
    tile = locate(table)
    if tl.load(skip_ptr) != 0:
        return
    counter = counters(counters_ptr)
    source = address(tile, IN, UPDATE.dtype)
    value = tl.zeros((BLOCK // 8, 8, 2, 2), tl.float32)
    w = value.to(UPDATE.dtype)  # the value between stages
    if PASS.staged:
        w = round_to(load_tile(tile, source, UPDATE.dtype), UPDATE.dtype)
    for stage in range(stages if PASS.staged else 1):
        # Read, not carried from stage to stage: Triton 3.6 takes the start of an inner loop for what it was at first.
        begin = tl.load(scalars.stage_bounds + stage) if PASS.staged else 0
        end = tl.load(scalars.stage_bounds + stage + 1) if PASS.staged else draws
        # From -0 the first fma is the product, sign of zero included; a stage without draws adds +0.
        zero = tl.where(begin == end, 0.0, negative_zero()) if PASS.staged else negative_zero()
        delta = tl.full((BLOCK // 8, 8, 2, 2), zero, tl.float32)
        if PASS.draws > 0:
            for j in tl.static_range(PASS.draws):
                z = tile_noise(tile, counter, tl.load(scalars.keys + j), NOISE)
                delta = tl.fma(z, tl.load(scalars.coefficients + j * stride + tile.scalar), delta)
        else:
            for j in range(begin, end):
                z = tile_noise(tile, counter, tl.load(scalars.keys + j), NOISE)
                delta = tl.fma(z, tl.load(scalars.coefficients + j * stride + tile.scalar), delta)
        if PASS.reads:
            if PASS.staged:
                value = w.to(tl.float32)
            else:  # as late as possible, so that W takes no registers while the noise is made
                value = load_tile(tile, source, UPDATE.dtype)
            delta = masked_delta(tile, counter, value, delta, scalars, PASS.mask)
            value = add_delta(value, delta, tl.load(scalars.decay + stage * stride + tile.scalar), UPDATE)
            if UPDATE.stochastic:
                word = tile_words(tile, counter, tl.load(scalars.rounding_keys + stage))
                value = stochastic(value, word, UPDATE.dtype)
            if PASS.staged:
                w = round_to(value, UPDATE.dtype)
        else:
            value = delta
    if PASS.staged:
        value = w.to(tl.float32)
    store_tile(tile, address(tile, OUT, UPDATE.dtype), value, UPDATE.dtype)


def _run(out, source, arguments, decay, rounding_keys, stages, mask: MaskedArguments | None = None):
    device, coefficients = out[0].device, arguments.coefficients
    level, bits = (mask.mask_level, mask.mask_bits) if mask else (decay, [])
    tables, per_tensor = broadcast_scalars(device, coefficients, decay, level)
    table = dense_table(out, source, arguments.tensor_ids, arguments.slices, per_tensor, bits, same_shape=False)
    staged = len(stages) > 1 or stages[0] == 0
    bounds = None
    if staged:
        ends = torch.tensor([*itertools.accumulate(stages, initial=0)], dtype=torch.int32, device="cpu")
        bounds = to_device_cached(device, ends)
    update, draws = update_of(out[0], decay, rounding_keys), stages[0] if not staged and stages[0] <= 2 else 0
    config = (
        FOUR_EACH if staged else dense_config(out[0].dtype, draws, bool(source) and not (mask or update.stochastic))
    )
    launch(
        dense_kernel,
        table.programs,
        device,
        config,
        table=table.pointers,
        skip_ptr=guard(device, coefficients, decay, *([level] if mask else [])),
        counters_ptr=counter_table(device),
        scalars=DenseScalars(
            keys=to_device_cached(device, arguments.keys),
            coefficients=tables[0],
            decay=tables[1],
            rounding_keys=keys_on(device, rounding_keys),
            stage_bounds=bounds,
            mask_key=to_device_cached(device, mask.mask_key) if mask else None,
            mask_level=tables[2] if mask else None,
        ),
        stages=len(stages),
        draws=stages[0],
        stride=tables[0].shape[1],
        NOISE=noise_on(device, arguments.distribution, arguments.tier),
        PASS=DensePass(
            reads=bool(source),
            staged=staged,
            draws=draws,
            mask=mask.mask if mask else "none",
        ),
        UPDATE=update,
    )


def dense_perturb_(weights, out, arguments: DenseArguments):
    """``ops.dense_perturb_`` in one launch."""
    _run(out, weights, arguments, arguments.decay, arguments.rounding_keys, arguments.stages)


def assemble_gradient_(gradients, arguments: AssembleArguments):
    """``ops.assemble_gradient_`` in one launch."""
    _run(gradients, [], arguments, torch.zeros(1, 1, device="cpu"), None, [len(arguments.keys)])


def masked_perturb_(weights, out, arguments: MaskedArguments):
    """``ops.masked_perturb_`` in one launch."""
    _run(out, weights, arguments, arguments.decay, arguments.rounding_key, [len(arguments.keys)], arguments)
