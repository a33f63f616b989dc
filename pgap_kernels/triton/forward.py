"""A low-rank direction in the forward: y moves by what D = A M B^T would add, and W is only read by its own layer.

    t = round(x F N),   y <- round(y + t G^T)        F, G, N = B, A, M^T;  transposed A, B, M;  x F = F[x] for numbers x

F, G and t are rounded to a 16-bit y's dtype; sums are float32. An x not of that dtype is two numbers of it: to nearest,
and what is left. `project_kernel` makes t where N fits the registers beside x F; else it leaves x F in memory, and
`mix_kernel` makes t of it, as it does of F[x]. `expand_kernel` reads and writes y once. A token's sums do not depend on
the other tokens.
"""

import torch
import triton
import triton.language as tl

from .config import forward_config
from .factors import products_on
from .launch import TYPES, launch
from .lowrank import product
from .rounding import narrow


@triton.jit
def token_block(block, half, BM: tl.constexpr):
    """Tokens of a block, (BM,) int64; which of them are meant, the others repeat the last; whether of the second half.

    Blocks begin anew in the second half, which has a core of its own.
    """
    blocks = tl.cdiv(half, BM)
    second = block // blocks
    i = (block - second * blocks) * BM + tl.arange(0, BM)
    return second.to(tl.int64) * half + tl.minimum(i, half - 1), i < half, second != 0


