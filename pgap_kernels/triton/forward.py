"""Low-rank directions in the forward: y changes by what D = A C B^T would add; W itself is only read by its layer.

    t = round(x F N),   y <- round(y + t G^T)        F, G, N = B, A, C^T;  transposed A, B, C;  x F = F[x] for indices x
                                                     N = c if there is no core

F, G and t are rounded to the dtype of a 16-bit y; sums are float32. An x of another dtype is represented by two numbers
of y's dtype, the nearest and the remainder. `project_kernel` makes t if N fits into registers beside x F. Else it
writes x F, from which `mix_kernel` makes t, as it does from F[x]. `expand_kernel` reads and writes y once. Tokens are
split into equal slices, each with a core or a coefficient; factors are shared by all slices, or one for each slice.
Drawn factors are made first, by `draw_kernel`. A token's sums do not depend on the other tokens.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import DRAW, DRAW_CONFIG, forward_config
from .factors import precision_on
from .launch import architecture, blocks, launch
from .lowrank import dot
from .noise import element_normal
from .rounding import TYPES, round_to


class Shape(NamedTuple):
    """Constants that the kernels share."""

    rank: int
    width: int  # elements of a row of t; those past the rank are 0, or NaN if x is infinite
    dtype: tl.dtype  # of y
    precision: str  # of tl.dot on float32: ieee or tf32x3
    transposed: bool
    cored: bool  # a core for each slice, else a coefficient


@triton.jit(do_not_specialize=["tensor_id", "base"])
def draw_kernel(
    keys_ptr,  # of each slice, STRIDE apart
    out_ptr,  # (slices, size)
    tensor_id: tl.int64,
    base: tl.int64,  # logical index of the first element
    size: tl.int64,  # of a factor
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A factor of each slice: normal numbers base, base + 1, .. of its key, rounded to out's dtype."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK)
    part = program // blocks
    i = (program - part * blocks) * BLOCK + tl.arange(0, BLOCK)
    z = element_normal(base + i, tensor_id.to(tl.uint32), tl.load(keys_ptr + part * STRIDE))
    tl.store(out_ptr + part * size + i, round_to(z, out_ptr.dtype.element_ty), mask=i < size)


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
def plus(x, product):
    """x + product, rounded once. Triton makes one product that starts from x of a plain sum of the two."""
    return tl.fma(product, 1.0, x)


@triton.jit
def times_core(t, core_ptr, j, SHAPE: tl.constexpr, K: tl.constexpr):
    """x F N of (BM, K) columns of x F that hold the whole rank, rounded."""
    if SHAPE.cored:
        n = core_tile(core_ptr, tl.arange(0, K)[:, None], j[None, :], SHAPE)
        t = tl.dot(t, n, input_precision=SHAPE.precision)
    else:
        t = t * tl.load(core_ptr)
    return round_to(t, SHAPE.dtype)


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
    factor_ptr,  # F (columns, rank) of the first slice
    factor_stride: tl.int64,
    core_ptr,  # of the first slice; its coefficient where there is no core
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
    factor_ptr += part * factor_stride
    f_pointer = factor_ptr + (k[:, None] * SHAPE.rank + j[None, :])
    t = tl.zeros((TILE.rows, TILE.columns), tl.float32)
    for first in range(0, columns, TILE.step):
        x = load_inputs(x_pointer + first, first + k, columns)
        offset = tl.cast(first, tl.int64) * SHAPE.rank
        f = tl.load(f_pointer + offset, mask=(first + k < columns)[:, None] & (j < SHAPE.rank)[None, :], other=0.0)
        f = round_to(f.to(tl.float32), SHAPE.dtype)
        high = round_to(x.to(tl.float32), SHAPE.dtype)
        if SHAPE.dtype == tl.float32:  # sums of sums: a single chain over all columns would lose bits
            t = plus(t, dot(high, f, tl.zeros((TILE.rows, TILE.columns), tl.float32), SHAPE.precision))
        else:
            t = dot(high, f, t, SHAPE.precision)
        if SPLIT:
            t = dot(round_to(x.to(tl.float32) - high.to(tl.float32), SHAPE.dtype), f, t, SHAPE.precision)
    if MIXES:
        t = times_core(t, core_ptr + part * core_stride, j, SHAPE, TILE.columns)
    t_pointer = t_ptr + (i[:, None] * SHAPE.width + j[None, :])
    tl.store(t_pointer, t, mask=inside[:, None] & (j < SHAPE.width)[None, :])


@triton.jit
def load_rows(rows_ptr, row, k, ROUNDS: tl.constexpr, STRIDE: tl.constexpr, SHAPE: tl.constexpr):
    """x F[row, k] in float32, of a factor in y's precision; 0 beyond the rank."""
    p = tl.load(rows_ptr + (row[:, None] * STRIDE + k[None, :]), mask=(k < SHAPE.rank)[None, :], other=0.0)
    p = p.to(tl.float32)
    if ROUNDS:
        p = round_to(p, SHAPE.dtype).to(tl.float32)
    return p


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    indices_ptr,  # of rows of F; None: row i is token i's x F
    rows_ptr,  # x F (tokens, STRIDE) float32, or F of the first slice
    rows_stride: tl.int64,  # from one slice's F to the next
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
        rows_ptr += part * rows_stride
    if SHAPE.cored:
        t = tl.zeros((TILE.rows, TILE.columns), tl.float32)
        for first in range(0, SHAPE.rank, TILE.step):
            k = first + tl.arange(0, TILE.step)
            p = load_rows(rows_ptr, row, k, indices_ptr is not None, STRIDE, SHAPE)
            t = tl.dot(p, core_tile(core_ptr, k[:, None], j[None, :], SHAPE), acc=t, input_precision=SHAPE.precision)
    else:
        t = load_rows(rows_ptr, row, j, indices_ptr is not None, STRIDE, SHAPE) * tl.load(core_ptr)
    t_pointer = t_ptr + (i[:, None] * SHAPE.width + j[None, :])
    tl.store(t_pointer, round_to(t, SHAPE.dtype), mask=inside[:, None] & (j < SHAPE.width)[None, :])


