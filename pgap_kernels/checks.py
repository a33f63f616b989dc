"""Argument checks of the ops. Every check runs before anything is written and names the argument it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import extension
from .noise import check_uint

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX_LIMIT = (1 << 63) - 1
_LARGEST = torch.finfo(torch.float32).max
# Set while a pass writes no weights: a scalar on the device that is not finite then spoils a loss, which is seen, and
# no launch has to look at it first.
unguarded: ContextVar[bool] = ContextVar("unguarded", default=False)
_TENSORS = frozenset((Tensor, torch.nn.Parameter))  # other subclasses may override dtype or strides


def choice(name: str, value: str, accepted: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}; accepted: {', '.join(map(repr, accepted))}")
    return value


def tensors(name: str, value: Sequence[Tensor], dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES) -> list[Tensor]:
    """A non-empty list of tensors of one accepted dtype on one device."""
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted: a list of tensors")
    if not value:
        raise ValueError(f"{name}: got an empty list; accepted: at least one tensor")
    if not isinstance(value[0], Tensor):
        raise TypeError(f"{name}[0]: got {type(value[0]).__name__}; accepted: a tensor")
    dtype, device = value[0].dtype, value[0].device
    for i, t in enumerate(value):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}]: got {type(t).__name__}; accepted: a tensor")
        if t.layout != torch.strided:
            raise TypeError(f"{name}[{i}]: got layout {t.layout}; accepted: torch.strided")
        if t.dtype not in dtypes:
            raise TypeError(f"{name}[{i}]: got dtype {t.dtype}; accepted: {', '.join(map(str, dtypes))}")
        if t.dtype != dtype or t.device != device:
            raise ValueError(
                f"{name}[{i}]: got {t.dtype} on {t.device}; accepted: {dtype} on {device}, as {name}[0] (call once "
                "per dtype and device)"
            )
    return list(value)


def matrix_layout(name: str, tensor: Tensor, written: bool = True) -> tuple[int, int, int]:
    """(rows, columns, row stride in memory) of a row-contiguous tensor; vectors and scalars are one row.

    Rows (``tensor[i]``) must each be contiguous and must not overlap; anything else raises. A tensor that is only read
    may also be one row expanded over all (stride 0).
    """
    if tensor.dim() < 2:
        rows, columns = 1, tensor.numel()
        regular = columns <= 1 or tensor.is_contiguous()
        ld = columns
    else:
        rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
        ld = tensor.stride(0) if rows > 1 and columns else columns
        apart = ld >= columns or (ld == 0 and not written)
        regular = tensor.is_contiguous() or (apart and tensor[0].is_contiguous())
    if not regular:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)} with strides {tensor.stride()}; accepted: contiguous rows that "
            "do not overlap (a contiguous tensor or a slice of one along its first or last dimension)"
        )
    return rows, columns, ld


def matrices(
    name: str, value: Sequence[Tensor], dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES, written: bool = True
) -> list[Tensor]:
    """A list as ``tensors`` takes it, of what ``matrix_layout`` takes; if ``written``, none share an element."""
    if _is_disjoint_rows(value, True) and value[0].dtype in dtypes:
        return list(value)
    values = tensors(name, value, dtypes)
    layouts = [matrix_layout(f"{name}[{i}]", tensor, written) for i, tensor in enumerate(values)]
    if written:
        _refuse_overlaps([f"{name}[{i}]" for i in range(len(values))], values, layouts)
    return values


def _is_disjoint_rows(value: Any, alike: bool) -> bool:
    """Fast path: True if the extension finds that a list is in rows and disjoint, and if ``alike`` of one dtype.

    False is inconclusive: the caller checks tensor by tensor and says what is wrong, if anything is.
    """
    if extension.unavailable or not isinstance(value, (list, tuple)) or not _TENSORS.issuperset(map(type, value)):
        return False
    return torch.ops.pgap_kernels_cpu.is_disjoint_rows.default(value, alike)


def disjoint(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse matrices, in lists by argument, of which two share an element (duplicates, overlapping views)."""
    values = list(chain(*lists.values()))
    if not _is_disjoint_rows(values, False):
        names = [f"{name}[{i}]" for name, own in lists.items() for i in range(len(own))]
        _refuse_overlaps(names, values, [matrix_layout(name, t) for name, t in zip(names, values, strict=True)])


