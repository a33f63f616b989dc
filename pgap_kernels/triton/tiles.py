"""Many tensors in one launch: a table of tensors, a map from program to tensor, tiles of 4096 logical elements.

A tile is one group of the noise contract: 1024 counters, four runs of 1024 elements (lanes), each a block
(BLOCK / 8, 8) of elements, so that a thread's 8 elements are one 128-bit access of a 16-bit weight. Whole tiles of
aligned tensors are read and written without a mask, which is what lets the compiler do so; the others under one.
"""

import triton
import triton.language as tl

from .rounding import narrow

# Columns of the table, one int64 each; launch.py fills them.
OUT = tl.constexpr(0)  # address written
IN = tl.constexpr(1)  # address read
EXTRA = tl.constexpr(2)  # addresses of two tensors of the same shape (state, anchor) or of mask bits
SECOND = tl.constexpr(3)
COLUMNS = tl.constexpr(4)  # contiguous elements in a row
BASE = tl.constexpr(5)  # logical index of the first element
ROW_STRIDE = tl.constexpr(6)  # between the logical indices of rows
TENSOR_ID = tl.constexpr(7)
FIRST_TILE = tl.constexpr(8)
TILES_PER_ROW = tl.constexpr(9)  # 0: one row
ALIGNED = tl.constexpr(10)  # every address and the base begin a whole tile
SCALAR = tl.constexpr(11)  # column of the tables of scalars
LEADING = tl.constexpr(12)  # strides between rows in memory, of OUT, IN, EXTRA, SECOND
ROWS = tl.constexpr(16)
TILES = tl.constexpr(17)
FIELDS = tl.constexpr(24)

GROUP = tl.constexpr(4096)
BLOCK = tl.constexpr(1024)


@triton.jit
def locate(map_ptr, table_ptr):
    """This program's entry of the table, its row, its group, and the logical index of the row's first element."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.load(map_ptr + tile).to(tl.int64) * FIELDS
    base = tl.load(entry + BASE)
    tile -= tl.load(entry + FIRST_TILE)
    per_row = tl.load(entry + TILES_PER_ROW).to(tl.int32)
    row = tl.zeros((), tl.int64)
    if per_row != 0:
        row = (tile.to(tl.int32) // per_row).to(tl.int64)
        tile -= row * per_row
        base += row * tl.load(entry + ROW_STRIDE)
    return entry, row, (base >> 12) + tile, base


@triton.jit
def offsets():
    """r of the tile's elements, (BLOCK / 8, 8): where they are in memory."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def counters(iota_ptr):
    """The same r, read from a table of 0 .. 1023 that stays in cache.

    A load is what the compiler places first: the noise computed from it is in the registers where W's 128-bit accesses
    want it. Computed from ``offsets`` it would go through shared memory to get there.
    """
    return tl.load(tl.multiple_of(iota_ptr, 16) + offsets())


@triton.jit
def is_whole(entry, group, base):
    """Whether all elements of the group are in the row and every access is aligned."""
    inside = (group << 12) - base <= tl.load(entry + COLUMNS) - GROUP  # no sum: the last group ends at 2**63
    return (tl.load(entry + ALIGNED) != 0) & inside


@triton.jit
def address(entry, FIELD: tl.constexpr, LEAD: tl.constexpr, row, offset, TYPE: tl.constexpr):
    """Address of the element at ``offset`` of a row, in bytes."""
    elements = row * tl.load(entry + LEADING + LEAD) + offset
    return tl.load(entry + FIELD) + elements * (TYPE.primitive_bitwidth // 8)


@triton.jit
def aligned(place, TYPE: tl.constexpr):
    """The pointer at an address, declared a multiple of 16.

    Without a mask it has to be one. Under a mask that may change from element to element no access is ever widened,
    and the declaration only gives both branches of a tile one register layout.
    """
    return tl.multiple_of(place.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def stack(x0, x1, x2, x3):
    """Four lanes (BLOCK / 8, 8) as one tensor (BLOCK / 8, 8, 2, 2), on which the algebra is written once."""
    return tl.join(tl.join(x0, x1), tl.join(x2, x3))


@triton.jit
def lanes(x):
    """The four lanes again."""
    even, odd = tl.split(x)
    x0, x1 = tl.split(even)
    x2, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def pick(lane, x0, x1, x2, x3):
    """One of four lanes, chosen in a loop: work that reads more than W goes lane by lane, or registers run out."""
    return tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))


@triton.jit
def load_lane(place, lane, r, offset, columns, whole, TYPE: tl.constexpr):
    """One lane of a tile as float32; what lies outside the row is 0."""
    here = aligned(place + lane * (1024 * (TYPE.primitive_bitwidth // 8)), TYPE) + r
    c = offset + lane * 1024 + r
    if whole:
        w = tl.load(here).to(tl.float32)
    else:
        w = tl.load(here, mask=(c >= 0) & (c < columns), other=0.0).to(tl.float32)
    return w


@triton.jit
def store_lane(place, lane, r, offset, columns, whole, value, TYPE: tl.constexpr):
    """Write one lane of float32 to nearest, where it is in the row."""
    here = aligned(place + lane * (1024 * (TYPE.primitive_bitwidth // 8)), TYPE) + r
    c = offset + lane * 1024 + r
    if whole:
        tl.store(here, narrow(value, TYPE))
    else:
        tl.store(here, narrow(value, TYPE), mask=(c >= 0) & (c < columns))


@triton.jit
def load_tile(place, r, offset, columns, whole, TYPE: tl.constexpr):
    """A tile as float32, stacked; what lies outside the row is 0. Each branch widens, so that none unpacks twice."""
    here = aligned(place, TYPE) + r
    if whole:
        w0, w1 = tl.load(here).to(tl.float32), tl.load(here + 1024).to(tl.float32)
        w2, w3 = tl.load(here + 2048).to(tl.float32), tl.load(here + 3072).to(tl.float32)
    else:
        c = offset + r
        w0 = tl.load(here, mask=(c >= 0) & (c < columns), other=0.0).to(tl.float32)
        w1 = tl.load(here + 1024, mask=(c + 1024 >= 0) & (c + 1024 < columns), other=0.0).to(tl.float32)
        w2 = tl.load(here + 2048, mask=(c + 2048 >= 0) & (c + 2048 < columns), other=0.0).to(tl.float32)
        w3 = tl.load(here + 3072, mask=(c + 3072 >= 0) & (c + 3072 < columns), other=0.0).to(tl.float32)
    return stack(w0, w1, w2, w3)


@triton.jit
def store_tile(place, r, offset, columns, whole, value, TYPE: tl.constexpr):
    """Write a stacked tile of float32 to nearest, where it is in the row."""
    here = aligned(place, TYPE) + r
    v0, v1, v2, v3 = lanes(value)
    if whole:
        tl.store(here, narrow(v0, TYPE))
        tl.store(here + 1024, narrow(v1, TYPE))
        tl.store(here + 2048, narrow(v2, TYPE))
        tl.store(here + 3072, narrow(v3, TYPE))
    else:
        c = offset + r
        tl.store(here, narrow(v0, TYPE), mask=(c >= 0) & (c < columns))
        tl.store(here + 1024, narrow(v1, TYPE), mask=(c + 1024 >= 0) & (c + 1024 < columns))
        tl.store(here + 2048, narrow(v2, TYPE), mask=(c + 2048 >= 0) & (c + 2048 < columns))
        tl.store(here + 3072, narrow(v3, TYPE), mask=(c + 3072 >= 0) & (c + 3072 < columns))
