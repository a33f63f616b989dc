"""The table of a launch over many tensors: a row of int64 columns for each tensor, and the row of each program.

A table is built once for a list of tensors and found again by their addresses, shapes and strides, which are read at
each call, so a tensor that was moved gets another table. Kernels read the columns with ``tiles.locate`` and
``tiles.address``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import checks
from .cache import Cache, Hashed

# Columns. The first four are addresses: LEADING + OUT is the row stride in memory of what OUT points to, and so on.
OUT = tl.constexpr(0)  # written
IN = tl.constexpr(1)  # read
EXTRA0 = tl.constexpr(2)  # two more operands; each kernel family names its own
EXTRA1 = tl.constexpr(3)
COLUMNS = tl.constexpr(4)  # contiguous elements in a row
BASE = tl.constexpr(5)  # logical index of the first element
ROW_STRIDE = tl.constexpr(6)  # between the logical indices of rows
TENSOR_ID = tl.constexpr(7)
FIRST_TILE = tl.constexpr(8)
TILES_PER_ROW = tl.constexpr(9)  # 0: one row
# Every address and row stride in memory is a multiple of 16 bytes; in dense tables the base and the row stride are
# multiples of whole tiles, too.
ALIGNED = tl.constexpr(10)
SCALAR = tl.constexpr(11)  # column of the tables of scalars
LEADING = tl.constexpr(12)  # strides between rows in memory, of the four addresses
ROWS = tl.constexpr(16)
TILES = tl.constexpr(17)
CORE = tl.constexpr(18)  # low rank: address of C or of its diagonal
FIRST_ROW = tl.constexpr(19)  # low rank: of the shard in the unsharded matrix
BELOW = tl.constexpr(20)  # low rank: Q of a quotient, first element in its workspace
FIELDS = tl.constexpr(24)  # padded: with 20, computing a row's address takes more instructions on gfx942

GROUP = tl.constexpr(4096)  # elements of a tile: a group of the noise contract


class TablePointers(NamedTuple):
    """What kernels take of a table."""

    entries: Tensor  # (tensors, FIELDS) int64
    owners: Tensor  # (programs,) int32: the tensor of each program


class Table(NamedTuple):
    pointers: TablePointers
    programs: int


# Mode scratch passes a list of its own for every parameter and kind of direction.
_tables = Cache(2048)


def table_key(*lists: Sequence[Tensor]) -> Hashable:
    """Everything that a table holds of these tensors: equal keys mean equal tables."""
    found: list[Hashable] = []
    for i, tensors in enumerate(lists):
        earlier = next((j for j in range(i) if lists[j] is tensors), None)  # in place, what is read is what is written
        if earlier is None:
            found.append(tuple([(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]))
        else:
            found.append(earlier)
    return tuple(found)


def cached_table(key: Hashable, build: Callable[[], Table]) -> Table:
    """The table built earlier for the same key, which holds the ``table_key`` of every tensor in it."""
    return _tables.get(Hashed(key), build)


def build_table(entries: list[dict[tl.constexpr, int]], tiles: list[int], device: torch.device) -> Table:
    """A table on the device from the columns of each tensor and the number of its programs."""
    rows, first = [], 0
    for entry, count in zip(entries, tiles, strict=True):
        row = [0] * FIELDS.value
        for column, value in (entry | {FIRST_TILE: first, TILES: count}).items():
            row[column.value] = value
        rows.append(row)
        first += count
    owners = torch.arange(len(tiles), dtype=torch.int32, device="cpu")
    owners = owners.repeat_interleave(torch.tensor(tiles, device="cpu"))
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return Table(TablePointers(table.to(device), owners.to(device)), first)


def _count_tiles(rows: int, columns: int, base: int, row_stride: int) -> tuple[int, int]:
    """(tiles per row, 0 where there is one row, and tiles)."""
    if rows * columns == 0:
        return 0, 0
    group = GROUP.value
    if rows == 1:
        return 0, ((base % group) + columns + group - 1) // group
    if row_stride % group == 0:
        per_row = ((base % group) + columns + group - 1) // group
    else:
        per_row = (columns + group - 2) // group + 1  # wherever a row begins
    return per_row, rows * per_row


def dense_table(
    out: Sequence[Tensor],
    source: Sequence[Tensor],
    tensor_ids: Sequence[int],
    slices: Sequence[int],
    per_tensor: bool,
    extra0: Sequence[Tensor] = (),
    extra1: Sequence[Tensor] = (),
    same_shape: bool = True,
) -> Table:
    """The table of a launch over tiles of 4096 logical elements.

    Args:
        out, source: tensors written and read, of the same shapes; ``source`` may be empty.
        tensor_ids, slices: as the ops pass them.
        per_tensor: whether tables of scalars have a column per tensor.
        extra0, extra1: more tensors of the same shapes; with ``same_shape`` False, ``extra0`` has another shape and
            kernels address it in their own way.
    """
    lists = [out, source, extra0, extra1]
    key = ("dense", out[0].device, tuple(tensor_ids), tuple(slices), per_tensor, same_shape, table_key(*lists))
    return cached_table(key, lambda: _build_dense_table(lists, tensor_ids, slices, per_tensor, same_shape))


def _build_dense_table(lists, tensor_ids, slices, per_tensor, same_shape) -> Table:
    entries, tiles = [], []
    for t in range(len(lists[0])):
        entry: dict[tl.constexpr, int] = {}
        layouts = []  # address, row stride and element size of each operand
        for column, tensors in zip((OUT, IN, EXTRA0, EXTRA1), lists, strict=True):
            if not tensors:
                continue
            entry[column] = tensors[t].data_ptr()
            if same_shape or tensors is not lists[2]:
                rows, columns, ld = checks.matrix_layout("weights", tensors[t], written=False)
                layouts.append((tensors[t].data_ptr(), ld, tensors[t].element_size()))
                entry[LEADING + column] = ld
        base, row_stride = slices[2 * t : 2 * t + 2] or (0, max(columns, 1))
        if all(ld == columns for _, ld, _ in layouts) and row_stride == columns:
            rows, columns = 1, rows * columns
        per_row, count = _count_tiles(rows, columns, base, row_stride)
        aligned = base % GROUP.value == 0 and all(address % 16 == 0 for address, _, _ in layouts)
        if rows > 1:
            aligned &= row_stride % GROUP.value == 0 and all(ld * size % 16 == 0 for _, ld, size in layouts)
        entries.append(
            entry
            | {
                ROWS: rows,
                COLUMNS: columns,
                BASE: base,
                ROW_STRIDE: row_stride,
                TENSOR_ID: tensor_ids[t],
                TILES_PER_ROW: per_row,
                ALIGNED: int(aligned),
                SCALAR: t if per_tensor else 0,
            }
        )
        tiles.append(count)
    return build_table(entries, tiles, lists[0][0].device)
