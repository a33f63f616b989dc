"""Host side of every launch: the table of tensors, scalars and keys on the device, the guard, the active device.

A table is built once for a list of tensors and found again by their addresses, shapes and strides, which are read at
each call: a tensor that moved is another list. Scalars and keys that come from the host are copied once per value;
those on the device are passed as they are, so a captured CUDA graph replays with what they hold then.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .config import NVIDIA, Config
from .tiles import (
    ALIGNED,
    BASE,
    COLUMNS,
    EXTRA,
    FIELDS,
    FIRST_TILE,
    GROUP,
    IN,
    LEADING,
    OUT,
    ROW_STRIDE,
    ROWS,
    SCALAR,
    SECOND,
    TENSOR_ID,
    TILES,
    TILES_PER_ROW,
)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Cache:
    """Device tensors by what they were made from; the least recently used go first.

    What a graph capture has seen stays for good: the graph reads that very memory when it is replayed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        self.captured: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make) -> Any:
        found = self.captured.get(key)
        if found is not None:
            return found
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if key not in self.entries:
            if capturing:
                raise RuntimeError(
                    "pgap_kernels: this list of tensors, or a scalar or key on the host, is new to a graph capture; "
                    "make the same call once before capturing, with scalars and keys that change in device tensors"
                )
            self.entries[key] = make()
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        if capturing:
            self.captured[key] = self.entries[key]
        return self.entries[key]


class Table(NamedTuple):
    """Tensors of one launch (see tiles.py): (T, FIELDS) int64, and the tensor of each program."""

    entries: Tensor
    map: Tensor
    tiles: int
    keep: Any = None  # memory the entries point to that nobody else holds


_tables = Cache(2048)  # mode scratch has a list for every parameter, and for each kind of direction
_constants = Cache(1024)


def _spans(rows: int, columns: int, base: int, row_stride: int) -> tuple[int, int]:
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


def identity(*lists: Sequence[Tensor]) -> Hashable:
    """What has to be the same for a table of these tensors to hold."""
    return tuple(tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors) for tensors in lists)


def cached_table(key: Hashable, make) -> Table:
    """The table made earlier for the same key, which holds the ``identity`` of every tensor in it."""
    return _tables.get(key, make)


def assembled(entries: list[dict[Any, int]], tiles: list[int], device: torch.device, keep: Any = None) -> Table:
    """A table on the device from its entries, by column, and the programs of each."""
    rows, first = [], 0
    for entry, own in zip(entries, tiles, strict=True):
        row = [0] * FIELDS.value
        for field, value in entry.items():
            row[getattr(field, "value", field)] = value
        row[FIRST_TILE.value], row[TILES.value] = first, own
        rows.append(row)
        first += own
    owners = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), torch.tensor(tiles))
    return Table(torch.tensor(rows, dtype=torch.int64).to(device), owners.to(device), first, keep)


def dense_table(
    out: Sequence[Tensor],
    source: Sequence[Tensor],
    tensor_ids: Sequence[int],
    slices: Sequence[int],
    per_tensor: bool,
    extra: Sequence[Tensor] = (),
    second: Sequence[Tensor] = (),
    same_shape: bool = True,
) -> Table:
    """The table of a launch over tiles of 4096 logical elements.

    Args:
        out, source: tensors written and read, of the same shapes; ``source`` may be empty.
        tensor_ids, slices: as the ops pass them.
        per_tensor: whether tables of scalars have a column per tensor.
        extra, second: more tensors of the same shapes; with ``same_shape`` False ``extra`` is addressed by itself.
    """
    lists = [out, source, extra, second]
    key = ("dense", out[0].device, tuple(tensor_ids), tuple(slices), per_tensor, same_shape, identity(*lists))
    return cached_table(key, lambda: _make_dense_table(lists, tensor_ids, slices, per_tensor, same_shape))


def _make_dense_table(lists, tensor_ids, slices, per_tensor, same_shape) -> Table:
    entries, tiles = [], []
    for t in range(len(lists[0])):
        entry: dict[Any, int] = {}
        leading, places = {}, []
        for index, (field, tensors) in enumerate(zip((OUT, IN, EXTRA, SECOND), lists, strict=True)):
            if not tensors:
                continue
            entry[field] = tensors[t].data_ptr()
            if index < 2 or same_shape:
                rows, columns, leading[index] = checks.matrix_layout("weights", tensors[t], written=False)
                places.append((tensors[t].data_ptr(), leading[index] * tensors[t].element_size()))
        base, row_stride = slices[2 * t : 2 * t + 2] or (0, max(columns, 1))
        if all(ld == columns for ld in leading.values()) and row_stride == columns:
            rows, columns = 1, rows * columns
        per_row, own = _spans(rows, columns, base, row_stride)
        aligned = base % GROUP.value == 0 and all(address % 16 == 0 for address, _ in places)
        if rows > 1:
            aligned = aligned and row_stride % GROUP.value == 0 and all(ld % 16 == 0 for _, ld in places)
        entry |= {
            ROWS: rows,
            COLUMNS: columns,
            BASE: base,
            ROW_STRIDE: row_stride,
            TENSOR_ID: tensor_ids[t],
            TILES_PER_ROW: per_row,
            ALIGNED: int(aligned),
            SCALAR: t if per_tensor else 0,
            **{LEADING.value + index: ld for index, ld in leading.items()},
        }
        entries.append(entry)
        tiles.append(own)
    return assembled(entries, tiles, lists[0][0].device)