def apart(name: str, written: Sequence[Tensor], read: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse matrices that are only read, in lists by argument, and share an element with what is written.

    Among themselves they may share: a factor may serve several weights.
    """
    if not _have_addresses(written):
        return
    different = {id(t): t for own in read.values() for t in own}
    if not different or _is_disjoint_rows([*written, *different.values()], False):
        return
    taken = [extent for extent in map(_extent, written) if extent]
    for label, own in read.items():
        for i, tensor in enumerate(own):
            extent = _extent(tensor)
            if extent and any(_meet(extent, other) for other in taken):
                raise ValueError(
                    f"{label}[{i}]: shares memory with {name}; accepted: tensors apart from what is written"
                )


def _have_addresses(values: Sequence[Tensor]) -> bool:
    return not torch.compiler.is_compiling() and values[0].device.type != "meta"


def _extent(tensor: Tensor) -> tuple[int, int, int, int] | None:
    """(begin, rows, columns, row stride) of a matrix, in bytes; None if it has no elements."""
    rows, columns, ld = matrix_layout("tensor", tensor, written=False)
    size = tensor.element_size()
    if not rows * columns:
        return None
    return tensor.data_ptr(), rows if ld else 1, columns * size, (ld or columns) * size  # 0: one row, expanded


def _meet(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two extents share an element."""
    ends = [begin + (rows - 1) * ld + columns for begin, rows, columns, ld in (a, b)]
    return a[0] < ends[1] and b[0] < ends[0] and _rows_meet(a, b)


def _refuse_overlaps(names: Sequence[str], values: Sequence[Tensor], elements: Sequence[tuple[int, int, int]]) -> None:
    if not _have_addresses(values):
        return
    # In bytes, so that lists of several dtypes can be checked together.
    layouts, spans = [], []
    for i, (tensor, (rows, columns, ld)) in enumerate(zip(values, elements, strict=True)):
        size, begin = tensor.element_size(), tensor.data_ptr()
        layouts.append((rows, columns * size, ld * size))
        if rows and columns:
            spans.append((begin, begin + ((rows - 1) * ld + columns) * size, i))
    spans.sort()
    reach = -1
    for begin, end, i in spans:
        other = _sharing(spans, begin, layouts, i) if begin < reach else None
        if other is not None:
            raise ValueError(
                f"{names[i]} overlaps {names[other]}; accepted: tensors that share no element (tied weights once, "
                "duplicates removed)"
            )
        reach = max(reach, end)


def _sharing(spans: list, begin: int, layouts: Sequence[tuple[int, int, int]], i: int) -> int | None:
    """The tensor, if any, that shares an element with tensor i, whose extent meets others'."""
    rows, columns, own_ld = layouts[i]
    end = begin + (rows - 1) * own_ld + columns
    for other_begin, other_end, j in spans:
        if j == i or other_end <= begin or other_begin >= end:
            continue
        other_rows, other_columns, other_ld = layouts[j]
        ld = other_ld if rows == 1 else own_ld  # a single row fits any row stride
        distance = (begin - other_begin) % ld
        # Column slices of one matrix are compared in one step, however many rows they have; anything else row by row.
        interleaved = (other_rows == 1 or other_ld == ld) and other_columns <= distance <= ld - columns
        if not interleaved and _rows_meet((begin, *layouts[i]), (other_begin, *layouts[j])):
            return j
    return None


def _rows_meet(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two matrices, each (begin, rows, columns, row stride) in bytes, share an element."""
    (begin, rows, columns, ld), (other_begin, other_rows, other_columns, other_ld) = sorted((a, b), key=lambda m: m[1])
    for row in range(begin, begin + rows * ld, ld):
        k = max((row - other_begin - other_columns) // other_ld + 1, 0)  # the first row that ends after this one begins
        if k < other_rows and other_begin + k * other_ld < row + columns:
            return True
    return False


def tensor_ids(name: str, value: Sequence[int], count: int, *, may_repeat: bool = True) -> list[int]:
    """One 32-bit id per tensor; shards of one weight share theirs."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {value!r}; accepted: a list of 32-bit integers, one per tensor")
    if len(value) != count:
        raise ValueError(f"{name}: got {len(value)} ids for {count} tensors; accepted: one per tensor")
    if not may_repeat and len({*value}) < count:
        again = next(v for i, v in enumerate(value) if v in value[:i])
        raise ValueError(
            f"{name}: got {again} twice, which would give two tensors the same noise; accepted: an id of its own for "
            "each (noise.tensor_id of its name), or slices= for shards of one weight"
        )
    if all(type(v) is int and 0 <= v < 1 << 32 for v in value):
        return list(value)
    return [check_uint(f"{name}[{i}]", v, 32) for i, v in enumerate(value)]


def device(name: str, value: torch.device | str) -> torch.device:
    """A device that this PyTorch has."""
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        accepted = "a torch.device, or its name, such as 'cpu' or 'cuda:0'"
        raise ValueError(f"{name}: got {value!r}; accepted: {accepted}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}: got {value!r}; accepted: 'cpu', as PyTorch finds no GPU here")
    return found


def key_bits(name: str, key: int | Tensor) -> int | Tensor:
    """A key as the int64 bit pattern in which keys travel in tensors."""
    if isinstance(key, Tensor):
        if key.dtype != torch.int64 or key.numel() != 1:
            raise TypeError(
                f"{name}: got a {key.dtype} tensor of shape {tuple(key.shape)}; accepted: an integer in [0, 2**64) or "
                "one int64 bit pattern"
            )
        return key.reshape(())
    value = check_uint(name, key, 64)
    return value - (1 << 64) if value >> 63 else value


def key_tensor(name: str, keys: Sequence[int | Tensor]) -> Tensor:
    """Keys as an int64 tensor; see ``pack_keys``."""
    return pack_keys([key_bits(f"{name}[{i}]", key) for i, key in enumerate(keys)])


def pack_keys(bits: Sequence[int | Tensor]) -> Tensor:
    """Checked key bits as one int64 tensor, on the device of the first that is a tensor."""
    return _packed(bits, torch.int64)


def _packed(values: Sequence[float | Tensor], dtype: torch.dtype) -> Tensor:
    """Host values and tensors of one element as one tensor, on the device of the first that is a tensor."""
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    if device is None:
        return torch.tensor(values, dtype=dtype, device="cpu")
    return torch.stack(
        [v.reshape(()).to(device) if isinstance(v, Tensor) else _filled(v, dtype, device) for v in values]
    )


def _filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host value beside device ones, by a fill: a copy would wait, and end a graph capture."""
    return torch.full((), value, dtype=dtype, device=device)


def number(name: str, value: Any) -> float:
    """A real number that is finite in float32, as a Python float; reading a 0-dim tensor waits for its device."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(
            f"{name}: got {value!r} ({type(value).__name__}); accepted: a finite float, one or one per tensor"
        )
    try:
        result = float(value)
    except OverflowError:  # an integer
        result = math.inf
    if not abs(result) <= _LARGEST:
        raise ValueError(f"{name}: got {value}; accepted: a float that is finite in float32")
    return result


