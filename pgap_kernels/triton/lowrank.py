"""Low-rank directions, one read and one write of W.

    P = round(A C),  delta = a P round(B)^T,  delta = fma(-d, W, delta) if d != 0,  W <- round(W + delta)

P and B are rounded to W's dtype; sums are float32. A program owns BM rows and walks over a strip of columns, so P is
made once per row block and strip. Ranks below 16 are sums of outer products, others matrix products in steps of K.
"""

import torch
import triton
import triton.language as tl

from .. import checks, reference
from .config import PRODUCT, lowrank_config
from .dense import assemble_gradient_
from .factors import CORE, FIRST_ROW, Factors, left_tile, product_tile, products_on
from .launch import (
    TYPES,
    architecture,
    assembled,
    cached_table,
    guard,
    identity,
    launch,
    next_power_of_two,
    on,
    widened,
)
from .noise import element_word
from .rounding import INTERPRETED, narrow, stochastic
from .tiles import (
    ALIGNED,
    BASE,
    COLUMNS,
    EXTRA,
    FIELDS,
    FIRST_TILE,
    IN,
    LEADING,
    OUT,
    ROW_STRIDE,
    ROWS,
    SCALAR,
    SECOND,
    TENSOR_ID,
    TILES_PER_ROW,
    aligned,
)


@triton.jit
def right_tile(
    b_ptr,
    columns,
    j,
    k,
    RANK: tl.constexpr,
    TYPE: tl.constexpr,
    EVEN: tl.constexpr,  # no k lies outside the rank
    MASKED: tl.constexpr,  # a j may lie outside the matrix
):
    """B[j, k] rounded to TYPE; j and k broadcast to the tile."""
    pointer = b_ptr + (j * RANK + k)
    if MASKED:
        b = tl.load(pointer, mask=(j < columns) & (k < RANK), other=0.0)
    elif EVEN:
        b = tl.load(pointer)
    else:
        b = tl.load(pointer, mask=(j >= 0) & (k < RANK), other=0.0)
    return narrow(b.to(tl.float32), TYPE)


