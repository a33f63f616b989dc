"""Low-rank directions, one read and one write of W.

    P = round(A C);   W <- round(fma(a, P round(B)^T, W)), or with a decay round(W + fma(-d, W, a P round(B)^T))
    of a quotient, with Q = (A A) diag(v),  P round(B)^T / sqrt(Q (round(B) round(B))^T + e)  instead of P round(B)^T

P and B are rounded to W's dtype; sums are float32. A program owns a block of rows and walks over a strip of columns, so
P is made once per row block and strip. Ranks below 16 are sums of outer products, others matrix products in steps.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from ..arguments import LowRankArguments
from .cache import broadcast_scalars, keys_on, to_device_cached
from .config import PRODUCT, LowRankConfig, lowrank_config
from .dense import assemble_gradient_
from .factors import (
    LEFT,
    RIGHT,
    FactorList,
    addresses_of,
    factor_pointer,
    factors_of,
    left_tile,
    make_factors,
    pass_precision,
    product_tile,
    stored_factors,
)
from .guard import guard
from .launch import architecture, blocks, launch
from .noise import element_word
from .rounding import INTERPRETED, round_to, stochastic, update_of
from .table import (
    ALIGNED,
    BASE,
    BELOW,
    COLUMNS,
    CORE,
    FIELDS,
    FIRST_ROW,
    FIRST_TILE,
    IN,
    LEADING,
    OUT,
    ROW_STRIDE,
    ROWS,
    SCALAR,
    TENSOR_ID,
    TILES_PER_ROW,
    Table,
    build_table,
    cached_table,
    table_key,
)
from .tiles import aligned


class LowRankScalars(NamedTuple):
    keys: Tensor  # of A, B, C
    coefficient: Tensor
    decay: Tensor
    rounding_key: Tensor | None
    e: Tensor | None  # of quotients


class Workspaces(NamedTuple):
    """Where A (or P) and B are, if they were made just before the pass, and Q of quotients."""

    left: Tensor | None
    right: Tensor | None
    below: Tensor | None


class RowBlock(NamedTuple):
    """What the tiles of a program share. It is read before the first store: after one, the compiler would read it
    again."""

    entry: tl.tensor
    row: tl.tensor  # its first
    p: tl.tensor  # P, where the program holds it
    a_ptr: tl.tensor  # A or P, where it is read tile by tile
    q_ptr: tl.tensor  # Q of a quotient
    e: tl.tensor
    b_ptr: tl.tensor
    source: tl.tensor  # pointers of a tile at column 0
    target: tl.tensor
    coefficient: tl.tensor
    decay: tl.tensor


@triton.jit
def right_tile(
    b_ptr,
    columns,
    j,
    k,
    FACTORS: tl.constexpr,
    TYPE: tl.constexpr,
    EVEN: tl.constexpr,  # the steps of k end at the rank
    MASKED: tl.constexpr,  # a j may lie outside the matrix
    SQUARED: tl.constexpr,
):
    """B[j, k] rounded to TYPE, or its square in float32; j and k broadcast to the tile."""
    pointer = b_ptr + (j * FACTORS.rank + k)
    if MASKED:
        b = tl.load(pointer, mask=(j < columns) & (k < FACTORS.rank), other=0.0)
    elif EVEN:
        b = tl.load(pointer)
    else:
        b = tl.load(pointer, mask=(j >= 0) & (k < FACTORS.rank), other=0.0)
    b = round_to(b.to(tl.float32), TYPE)
    if SQUARED:
        b = b.to(tl.float32)
        b *= b
    return b


@triton.jit
def in_layout_of(w, x):
    """Force x into w's register layout: adds (bits of w) >> 32, always 0 but opaque to Triton's layout pass, which
    would send every product through shared memory to meet W."""
    return x + (w.to(tl.uint32, bitcast=True).to(tl.uint64) >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def dot(p, b, acc, PRECISION: tl.constexpr):
    """acc + P B^T in float32; the interpreter has no 16-bit operands, whose products are exact in float32 anyway."""
    if INTERPRETED:
        p, b = p.to(tl.float32), b.to(tl.float32)
    return tl.dot(p, b, acc=acc, input_precision=PRECISION)


@triton.jit
def outer_products(
    block,
    a_ptr,
    acc,
    columns,
    i,
    j,
    FACTORS: tl.constexpr,
    HELD: tl.constexpr,
    TYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """acc + P B^T, or with the squares of B, by fma, one k after the other, for ranks below 16."""
    if HELD:
        for k in tl.static_range(FACTORS.rank):
            p_k = tl.sum(tl.where(tl.arange(0, FACTORS.padded)[None, :] == k, block.p.to(tl.float32), 0.0), 1)
            b_k = right_tile(block.b_ptr, columns, j, k, FACTORS, TYPE, True, MASKED, SQUARED)
            acc = tl.fma(p_k[:, None], b_k.to(tl.float32)[None, :], acc)
    else:
        for k in range(FACTORS.rank):
            p_k = left_tile(block.entry, a_ptr, 0, i, k, FACTORS)
            if not SQUARED:
                p_k = p_k.to(TYPE)
            b_k = right_tile(block.b_ptr, columns, j, k, FACTORS, TYPE, True, MASKED, SQUARED)
            acc = tl.fma(p_k.to(tl.float32)[:, None], b_k.to(tl.float32)[None, :], acc)
    return acc


@triton.jit
def matrix_product(
    block,
    a_ptr,
    columns,
    i,
    j,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
    TYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """P B^T, or with the squares of B, for ranks of at least 16, with P held, or read in steps."""
    acc = tl.zeros((i.shape[0], j.shape[1]), tl.float32)
    if TILE.resident:
        k = tl.arange(0, FACTORS.padded)[:, None]
        b = right_tile(block.b_ptr, columns, j, k, FACTORS, TYPE, FACTORS.rank == FACTORS.padded, MASKED, SQUARED)
        acc = dot(block.p, b, acc, FACTORS.precision)
    else:
        EVEN: tl.constexpr = FACTORS.rank % TILE.step == 0
        for first in range(0, FACTORS.rank, TILE.step):
            k = first + tl.arange(0, TILE.step)[None, :]
            if MASKED or not EVEN:
                a = left_tile(block.entry, a_ptr, 0, i, k, FACTORS)
            else:
                a = tl.load(a_ptr + (i * FACTORS.rank + k)).to(tl.float32)
            k = first + tl.arange(0, TILE.step)[:, None]
            b = right_tile(block.b_ptr, columns, j, k, FACTORS, TYPE, EVEN, MASKED, SQUARED)
            if not SQUARED:
                a = round_to(a, TYPE)
            acc = dot(a, b, acc, FACTORS.precision)
    return acc


@triton.jit
def tile_pointers(entry, FIELD: tl.constexpr, row, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers of the first tile of a row block, declared aligned: either they are, or they are used under a mask."""
    ld = tl.load(entry + LEADING + FIELD)
    first = tl.load(entry + FIELD) + row * ld * (TYPE.primitive_bitwidth // 8)
    step = tl.multiple_of(ld, 128 // TYPE.primitive_bitwidth)
    return aligned(first, TYPE) + (tl.arange(0, BM)[:, None] * step + tl.arange(0, BN)[None, :])


@triton.jit
def load_block(pointers, inside, MASKED: tl.constexpr):
    """A block of W as float32; 0 outside the matrix."""
    if MASKED:
        w = tl.load(pointers, mask=inside, other=0.0)
    else:
        w = tl.load(pointers)
    return w.to(tl.float32)


@triton.jit
def add_product(w, product, a, d, UPDATE: tl.constexpr):
    """The formula at the top of the file, before rounding. A weight without decay has the same bits in every list."""
    if UPDATE.decay:
        if d != 0:
            value = w + tl.fma(w, -d, product * a)
        else:
            value = tl.fma(product, a, w)
    else:
        value = tl.fma(product, a, w)
    return value


@triton.jit
def pass_tile(
    block,
    column,
    rounding_key_ptr,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
    UPDATE: tl.constexpr,
    QUOTIENT: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of W, WIDTH columns from ``column`` on."""
    entry, row = block.entry, block.row
    if MASKED:  # computed again: kept across the loop, pointers and masks of every element would not fit into registers
        source = tile_pointers(entry, IN, row, UPDATE.dtype, TILE.rows, WIDTH) + column
        target = tile_pointers(entry, OUT, row, UPDATE.dtype, TILE.rows, WIDTH) + column
    else:
        source, target = block.source + column, block.target + column
    i, j = row + tl.arange(0, TILE.rows)[:, None], column + tl.arange(0, WIDTH)[None, :]
    columns = tl.load(entry + COLUMNS) if MASKED else 0
    inside = (i < tl.load(entry + ROWS)) & (j < columns) if MASKED else True
    if FACTORS.rank < 16:
        w = load_block(source, inside, MASKED)
        acc = in_layout_of(w, tl.zeros((TILE.rows, WIDTH), tl.float32))
        i_k, j_k = row + tl.arange(0, TILE.rows), column + tl.arange(0, WIDTH)
        zero = acc
        acc = outer_products(
            block, block.a_ptr, zero, columns, i_k, j_k, FACTORS, TILE.resident, UPDATE.dtype, MASKED, False
        )
        if QUOTIENT:
            below = outer_products(
                block, block.q_ptr, zero, columns, i_k, j_k, FACTORS, TILE.resident, UPDATE.dtype, MASKED, True
            )
            acc = tl.div_rn(acc, tl.sqrt_rn(below + block.e))
    else:  # W is loaded last, so that it takes no registers during the product
        acc = matrix_product(block, block.a_ptr, columns, i, j, FACTORS, TILE, UPDATE.dtype, MASKED, False)
        if QUOTIENT:
            below = matrix_product(block, block.q_ptr, columns, i, j, FACTORS, TILE, UPDATE.dtype, MASKED, True)
            acc = tl.div_rn(acc, tl.sqrt_rn(below + block.e))
        w = load_block(source, inside, MASKED)
    value = add_product(w, acc, block.coefficient, block.decay, UPDATE)
    if UPDATE.stochastic:
        e = tl.load(entry + BASE) + i * tl.load(entry + ROW_STRIDE) + j
        word = element_word(e, tl.load(entry + TENSOR_ID).to(tl.uint32), tl.load(rounding_key_ptr))
        value = stochastic(value, word, UPDATE.dtype)
    if MASKED:
        tl.store(target, round_to(value, UPDATE.dtype), mask=inside)
    else:
        tl.store(target, round_to(value, UPDATE.dtype))


@triton.jit
def lowrank_kernel(
    table,
    skip_ptr,
    scalars,
    workspaces,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
    UPDATE: tl.constexpr,
    QUOTIENT: tl.constexpr,
    CORE_STEP: tl.constexpr,  # of the sum in P
):
    """A strip of a row block of one matrix."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table.entries + tl.load(table.owners + tile).to(tl.int64) * FIELDS
    if tl.load(skip_ptr) != 0:
        return
    tile -= tl.load(entry + FIRST_TILE)
    strips = tl.load(entry + TILES_PER_ROW).to(tl.int32)
    row = (tile.to(tl.int32) // strips).to(tl.int64)
    strip = tile - row * strips
    row *= TILE.rows
    scalar = tl.load(entry + SCALAR)
    coefficient, decay = tl.load(scalars.coefficient + scalar), tl.load(scalars.decay + scalar)
    a_ptr = None
    if FACTORS.left is not None:
        a_ptr = factor_pointer(entry, LEFT, workspaces.left, FACTORS.left)
    q_ptr, e = coefficient, coefficient  # placeholders; not A's pointer: Triton 3.6 unpacks no None
    if QUOTIENT:
        q_ptr, e = factor_pointer(entry, BELOW, workspaces.below, tl.float32), tl.load(scalars.e + scalar)
    p = tl.zeros((TILE.rows, FACTORS.padded), UPDATE.dtype)
    if TILE.resident:
        i, k = row + tl.arange(0, TILE.rows)[:, None], tl.arange(0, FACTORS.padded)[None, :]
        p = round_to(product_tile(entry, a_ptr, scalars.keys, i, k, FACTORS, 0, CORE_STEP), UPDATE.dtype)
    columns = tl.load(entry + COLUMNS)
    begin = strip * (TILE.strip * TILE.columns)
    end = tl.minimum(begin + TILE.strip * TILE.columns, columns)
    whole = begin  # tiles up to here lie in the matrix and are aligned
    if (tl.load(entry + ALIGNED) != 0) & (row + TILE.rows <= tl.load(entry + ROWS)):
        whole = end - (end - begin) % TILE.columns
    b_ptr = factor_pointer(entry, RIGHT, workspaces.right, FACTORS.right)
    if FACTORS.aligned:
        b_ptr = tl.multiple_of(b_ptr, 16)
        if not TILE.resident:
            a_ptr = tl.multiple_of(a_ptr, 16)
    source = tile_pointers(entry, IN, row, UPDATE.dtype, TILE.rows, TILE.columns)
    target = tile_pointers(entry, OUT, row, UPDATE.dtype, TILE.rows, TILE.columns)
    block = RowBlock(entry, row, p, a_ptr, q_ptr, e, b_ptr, source, target, coefficient, decay)
    for column in range(begin, whole, TILE.columns):
        pass_tile(block, column, scalars.rounding_key, FACTORS, TILE, UPDATE, QUOTIENT, TILE.columns, False)
    for column in range(whole, end, TILE.columns // 2):
        pass_tile(block, column, scalars.rounding_key, FACTORS, TILE, UPDATE, QUOTIENT, TILE.columns // 2, True)


def lowrank_table(
    weights,
    out,
    left: FactorList,
    right: FactorList,
    below: FactorList | None,
    core,
    tensor_ids,
    slices,
    config: LowRankConfig,
    per_tensor: bool,
) -> Table:
    """The table of a pass: row blocks of matrices, each in strips."""
    device, cores = weights[0].device, addresses_of(core, len(weights))
    divisors = [0] * len(weights) if below is None else below.places

    def build():
        entries, tiles = [], []
        for t, (w, o) in enumerate(zip(weights, out, strict=True)):
            m, n, ld_in = checks.matrix_layout("weights", w, written=False)
            ld_out = checks.matrix_layout("out", o)[2]
            size, strips = w.element_size(), blocks(n, config.columns * config.strip)
            addresses = (w.data_ptr(), o.data_ptr(), ld_in * size, ld_out * size)
            base, row_stride = slices[2 * t : 2 * t + 2]
            entries.append(
                {
                    IN: w.data_ptr(),
                    OUT: o.data_ptr(),
                    LEFT: left.places[t],
                    RIGHT: right.places[t],
                    CORE: cores[t],
                    BELOW: divisors[t],
                    ROWS: m,
                    COLUMNS: n,
                    BASE: base,
                    ROW_STRIDE: row_stride,
                    FIRST_ROW: base // row_stride,
                    TENSOR_ID: tensor_ids[t],
                    TILES_PER_ROW: strips,
                    ALIGNED: int(all(x % 16 == 0 for x in addresses)),
                    SCALAR: t if per_tensor else 0,
                    LEADING + IN: ld_in,
                    LEADING + OUT: ld_out,
                }
            )
            tiles.append(blocks(m, config.rows) * strips)
        return build_table(entries, tiles, device)

    columns = (left.places, right.places, divisors, cores, tensor_ids, slices)
    return cached_table(("lowrank", device, config, per_tensor, *map(tuple, columns), table_key(weights, out)), build)


def lowrank_perturb_(weights, out, arguments: LowRankArguments):
    """``ops.lowrank_perturb_`` in one launch, after one for each of P and B that programs cannot make themselves."""
    left, right, core, keys, coefficient, decay, tensor_ids, rank, kind, v, rounding_key, slices, e = arguments
    weight, device, count = weights[0], weights[0].device, len(weights)
    update = update_of(weight, decay, rounding_key)
    config = lowrank_config(weight.dtype, rank, update.stochastic, architecture(device), bool(v))
    given = [coefficient, decay] if e is None else [coefficient, decay, e]
    (coefficients, decays, *es), per_tensor = broadcast_scalars(device, *[row[None] for row in given])
    keys = to_device_cached(device, keys)
    slices = slices or [x for w in weights for x in (0, max(w.shape[1], 1))]
    first_rows, first_columns = zip(*map(divmod, slices[::2], slices[1::2]), strict=True)
    if right:
        b = stored_factors(right, count)
    else:
        b = make_factors(weight, rank, keys, tensor_ids, [w.shape[1] for w in weights], first_columns, key=1)
    rows, q = [w.shape[0] for w in weights], None
    if v:
        q = make_factors(weight, rank, keys, tensor_ids, rows, first_rows, left, v, "diagonal", squared=True)
    if config.makes or (left and kind == "none"):
        a = stored_factors(left, count)
    else:
        a = make_factors(weight, rank, keys, tensor_ids, rows, first_rows, left, core, kind)
        core, kind = [], "none"
    # Before the guard: a graph capture that is refused must not be the first to make the device's flag.
    table = lowrank_table(weights, out, a, b, q, core, tensor_ids, slices, config, per_tensor)
    launch(
        lowrank_kernel,
        table.programs,
        device,
        config.config,
        table=table.pointers,
        skip_ptr=guard(device, *given),
        scalars=LowRankScalars(keys, coefficients, decays, keys_on(device, rounding_key), es[0] if es else None),
        workspaces=Workspaces(a.workspace, b.workspace, q and q.workspace),
        FACTORS=factors_of(rank, kind, a, b, core, pass_precision(device, weight.dtype, rank, q is not None)),
        TILE=config,
        UPDATE=update,
        QUOTIENT=q is not None,
        CORE_STEP=PRODUCT.step,
    )


def aligned_core(singular_values, keys, tensor_ids, sign_ids, delta):
    """``ops.aligned_core``: noise from the kernels, r numbers per matrix of float64 arithmetic in PyTorch."""
    return reference.aligned_core(singular_values, keys, tensor_ids, sign_ids, delta, assemble_gradient_)