def scalar_row(name: str, value: Any, count: int) -> Tensor:
    """A float, one float per tensor, or a tensor of either, as float32 of length 1 or ``count``.

    Values on the host must be finite in float32. Values on a device are not read, as that would wait for it.
    """
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point or value.numel() not in (1, count):
            raise TypeError(
                f"{name}: got a {value.dtype} tensor of shape {tuple(value.shape)}; accepted: floating point, one "
                f"value or {count} (one per tensor)"
            )
        row = value.detach().reshape(-1).float()
        if row.device.type == "cpu" and not torch.compiler.is_compiling() and not row.isfinite().all():
            raise ValueError(f"{name}: got {value.tolist()}; accepted: finite values")
        return row
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise ValueError(f"{name}: got {len(values)} values; accepted: one, or {count} (one per tensor)")
    checked = [scalar_row(name, v, 1) if isinstance(v, Tensor) else number(name, v) for v in values]
    return _packed(checked, torch.float32)


def scalar_table(name: str, rows: Sequence[Tensor]) -> Tensor:
    """Rows of length 1 or T as one table with as many columns as the longest."""
    if len(rows) == 1:
        return rows[0][None]
    width = max(len(row) for row in rows)
    device = next((row.device for row in rows if row.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([_row_on(device, row).expand(width) for row in rows])


def _row_on(device: torch.device, row: Tensor) -> Tensor:
    if row.device == device or len(row) > 1:
        return row.to(device)
    return _filled(row.item(), row.dtype, device)


def slices(name: str, value: Sequence[tuple[int, int]] | None, values: Sequence[Tensor]) -> list[int]:
    """(base, row_stride) per tensor, flattened; empty where all are whole, unsharded tensors."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {value!r}; accepted: a list with (base, row_stride) of each tensor")
    if len(value) != len(values):
        raise ValueError(f"{name}: got {len(value)} for {len(values)} tensors; accepted: one (base, row_stride) each")
    flat = []
    for i, (one, tensor) in enumerate(zip(value, values, strict=True)):
        rows, columns, _ = matrix_layout(name, tensor, written=False)
        flat += span(f"{name}[{i}]", one, rows, columns)
    return flat


def span(name: str, value: tuple[int, int] | None, rows: int, columns: int) -> list[int]:
    """[base, row_stride] of a shard of so many rows and columns; empty for a whole tensor."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {value!r}; accepted: (base, row_stride)")
    if len(value) != 2:
        raise ValueError(f"{name}: got {value!r}; accepted: (base, row_stride)")
    base, row_stride = check_uint(f"{name} base", value[0], 63), check_uint(f"{name} row_stride", value[1], 63)
    row_stride = max(row_stride, 1)
    if not rows * columns:
        row_stride = max(row_stride, columns)  # no element is anywhere, and kernels ask for whole rows
    elif base % row_stride + columns > row_stride:
        raise ValueError(
            f"{name}: got base {base} and row_stride {row_stride} for rows of {columns}; accepted: shards that end "
            f"within an unsharded row (column {base % row_stride} + {columns} > {row_stride})"
        )
    if base + max(rows - 1, 0) * row_stride + columns > _INDEX_LIMIT:
        raise ValueError(
            f"{name}: got base {base}, row_stride {row_stride} for shape {rows} x {columns}; accepted: "
            "base + (rows - 1) * row_stride + columns below 2**63"
        )
    return [base, row_stride]


def companions(
    name: str, value: Sequence[Tensor], weights: list[Tensor], dtypes: Sequence[torch.dtype], written: bool = True
) -> list[Tensor]:
    """Tensors that go with the weights element by element: one per weight, of its shape and device.

    Those that are ``written`` may not share an element with each other or with the weights; others see ``apart``.
    """
    given = matrices(name, value, dtypes, written=False)
    if len(given) != len(weights) or given[0].device != weights[0].device:
        raise ValueError(
            f"{name}: got {len(given)} tensors on {given[0].device}; accepted: {len(weights)} on {weights[0].device}"
        )
    for i, (t, w) in enumerate(zip(given, weights, strict=True)):
        if t.shape != w.shape:
            raise ValueError(
                f"{name}[{i}]: got shape {tuple(t.shape)}; accepted: {tuple(w.shape)}, that of weights[{i}]"
            )
    if written:
        disjoint({name: given, "weights": weights})
    return given
