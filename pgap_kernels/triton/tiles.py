"""Tiles of 4096 logical elements, over the tensors of a table: where a program's tile is, and reading and writing it.

A tile is one group of the noise contract: 1024 counters, four runs of 1024 elements (lanes), each a block
(BLOCK / 8, 8) of elements, so that a thread's 8 elements are one 128-bit access of a 16-bit weight. Whole tiles of
aligned tensors are read and written without a mask, which allows wide accesses; all others under a mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .noise import group_noise, group_words
from .rounding import round_to
from .table import (
    ALIGNED,
    BASE,
    COLUMNS,
    FIELDS,
    FIRST_TILE,
    GROUP,
    LEADING,
    ROW_STRIDE,
    SCALAR,
    TENSOR_ID,
    TILES_PER_ROW,
)

BLOCK = tl.constexpr(1024)


class Tile(NamedTuple):
    """A program's tile."""

    entry: tl.tensor  # pointer to the tensor's row of the table
    row: tl.tensor
    group: tl.tensor  # of the noise contract
    tensor_id: tl.tensor
    scalar: tl.tensor  # column of the tables of scalars
    offset: tl.tensor  # of the tile's first element in the row; negative where the row begins inside the tile
    columns: tl.tensor  # of the row
    whole: tl.tensor  # all elements of the group are in the row, and every access is aligned
    r: tl.tensor  # where an element of a lane is in memory, (BLOCK / 8, 8)


@triton.jit
def locate(table):
    """The tile of this program."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table.entries + tl.load(table.owners + tile).to(tl.int64) * FIELDS
    base = tl.load(entry + BASE)
    tile -= tl.load(entry + FIRST_TILE)
    per_row = tl.load(entry + TILES_PER_ROW).to(tl.int32)
    row = tl.zeros((), tl.int64)
    if per_row != 0:
        row = (tile.to(tl.int32) // per_row).to(tl.int64)
        tile -= row * per_row
        base += row * tl.load(entry + ROW_STRIDE)
    group = (base >> 12) + tile
    offset, columns = (group << 12) - base, tl.load(entry + COLUMNS)
    # Not base + size: the last group ends at 2**63, which would overflow.
    whole = (tl.load(entry + ALIGNED) != 0) & (offset <= columns - GROUP)
    tensor_id, scalar = tl.load(entry + TENSOR_ID).to(tl.uint32), tl.load(entry + SCALAR)
    return Tile(entry, row, group, tensor_id, scalar, offset, columns, whole, offsets())


@triton.jit
def offsets():
    """0 .. 1023, (BLOCK / 8, 8)."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def counters(counters_ptr):
    """The same numbers, read from a table that stays in cache.

    The compiler derives register layouts from loads: noise computed from this load has the layout of W's 128-bit
    accesses. Noise computed from ``offsets`` would be converted to it through shared memory.
    """
    return tl.load(tl.multiple_of(counters_ptr, 16) + offsets())


@triton.jit
def tile_noise(tile, counter, key, NOISE: tl.constexpr):
    """z of the tile, stacked."""
    z0, z1, z2, z3 = group_noise(tile.group, counter, tile.tensor_id, key, NOISE)
    return stack(z0, z1, z2, z3)


@triton.jit
def tile_words(tile, counter, key):
    """Words of the tile's elements, stacked."""
    x0, x1, x2, x3 = group_words(tile.group, counter, tile.tensor_id, key)
    return stack(x0, x1, x2, x3)