@triton.jit
def like(x, w):
    """x in the registers where w is: what is added are bits beyond the width of w, which only LLVM sees to be 0."""
    return x + (w.to(tl.uint32, bitcast=True).to(tl.uint64) >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def product(p, b, acc, PRODUCTS: tl.constexpr):
    """acc + P B^T in float32; the interpreter has no 16-bit operands, whose products are exact in float32 anyway."""
    if INTERPRETED:
        p, b = p.to(tl.float32), b.to(tl.float32)
    return tl.dot(p, b, acc=acc, input_precision=PRODUCTS)


@triton.jit
def outer_products(
    acc,
    entry,
    b_ptr,
    columns,
    p,
    i,
    j,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    LEFT_TYPE: tl.constexpr,
    RESIDENT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc + P B^T by fma, one k after the other, for ranks below 16."""
    if RESIDENT:
        for k in tl.static_range(RANK):
            p_k = tl.sum(tl.where(tl.arange(0, PADDED)[None, :] == k, p.to(tl.float32), 0.0), 1)
            b_k = right_tile(b_ptr, columns, j, k, RANK, TYPE, True, MASKED)
            acc = tl.fma(p_k[:, None], b_k.to(tl.float32)[None, :], acc)
    else:
        for k in range(RANK):
            p_k = left_tile(entry, 0, i, k, RANK, LEFT_TYPE).to(TYPE)
            b_k = right_tile(b_ptr, columns, j, k, RANK, TYPE, True, MASKED)
            acc = tl.fma(p_k.to(tl.float32)[:, None], b_k.to(tl.float32)[None, :], acc)
    return acc


@triton.jit
def matrix_product(
    entry,
    a_ptr,
    b_ptr,
    columns,
    p,
    i,
    j,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    LEFT_TYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """P B^T for ranks from 16 on: P at hand, or read in steps of K."""
    acc = tl.zeros((i.shape[0], j.shape[1]), tl.float32)
    if RESIDENT:
        k = tl.arange(0, PADDED)[:, None]
        b = right_tile(b_ptr, columns, j, k, RANK, TYPE, RANK == PADDED, MASKED)
        acc = product(p, b, acc, PRODUCTS)
    else:
        for first in range(0, RANK, K):
            k = first + tl.arange(0, K)[None, :]
            if MASKED or RANK % K != 0:
                a = left_tile(entry, 0, i, k, RANK, LEFT_TYPE)
            else:
                a = tl.load(a_ptr + (i * RANK + k)).to(tl.float32)
            a = narrow(a, TYPE)
            k = first + tl.arange(0, K)[:, None]
            b = right_tile(b_ptr, columns, j, k, RANK, TYPE, RANK % K == 0, MASKED)
            acc = product(a, b, acc, PRODUCTS)
    return acc


@triton.jit
def block(entry, FIELD: tl.constexpr, LEAD: tl.constexpr, row, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers to the first tile of a row block, declared aligned: they are, or are used under a mask."""
    ld = tl.load(entry + LEAD)
    first = tl.load(entry + FIELD) + row * ld * (TYPE.primitive_bitwidth // 8)
    step = tl.multiple_of(ld, 128 // TYPE.primitive_bitwidth)
    return aligned(first, TYPE) + (tl.arange(0, BM)[:, None] * step + tl.arange(0, BN)[None, :])


@triton.jit
def pass_tile(
    entry,
    p,
    a_ptr,
    b_ptr,
    source,
    target,
    row,
    column,
    a,
    d,
    rounding_ptr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TYPE: tl.constexpr,
    LEFT_TYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of W, read at ``source`` and written at ``target``."""
    if MASKED:  # found anew: held over a loop, pointers and masks of every element would not fit the registers
        source = block(entry, IN, LEADING + 1, row, TYPE, BM, BN) + column
        target = block(entry, OUT, LEADING, row, TYPE, BM, BN) + column
    i, j = row + tl.arange(0, BM)[:, None], column + tl.arange(0, BN)[None, :]
    columns = tl.load(entry + COLUMNS) if MASKED else 0
    inside = (i < tl.load(entry + ROWS)) & (j < columns) if MASKED else True
    if RANK < 16:
        w = load_block(source, inside, MASKED)
        acc = like(tl.zeros((BM, BN), tl.float32), w)
        i_k, j_k = row + tl.arange(0, BM), column + tl.arange(0, BN)
        acc = outer_products(
            acc, entry, b_ptr, columns, p, i_k, j_k, RANK, PADDED, TYPE, LEFT_TYPE, RESIDENT, MASKED
        )  # fmt: skip
    else:  # W last, so that it takes no registers during the product
        acc = matrix_product(
            entry, a_ptr, b_ptr, columns, p, i, j, RANK, PADDED, TYPE, LEFT_TYPE, PRODUCTS, RESIDENT, K, MASKED
        )  # fmt: skip
        w = load_block(source, inside, MASKED)
    if DECAY:
        value = acc * a
        if d != 0:
            value = tl.fma(w, -d, value)
        value = w + value
    else:
        value = tl.fma(acc, a, w)
    if STOCHASTIC:
        e = tl.load(entry + BASE) + i * tl.load(entry + ROW_STRIDE) + j
        word = element_word(e, tl.load(entry + TENSOR_ID).to(tl.uint32), tl.load(rounding_ptr))
        value = stochastic(value, word, TYPE)
    if MASKED:
        tl.store(target, narrow(value, TYPE), mask=inside)
    else:
        tl.store(target, narrow(value, TYPE))


@triton.jit
def load_block(source, inside, MASKED: tl.constexpr):
    """A block of W as float32; 0 outside the matrix."""
    if MASKED:
        w = tl.load(source, mask=inside, other=0.0)
    else:
        w = tl.load(source)
    return w.to(tl.float32)


@triton.jit
def lowrank_kernel(
    map_ptr,
    table_ptr,
    skip_ptr,
    keys_ptr,  # of A, B, C
    coefficient_ptr,
    decay_ptr,
    rounding_ptr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,  # of the core: none, diagonal, full, regenerated
    TYPE: tl.constexpr,
    LEFT_TYPE: tl.constexpr,
    RIGHT_TYPE: tl.constexpr,
    CORE_TYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,  # input precision of tl.dot on float32: ieee or tf32x3
    RESIDENT: tl.constexpr,  # P is made or read once; else A is P, and is read in steps of K for every tile
    ALIGNED_FACTORS: tl.constexpr,  # every A and B begins at a multiple of 16 bytes
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STRIP: tl.constexpr,
    K: tl.constexpr,
    CORE_STEP: tl.constexpr,  # of the sum in P
):
    """A strip of a row block of one matrix."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.load(map_ptr + tile).to(tl.int64) * FIELDS
    if tl.load(skip_ptr) != 0:
        return
    tile -= tl.load(entry + FIRST_TILE)
    strips = tl.load(entry + TILES_PER_ROW).to(tl.int32)
    row = (tile.to(tl.int32) // strips).to(tl.int64)
    strip = tile - row * strips
    row *= BM
    scalar = tl.load(entry + SCALAR)
    a, d = tl.load(coefficient_ptr + scalar), tl.load(decay_ptr + scalar)
    p = tl.zeros((BM, PADDED), TYPE)
    if RESIDENT:
        i, k = row + tl.arange(0, BM)[:, None], tl.arange(0, PADDED)[None, :]
        p = product_tile(entry, keys_ptr, i, k, RANK, KIND, LEFT_TYPE, CORE_TYPE, 0, PRODUCTS, CORE_STEP)
        p = narrow(p, TYPE)
    columns = tl.load(entry + COLUMNS)
    begin = strip * (STRIP * BN)
    end = tl.minimum(begin + STRIP * BN, columns)
    whole = begin  # tiles up to here lie in the matrix and are aligned
    if (tl.load(entry + ALIGNED) != 0) & (row + BM <= tl.load(entry + ROWS)):
        whole = end - (end - begin) % BN
    # Everything a tile needs is read before the first store: behind one, the compiler would read it again.
    b_ptr = tl.load(entry + SECOND).to(tl.pointer_type(RIGHT_TYPE))
    a_ptr = b_ptr
    if not RESIDENT:
        a_ptr = tl.load(entry + EXTRA).to(tl.pointer_type(LEFT_TYPE))
    if ALIGNED_FACTORS:
        a_ptr, b_ptr = tl.multiple_of(a_ptr, 16), tl.multiple_of(b_ptr, 16)
    source = block(entry, IN, LEADING + 1, row, TYPE, BM, BN)
    target = block(entry, OUT, LEADING, row, TYPE, BM, BN)
    for column in range(begin, whole, BN):
        pass_tile(
            entry,
            p,
            a_ptr,
            b_ptr,
            source + column,
            target + column,
            row,
            column,
            a,
            d,
            rounding_ptr,
            RANK,
            PADDED,
            TYPE,
            LEFT_TYPE,
            PRODUCTS,
            RESIDENT,
            DECAY,
            STOCHASTIC,
            BM,
            BN,
            K,
            False,
        )
    for column in range(whole, end, BN // 2):
        pass_tile(
            entry,
            p,
            a_ptr,
            b_ptr,
            source + column,
            target + column,
            row,
            column,
            a,
            d,
            rounding_ptr,
            RANK,
            PADDED,
            TYPE,
            LEFT_TYPE,
            PRODUCTS,
            RESIDENT,
            DECAY,
            STOCHASTIC,
            BM,
            BN // 2,
            K,
            True,
        )


def lowrank_perturb_(
    weights,
    out,
    left,
    right,
    core,
    keys,
    coefficient,
    decay,
    rounding_key,
    tensor_ids,
    slices,
    rank,
    core_kind,
    delta,
    sign_ids,
):
    """``ops.lowrank_perturb_``: one launch, and one before it for each of P and B that a program cannot make itself."""
    device, dtype = weights[0].device, weights[0].dtype
    stochastic_rounding = rounding_key is not None and dtype != torch.float32
    config = lowrank_config(dtype, rank, stochastic_rounding, architecture(device))
    if core_kind == "aligned":
        core, core_kind = aligned_core(core, keys[2:], tensor_ids, sign_ids, delta.item()), "full"
    skip = guard(device, coefficient, decay)
    (a, d), per_tensor = widened(device, coefficient[None], decay[None])
    keys = on(device, keys)
    slices = slices or [x for w in weights for x in (0, max(w.shape[1], 1))]
    starts = [divmod(slices[2 * t], slices[2 * t + 1]) for t in range(len(weights))]
    small = Factors(rank, dtype, tensor_ids, keys)
    if not right:
        right = small.products("right", [w.shape[1] for w in weights], [column for _, column in starts])
    if not config.makes and (core_kind != "none" or not left):
        rows, firsts = [w.shape[0] for w in weights], [row for row, _ in starts]
        left = small.products("left", rows, firsts, left, core, core_kind)
        core, core_kind = [], "none"

    def make():
        entries, tiles = [], []
        for t, (w, o) in enumerate(zip(weights, out, strict=True)):
            m, n, ld_in = checks.matrix_layout("weights", w)
            ld_out = checks.matrix_layout("out", o)[2]
            size, strips = w.element_size(), triton.cdiv(n, config.columns * config.strip)
            addresses = (w.data_ptr(), o.data_ptr(), ld_in * size, ld_out * size)
            entries.append(
                {
                    IN: w.data_ptr(),
                    OUT: o.data_ptr(),
                    EXTRA: left[t].data_ptr() if left else 0,
                    SECOND: right[t].data_ptr(),
                    CORE: core[t].data_ptr() if core else 0,
                    ROWS: m,
                    COLUMNS: n,
                    BASE: slices[2 * t],
                    ROW_STRIDE: slices[2 * t + 1],
                    FIRST_ROW: starts[t][0],
                    TENSOR_ID: tensor_ids[t],
                    TILES_PER_ROW: strips,
                    ALIGNED: int(all(x % 16 == 0 for x in addresses)),
                    SCALAR: t if per_tensor else 0,
                    LEADING: ld_out,
                    LEADING + 1: ld_in,
                }
            )
            tiles.append(triton.cdiv(m, config.rows) * strips)
        return assembled(entries, tiles, device)

    key = ("lowrank", rank, config, per_tensor, tuple(tensor_ids), tuple(slices))
    tensors = cached_table((*key, identity(weights, out, left, right, core)), make)
    padded = next_power_of_two(rank)
    launch(
        lowrank_kernel,
        tensors.tiles,
        device,
        config.config,
        map_ptr=tensors.map,
        table_ptr=tensors.entries,
        skip_ptr=skip,
        keys_ptr=keys,
        coefficient_ptr=a,
        decay_ptr=d,
        rounding_ptr=keys if rounding_key is None else on(device, rounding_key),
        RANK=rank,
        PADDED=padded,
        KIND=core_kind,
        TYPE=TYPES[dtype],
        LEFT_TYPE=TYPES[left[0].dtype] if left else None,
        RIGHT_TYPE=TYPES[right[0].dtype],
        CORE_TYPE=TYPES[core[0].dtype] if core else None,
        PRODUCTS=products_on(device, dtype, rank),
        RESIDENT=config.resident,
        ALIGNED_FACTORS=all(t.data_ptr() % 16 == 0 for t in [*left, *right]),
        DECAY=decay.device == device or bool(decay.any()),
        STOCHASTIC=stochastic_rounding,
        BM=config.rows,
        BN=config.columns,
        STRIP=config.strip,
        K=config.step,
        CORE_STEP=PRODUCT.step,
    )


def aligned_core(singular_values, keys, tensor_ids, sign_ids, delta):
    """``ops.aligned_core``: noise from the kernels, r numbers per matrix of float64 arithmetic in PyTorch."""
    return reference.aligned_core(singular_values, keys, tensor_ids, sign_ids, delta, assemble_gradient_)