@triton.jit
def core_tile(core_ptr, other_ptr, second, k, j, RANK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """N[k, j] of a half for k (K, 1) and j (1, J); 0 outside."""
    pointer = core_ptr
    if second:
        pointer = other_ptr
    place = k * RANK + j if TRANSPOSED else j * RANK + k
    return tl.load(pointer + place, mask=(k < RANK) & (j < RANK), other=0.0)


@triton.jit
def load_inputs(pointer, k, columns):
    """A chunk of x."""
    return tl.load(pointer, mask=(k < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["half"])
def project_kernel(
    x_ptr,
    factor_ptr,  # F (columns, RANK)
    core_ptr,  # M of the first half of the tokens
    other_ptr,  # of the second
    t_ptr,
    half,
    columns,
    stride,  # of x
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,  # of a row of t; beyond the rank are zeros, or NaN if x is infinite
    TYPE: tl.constexpr,  # of y
    PRODUCTS: tl.constexpr,  # input precision of tl.dot on float32: ieee or tf32x3
    SPLIT: tl.constexpr,  # x has more bits than y, so two values of y's type stand for one of x
    TRANSPOSED: tl.constexpr,
    MIXES: tl.constexpr,  # t = round(x F N); else x F in float32
    BM: tl.constexpr,
    BR: tl.constexpr,
    K: tl.constexpr,
):
    """t = round(x F N) or x F: a block of tokens, BR columns of t."""
    program = tl.program_id(0)
    RANKS: tl.constexpr = (WIDTH + BR - 1) // BR
    i, inside, second = token_block(program // RANKS, half, BM)
    j = program % RANKS * BR + tl.arange(0, BR)
    k = tl.arange(0, K)
    x_pointer = x_ptr + (i[:, None] * stride + k[None, :])
    f_pointer = factor_ptr + (k[:, None] * RANK + j[None, :])
    t = tl.zeros((BM, BR), tl.float32)
    for first in range(0, columns, K):
        x = load_inputs(x_pointer + first, first + k, columns)
        offset = tl.cast(first, tl.int64) * RANK
        f = tl.load(f_pointer + offset, mask=(first + k < columns)[:, None] & (j < RANK)[None, :], other=0.0)
        f = narrow(f.to(tl.float32), TYPE)
        high = narrow(x.to(tl.float32), TYPE)
        t = product(high, f, t, PRODUCTS)
        if SPLIT:
            t = product(narrow(x.to(tl.float32) - high.to(tl.float32), TYPE), f, t, PRODUCTS)
    if MIXES:
        n = core_tile(core_ptr, other_ptr, second, tl.arange(0, BR)[:, None], j[None, :], RANK, TRANSPOSED)
        t = narrow(tl.dot(t, n, input_precision=PRODUCTS), TYPE)
    tl.store(t_ptr + (i[:, None] * WIDTH + j[None, :]), t, mask=inside[:, None] & (j < WIDTH)[None, :])


@triton.jit(do_not_specialize=["half"])
def mix_kernel(
    numbers_ptr,  # of rows of F
    rows_ptr,  # x F (tokens, STRIDE) float32, or F
    core_ptr,
    other_ptr,
    t_ptr,
    half,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    TYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    K: tl.constexpr,
):
    """t = round(T N), T = x F or F[x]: a block of tokens, BR columns of t."""
    program = tl.program_id(0)
    RANKS: tl.constexpr = (WIDTH + BR - 1) // BR
    i, inside, second = token_block(program // RANKS, half, BM)
    j = program % RANKS * BR + tl.arange(0, BR)
    row = i
    if GATHER:
        row = tl.load(numbers_ptr + i).to(tl.int64)
    t = tl.zeros((BM, BR), tl.float32)
    for first in range(0, RANK, K):
        k = first + tl.arange(0, K)
        p = tl.load(rows_ptr + (row[:, None] * STRIDE + k[None, :]), mask=(k < RANK)[None, :], other=0.0)
        p = p.to(tl.float32)
        if GATHER:
            p = narrow(p, TYPE).to(tl.float32)
        n = core_tile(core_ptr, other_ptr, second, k[:, None], j[None, :], RANK, TRANSPOSED)
        t = tl.dot(p, n, acc=t, input_precision=PRODUCTS)
    t_pointer = t_ptr + (i[:, None] * WIDTH + j[None, :])
    tl.store(t_pointer, narrow(t, TYPE), mask=inside[:, None] & (j < WIDTH)[None, :])


@triton.jit
def load_outputs(pointer, inside):
    """A tile of y."""
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    t_ptr,
    factor_ptr,  # G (columns, RANK)
    y_ptr,
    tokens,
    columns,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    K: tl.constexpr,
):
    """y <- round(y + t G^T): a tile of y."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, BN)
    i = (program // across).to(tl.int64) * BM + tl.arange(0, BM)
    j = (program % across).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, K)
    t_pointer = t_ptr + (tl.minimum(i, tokens - 1)[:, None] * WIDTH + k[None, :])
    g_pointer = factor_ptr + (tl.minimum(j, columns - 1)[None, :] * RANK + k[:, None])
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, WIDTH, K):
        t = tl.load(t_pointer + first)
        g = tl.load(g_pointer + first, mask=(first + k < RANK)[:, None], other=0.0)
        acc = product(t, narrow(g.to(tl.float32), TYPE), acc, "ieee")
    y_pointer = y_ptr + (i[:, None] * columns + j[None, :])
    inside = (i < tokens)[:, None] & (j < columns)[None, :]
    y = load_outputs(y_pointer, inside).to(tl.float32)
    tl.store(y_pointer, narrow(y + acc, TYPE), mask=inside)


def lowrank_forward_(outputs, inputs, left, right, cores, transposed):
    """``ops.lowrank_forward_``: project and expand, mix and expand for row numbers, or all three.

    No table and nothing from the host: a captured graph replays with what the tensors hold then.
    """
    device, dtype, rank, tokens = outputs.device, outputs.dtype, left.shape[1], len(outputs)
    into, out_of = (left, right) if transposed else (right, left)
    gather = not inputs.is_floating_point()
    split = not gather and inputs.dtype != dtype != torch.float32
    config = forward_config(dtype, rank, split)
    width, mixes = config.width(rank), config.mixes and not gather
    half, rows = tokens // len(cores), into
    t = torch.empty(tokens, width, dtype=dtype, device=device)
    common = {
        "core_ptr": cores[0],
        "other_ptr": cores[-1],
        "half": half,
        "RANK": rank,
        "WIDTH": width,
        "TYPE": TYPES[dtype],
        "PRODUCTS": products_on(device, dtype, width),
        "TRANSPOSED": transposed,
    }

    def blocks(tile):
        return len(cores) * triton.cdiv(half, tile.rows) * triton.cdiv(width, tile.columns)

    if not gather:
        x = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
        rows = t if mixes else torch.empty(tokens, width, dtype=torch.float32, device=device)
        tile = config.project
        launch(
            project_kernel,
            blocks(tile),
            device,
            tile.config,
            x_ptr=x,
            factor_ptr=into,
            t_ptr=rows,
            columns=x.shape[1],
            stride=x.stride(0),
            SPLIT=split,
            MIXES=mixes,
            BM=tile.rows,
            BR=tile.columns,
            K=tile.step,
            **common,
        )
    if not mixes:
        tile = config.mix
        launch(
            mix_kernel,
            blocks(tile),
            device,
            tile.config,
            numbers_ptr=inputs.contiguous() if gather else rows,
            rows_ptr=rows,
            t_ptr=t,
            STRIDE=rows.shape[1],
            GATHER=gather,
            BM=tile.rows,
            BR=tile.columns,
            K=tile.step,
            **common,
        )
    tile, columns = config.expand, outputs.shape[1]
    launch(
        expand_kernel,
        triton.cdiv(tokens, tile.rows) * triton.cdiv(columns, tile.columns),
        device,
        tile.config,
        t_ptr=t,
        factor_ptr=out_of,
        y_ptr=outputs,
        tokens=tokens,
        columns=columns,
        RANK=rank,
        WIDTH=width,
        TYPE=TYPES[dtype],
        BM=tile.rows,
        BN=tile.columns,
        K=tile.step,
    )