@triton.jit
def load_outputs(pointer, inside):
    """A tile of y."""
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    t_ptr,
    factor_ptr,  # G (columns, rank) of the first slice
    factor_stride: tl.int64,
    y_ptr,
    tokens,  # of a slice; of all where they share G
    columns,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    SLICED: tl.constexpr,  # each slice has its own G
):
    """y <- round(y + t G^T): a tile of y."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, TILE.columns)
    block = program // across
    if SLICED:  # a division more, some 45 instructions of a thread
        blocks = tl.cdiv(tokens, TILE.rows)
        part = block // blocks
        block -= part * blocks
        t_ptr += part.to(tl.int64) * tokens * SHAPE.width
        y_ptr += part.to(tl.int64) * tokens * columns
        factor_ptr += part * factor_stride
    i = block.to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
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
    tl.store(y_pointer, round_to(plus(y, acc), SHAPE.dtype), mask=inside)


def first_and_stride(tensors):
    """The first tensor and the distance between tensors, in elements; if the distances differ, they are copied."""
    addresses = [t.data_ptr() for t in tensors]
    distances = {after - before for before, after in pairwise(addresses)} or {0}
    distance, size = distances.pop(), tensors[0].element_size()
    if distances or distance % size:
        stacked = torch.stack(tensors)
        return stacked, stacked.stride(0)
    return tensors[0], distance // size


def factor_of_slices(a, side, dtype, device):
    """A or B: the first slice's, and the distance to the next one's; drawn ones are made now, in y's dtype."""
    stored = (a.left, a.right)[side]
    if stored:
        return first_and_stride(stored)
    base, row_stride = a.span or (0, 1)
    first, size = (base // row_stride, base % row_stride)[side], a.shape[side] * a.rank
    keys = torch.stack([pair[:2] for pair in a.keys])
    drawn = torch.empty(a.slices, size, dtype=dtype, device=device)
    launch(
        draw_kernel,
        a.slices * blocks(size, DRAW),
        device,
        DRAW_CONFIG,
        keys_ptr=keys[:, side:],
        out_ptr=drawn,
        tensor_id=a.tensor_id,
        base=first * a.rank,
        size=size,
        STRIDE=2,
        BLOCK=DRAW,
    )
    return drawn, size if a.slices > 1 else 0


def lowrank_forward_(outputs, inputs, a):
    """``ops.lowrank_forward_``: project and expand, mix and expand for row indices, or all three.

    No table and nothing from the host: a captured graph replays with what the tensors hold then.
    """
    device, dtype, tokens = outputs.device, outputs.dtype, outputs.shape[0]
    left, right = (factor_of_slices(a, side, dtype, device) for side in (0, 1))
    (into, into_stride), (out_of, out_of_stride) = (left, right) if a.transposed else (right, left)
    gather = not inputs.is_floating_point()
    split = not gather and inputs.dtype != dtype != torch.float32
    config = forward_config(dtype, a.rank, architecture(device), split)
    width, mixes = config.width(a.rank), config.mixes and not gather
    precision = precision_on(device, dtype, width)
    shape = Shape(a.rank, width, TYPES[dtype], precision, a.transposed, bool(a.cores))
    t = torch.empty(tokens, width, dtype=dtype, device=device)
    core, core_stride = first_and_stride(a.cores or a.coefficients)
    per_slice = tokens // a.slices
    common = {"core_ptr": core, "core_stride": core_stride, "tokens": per_slice, "SHAPE": shape}

    def programs(tile):
        return a.slices * blocks(per_slice, tile.rows) * blocks(width, tile.columns)

    rows, rows_stride, stride = into, into_stride, a.rank
    if not gather:
        x = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
        rows = t if mixes else torch.empty(tokens, width, dtype=torch.float32, device=device)
        stride = width
        launch(
            project_kernel,
            programs(config.project),
            device,
            config.project.config,
            x_ptr=x,
            factor_ptr=into,
            factor_stride=into_stride,
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
            rows_stride=rows_stride,
            t_ptr=t,
            STRIDE=stride,
            TILE=config.mix,
            **common,
        )
    # Where all share G a program's tokens may be of several slices.
    slices, own, columns = (a.slices, per_slice, outputs.shape[1]) if out_of_stride else (1, tokens, outputs.shape[1])
    launch(
        expand_kernel,
        slices * blocks(own, config.expand.rows) * blocks(columns, config.expand.columns),
        device,
        config.expand.config,
        t_ptr=t,
        factor_ptr=out_of,
        factor_stride=out_of_stride,
        y_ptr=outputs,
        tokens=own,
        columns=columns,
        SHAPE=shape,
        TILE=config.expand,
        SLICED=slices > 1,
    )