_scratch: dict[Hashable, Tensor] = {}


def scratch(name: str, device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """A buffer that is used again by later launches of the same stream, and grows when it has to."""
    stream = 0 if device.type == "cpu" else torch.get_device_module(device).current_stream(device).stream_id
    key = (name, device, dtype, stream)
    if key not in _scratch or _scratch[key].numel() < size:
        _scratch[key] = torch.empty(size, dtype=dtype, device=device)
    return _scratch[key]


def on(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device; what comes from the host is copied once per value."""
    if tensor.device == device:
        return tensor.contiguous()
    key = (device, tensor.dtype, tensor.shape, tuple(tensor.flatten().tolist()))
    return _constants.get(key, lambda: tensor.to(device))


def iota(device: torch.device) -> Tensor:
    """0 .. 1023, int32 (see tiles.counters)."""
    return _constants.get((device, "iota"), lambda: torch.arange(1024, dtype=torch.int32, device=device))


def widened(device: torch.device, *tables: Tensor) -> tuple[list[Tensor], bool]:
    """Tables of scalars on the device with the same number of columns, and whether that is one per tensor."""
    width = max(t.shape[1] for t in tables)
    return [on(device, t.expand(-1, width)) for t in tables], width > 1


# ---- the guard ----------------------------------------------------------------------------------------------------

_sticky: dict[torch.device, Tensor] = {}


@triton.jit(do_not_specialize=["count"])
def guard_kernel(skip_ptr, sticky_ptr, scalars_ptr, count, BLOCK: tl.constexpr):
    """skip <- 1 if one of the scalars is not finite, else what it was; sticky <- sticky | skip."""
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(scalars_ptr + i, mask=i < count, other=0.0)
        bad |= (tl.abs(x) <= 3.4028234663852886e38).to(tl.int32) ^ 1
    found = tl.max(bad, 0)
    if found != 0:
        tl.store(skip_ptr, 1)
        tl.store(sticky_ptr, 1)


def sticky(device: torch.device) -> Tensor:
    """The device's flag: not 0 once a launch was skipped."""
    if device not in _sticky:
        _sticky[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _sticky[device]


def guard(device: torch.device, *tables: Tensor) -> Tensor:
    """A flag for the kernel to read: not 0 if a scalar that was on the device is not finite.

    Host scalars were checked when they were passed.
    """
    flag = sticky(device)
    given = [t for t in tables if t.device == device]
    if not given:
        return on(device, torch.zeros(1, dtype=torch.int32))
    skip = torch.zeros(1, dtype=torch.int32, device=device)
    for scalars in given:
        x = scalars.contiguous()
        launch(
            guard_kernel, 1, device, Config(), skip_ptr=skip, sticky_ptr=flag, scalars_ptr=x, count=x.numel(), BLOCK=256
        )
    return skip


def take_skipped(device: torch.device | None = None) -> list[torch.device]:
    """Devices (all, one, or all of a type) on which a launch was skipped since the last call; waits for them."""
    found = [d for d, flag in _sticky.items() if device in (None, d, torch.device(d.type)) and flag.item()]
    for d in found:
        _sticky[d].zero_()
    return found


# ---- launching ----------------------------------------------------------------------------------------------------


def active(device: torch.device) -> contextlib.AbstractContextManager:
    """The tensors' device as the active one: a launch goes to that, wherever its pointers are."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def launch(kernel, programs: int, device: torch.device, config: Config, **arguments: Any) -> None:
    """Launch by keyword on the tensors' device."""
    if programs:
        with active(device):
            kernel[(programs,)](**arguments, **config.options(architecture(device)))


@functools.cache
def architecture(device: torch.device) -> str:
    """What configurations go by: "hopper" (warp-group products), "nvidia", "cdna" (64 lanes in a wave), or "other"."""
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        return "cdna" if torch.cuda.get_device_properties(device).warp_size == 64 else "other"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "nvidia"


def is_nvidia(device: torch.device) -> bool:
    """Whether the device is NVIDIA's: only there is the fast tier; elsewhere it is served exactly."""
    return architecture(device) in NVIDIA


def next_power_of_two(value: int) -> int:
    return 1 << math.ceil(math.log2(value)) if value > 1 else 1
