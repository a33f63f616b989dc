"""A low-rank direction in the forward: y changes by what D = A C B^T would add; W itself is only read by its layer.

    t = round(x F N),   y <- round(y + t G^T)        F, G, N = B, A, C^T;  transposed A, B, C;  x F = F[x] for indices x

F, G and t are rounded to the dtype of a 16-bit y; sums are float32. An x of another dtype is represented by two numbers
of y's dtype, the nearest and the remainder. `project_kernel` makes t if N fits into registers beside x F. Else it
writes x F, from which `mix_kernel` makes t, as it does from F[x]. `expand_kernel` reads and writes y once. Tokens are
split into as many equal slices as there are cores. A token's sums do not depend on the other tokens.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import forward_config
from .factors import precision_on
from .launch import launch
from .lowrank import dot
from .rounding import TYPES, round_to


class Shape(NamedTuple):
    """Constants that the kernels share."""

    rank: int
    width: int  # elements of a row of t; those past the rank are 0, or NaN if x is infinite
    dtype: tl.dtype  # of y
    precision: str  # of tl.dot on float32: ieee or tf32x3
    transposed: bool


@triton.jit
def token_block(block, tokens, BM: tl.constexpr):
    """Tokens of a block, (BM,) int64; whether each is in the slice, else it repeats the last one; and their slice.

    A slice has ``tokens`` tokens and starts a new block.
    """
    blocks = tl.cdiv(tokens, BM)
    part = block // blocks
    i = (block - part * blocks) * BM + tl.arange(0, BM)
    return part.to(tl.int64) * tokens + tl.minimum(i, tokens - 1), i < tokens, part


@triton.jit
def core_tile(core_ptr, k, j, SHAPE: tl.constexpr):
    """N[k, j] for k (K, 1) and j (1, J); 0 outside."""
    place = k * SHAPE.rank + j if SHAPE.transposed else j * SHAPE.rank + k
    return tl.load(core_ptr + place, mask=(k < SHAPE.rank) & (j < SHAPE.rank), other=0.0)


@triton.jit
def load_inputs(pointer, k, columns):
    """A chunk of x."""
    return tl.load(pointer, mask=(k < columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x_ptr,
    factor_ptr,  # F (columns, rank)
    core_ptr,  # of the first slice
    core_stride: tl.int64,
    t_ptr,
    tokens,  # of a slice
    columns,
    stride,  # of x
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,  # x is of another dtype than y: two values of y's dtype represent one of x
    MIXES: tl.constexpr,  # t = round(x F N); else x F in float32
):
    """t = round(x F N) or x F: a block of tokens, some columns of t."""
    program = tl.program_id(0)
    ACROSS: tl.constexpr = (SHAPE.width + TILE.columns - 1) // TILE.columns
    i, inside, part = token_block(program // ACROSS, tokens, TILE.rows)
    j = program % ACROSS * TILE.columns + tl.arange(0, TILE.columns)
    k = tl.arange(0, TILE.step)
    x_pointer = x_ptr + (i[:, None] * stride + k[None, :])
    f_pointer = factor_ptr + (k[:, None] * SHAPE.rank + j[None, :])
    t = tl.zeros((TILE.rows, TILE.columns), tl.float32)
    for first in range(0, columns, TILE.step):
        x = load_inputs(x_pointer + first, first + k, columns)
        offset = tl.cast(first, tl.int64) * SHAPE.rank
        f = tl.load(f_pointer + offset, mask=(first + k < columns)[:, None] & (j < SHAPE.rank)[None, :], other=0.0)
        f = round_to(f.to(tl.float32), SHAPE.dtype)
        high = round_to(x.to(tl.float32), SHAPE.dtype)
        t = dot(high, f, t, SHAPE.precision)
        if SPLIT:
            t = dot(round_to(x.to(tl.float32) - high.to(tl.float32), SHAPE.dtype), f, t, SHAPE.precision)
    if MIXES:
        n = core_tile(core_ptr + part * core_stride, tl.arange(0, TILE.columns)[:, None], j[None, :], SHAPE)
        t = round_to(tl.dot(t, n, input_precision=SHAPE.precision), SHAPE.dtype)
    t_pointer = t_ptr + (i[:, None] * SHAPE.width + j[None, :])
    tl.store(t_pointer, t, mask=inside[:, None] & (j < SHAPE.width)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    indices_ptr,  # of rows of F; None: row i is token i's x F
    rows_ptr,  # x F (tokens, STRIDE) float32, or F
    core_ptr,
    core_stride: tl.int64,
    t_ptr,
    tokens,
    STRIDE: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """t = round(T N), T = x F or F[x]: a block of tokens, some columns of t."""
    program = tl.program_id(0)
    ACROSS: tl.constexpr = (SHAPE.width + TILE.columns - 1) // TILE.columns
    i, inside, part = token_block(program // ACROSS, tokens, TILE.rows)
    j = program % ACROSS * TILE.columns + tl.arange(0, TILE.columns)
    core_ptr += part * core_stride
    row = i
    if indices_ptr is not None:
        row = tl.load(indices_ptr + i).to(tl.int64)
    t = tl.zeros((TILE.rows, TILE.columns), tl.float32)
    for first in range(0, SHAPE.rank, TILE.step):
        k = first + tl.arange(0, TILE.step)
        p = tl.load(rows_ptr + (row[:, None] * STRIDE + k[None, :]), mask=(k < SHAPE.rank)[None, :], other=0.0)
        p = p.to(tl.float32)
        if indices_ptr is not None:
            p = round_to(p, SHAPE.dtype).to(tl.float32)
        n = core_tile(core_ptr, k[:, None], j[None, :], SHAPE)
        t = tl.dot(p, n, acc=t, input_precision=SHAPE.precision)
    t_pointer = t_ptr + (i[:, None] * SHAPE.width + j[None, :])
    tl.store(t_pointer, round_to(t, SHAPE.dtype), mask=inside[:, None] & (j < SHAPE.width)[None, :])


@triton.jit
def load_outputs(pointer, inside):
    """A tile of y."""
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    t_ptr,
    factor_ptr,  # G (columns, rank)
    y_ptr,
    tokens,
    columns,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """y <- round(y + t G^T): a tile of y."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, TILE.columns)
    i = (program // across).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    j = (program % across).to(tl.int64) * TILE.columns + tl.arange(0, TILE.columns)
    k = tl.arange(0, TILE.step)
    t_pointer = t_ptr + (tl.minimum(i, tokens - 1)[:, None] * SHAPE.width + k[None, :])
    g_pointer = factor_ptr + (tl.minimum(j, columns - 1)[None, :] * SHAPE.rank + k[:, None])
    acc = tl.zeros((TILE.rows, TILE.columns), tl.float32)
    for first in range(0, SHAPE.width, TILE.step):
        t = tl.load(t_pointer + first)
        g = tl.load(g_pointer + first, mask=(first + k < SHAPE.rank)[:, None], other=0.0)
        acc = dot(t, round_to(g.to(tl.float32), SHAPE.dtype), acc, "ieee")
    y_pointer = y_ptr + (i[:, None] * columns + j[None, :])
    inside = (i < tokens)[:, None] & (j < columns)[None, :]
    y = load_outputs(y_pointer, inside).to(tl.float32)
    tl.store(y_pointer, round_to(y + acc, SHAPE.dtype), mask=inside)


def spaced(cores):
    """The first core and the distance between cores, in elements; cores at unequal distances are copied."""
    addresses = [core.data_ptr() for core in cores]
    distances = {after - before for before, after in pairwise(addresses)} or {0}
    if len(distances) > 1:
        stacked = torch.stack(cores)
        return stacked, stacked.stride(0)
    return cores[0], distances.pop() // cores[0].element_size()


def lowrank_forward_(outputs, inputs, left, right, cores, transposed):
    """``ops.lowrank_forward_``: project and expand, mix and expand for row indices, or all three.

    There is no table, and nothing comes from the host: a captured graph replays with what the tensors hold then.
    """
    device, dtype, rank, tokens = outputs.device, outputs.dtype, left.shape[1], len(outputs)
    into, out_of = (left, right) if transposed else (right, left)
    gather = not inputs.is_floating_point()
    split = not gather and inputs.dtype != dtype != torch.float32
    config = forward_config(dtype, rank, split)
    width, mixes = config.width(rank), config.mixes and not gather
    shape = Shape(rank, width, TYPES[dtype], precision_on(device, dtype, width), transposed)
    t = torch.empty(tokens, width, dtype=dtype, device=device)
    core, core_stride = spaced(cores)
    per_slice = tokens // len(cores)
    common = {"core_ptr": core, "core_stride": core_stride, "tokens": per_slice, "SHAPE": shape}

    def programs(tile):
        return len(cores) * triton.cdiv(per_slice, tile.rows) * triton.cdiv(width, tile.columns)

    rows = into
    if not gather:
        x = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
        rows = t if mixes else torch.empty(tokens, width, dtype=torch.float32, device=device)
        launch(
            project_kernel,
            programs(config.project),
            device,
            config.project.config,
            x_ptr=x,
            factor_ptr=into,
            t_ptr=rows,
            columns=x.shape[1],
            stride=x.stride(0),
            TILE=config.project,
            SPLIT=split,
            MIXES=mixes,
            **common,
        )
    if not mixes:
        launch(
            mix_kernel,
            programs(config.mix),
            device,
            config.mix.config,
            indices_ptr=inputs.contiguous() if gather else None,
            rows_ptr=rows,
            t_ptr=t,
            STRIDE=rows.shape[1],
            TILE=config.mix,
            **common,
        )
    columns = outputs.shape[1]
    launch(
        expand_kernel,
        triton.cdiv(tokens, config.expand.rows) * triton.cdiv(columns, config.expand.columns),
        device,
        config.expand.config,
        t_ptr=t,
        factor_ptr=out_of,
        y_ptr=outputs,
        tokens=tokens,
        columns=columns,
        SHAPE=shape,
        TILE=config.expand,
    )