@triton.jit
def address(tile, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """Address, in bytes, of the tile's first element in the tensor of a column."""
    elements = tile.row * tl.load(tile.entry + LEADING + FIELD) + tile.offset
    return tl.load(tile.entry + FIELD) + elements * (TYPE.primitive_bitwidth // 8)


@triton.jit
def aligned(place, TYPE: tl.constexpr):
    """The pointer at an address, declared a multiple of 16.

    Without a mask it must be one. Under a mask that may differ between elements no access is widened, so there the
    declaration does nothing but give both branches of a tile the same register layout.
    """
    return tl.multiple_of(place.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def stack(x0, x1, x2, x3):
    """Four lanes (BLOCK / 8, 8) as one tensor (BLOCK / 8, 8, 2, 2), on which the algebra is written once."""
    return tl.join(tl.join(x0, x1), tl.join(x2, x3))


@triton.jit
def unstack(x):
    """The four lanes again."""
    even, odd = tl.split(x)
    x0, x1 = tl.split(even)
    x2, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def pick_lane(lane, x0, x1, x2, x3):
    """One of four lanes, chosen in a loop: kernels that read more than W go lane by lane, to save registers."""
    return tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))


@triton.jit
def load_lane(tile, place, lane, TYPE: tl.constexpr):
    """One lane of the tile at an address as float32; what lies outside the row is 0."""
    pointer = aligned(place + lane * (1024 * (TYPE.primitive_bitwidth // 8)), TYPE) + tile.r
    c = tile.offset + lane * 1024 + tile.r
    if tile.whole:
        w = tl.load(pointer).to(tl.float32)
    else:
        w = tl.load(pointer, mask=(c >= 0) & (c < tile.columns), other=0.0).to(tl.float32)
    return w


@triton.jit
def store_lane(tile, place, lane, value, TYPE: tl.constexpr):
    """Write one lane of float32 to nearest, where it is in the row."""
    pointer = aligned(place + lane * (1024 * (TYPE.primitive_bitwidth // 8)), TYPE) + tile.r
    c = tile.offset + lane * 1024 + tile.r
    if tile.whole:
        tl.store(pointer, round_to(value, TYPE))
    else:
        tl.store(pointer, round_to(value, TYPE), mask=(c >= 0) & (c < tile.columns))


@triton.jit
def load_tile(tile, place, TYPE: tl.constexpr):
    """The tile at an address as float32, stacked; elements outside the row are 0.

    Both branches convert to float32, so that the compiler does not unpack 16-bit weights twice.
    """
    pointer = aligned(place, TYPE) + tile.r
    if tile.whole:
        w0, w1 = tl.load(pointer).to(tl.float32), tl.load(pointer + 1024).to(tl.float32)
        w2, w3 = tl.load(pointer + 2048).to(tl.float32), tl.load(pointer + 3072).to(tl.float32)
    else:
        c, n = tile.offset + tile.r, tile.columns
        w0 = tl.load(pointer, mask=(c >= 0) & (c < n), other=0.0).to(tl.float32)
        w1 = tl.load(pointer + 1024, mask=(c + 1024 >= 0) & (c + 1024 < n), other=0.0).to(tl.float32)
        w2 = tl.load(pointer + 2048, mask=(c + 2048 >= 0) & (c + 2048 < n), other=0.0).to(tl.float32)
        w3 = tl.load(pointer + 3072, mask=(c + 3072 >= 0) & (c + 3072 < n), other=0.0).to(tl.float32)
    return stack(w0, w1, w2, w3)


@triton.jit
def store_tile(tile, place, value, TYPE: tl.constexpr):
    """Write a stacked tile of float32 to nearest, where it is in the row."""
    pointer = aligned(place, TYPE) + tile.r
    v0, v1, v2, v3 = unstack(value)
    if tile.whole:
        tl.store(pointer, round_to(v0, TYPE))
        tl.store(pointer + 1024, round_to(v1, TYPE))
        tl.store(pointer + 2048, round_to(v2, TYPE))
        tl.store(pointer + 3072, round_to(v3, TYPE))
    else:
        c, n = tile.offset + tile.r, tile.columns
        tl.store(pointer, round_to(v0, TYPE), mask=(c >= 0) & (c < n))
        tl.store(pointer + 1024, round_to(v1, TYPE), mask=(c + 1024 >= 0) & (c + 1024 < n))
        tl.store(pointer + 2048, round_to(v2, TYPE), mask=(c + 2048 >= 0) & (c + 2048 < n))
        tl.store(pointer + 3072, round_to(v3, TYPE), mask=(c + 3072 >= 0) & (c + 3072 < n))
