"""Device tensors that are made once and used by many launches: tables, and constants that came from the host."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_MOST_BYTES = 1 << 26


class Hashed:
    """A key that is hashed once: that of a list of hundreds of tensors takes longer than a launch."""

    __slots__ = ("hash", "value")

    def __init__(self, value: Hashable) -> None:
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and self.hash == other.hash and self.value == other.value


class Cache:
    """LRU cache of device tensors, keyed by their source values.

    Entries that a graph capture has used are kept for good: the graph reads that very memory when it is replayed.

    Args:
        size: entries at most.
        most_bytes: of memory at most, if there are several entries: a method that moves other layers in each step asks
            for a new table each time, of a megabyte for a large model.
    """

    def __init__(self, size: int, most_bytes: int = _MOST_BYTES) -> None:
        self.size, self.most_bytes = size, most_bytes
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        self.captured: dict[Hashable, Any] = {}
        self.bytes = 0  # of the entries
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            return self._get(key, make)

    def _get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self.captured.get(key)
        if found is not None:
            return found
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if key not in self.entries:
            if capturing:
                raise RuntimeError(
                    "pgap_kernels: this list of tensors, or a scalar or key on the host, is new to a graph capture; "
                    "make the same call once before capturing, with scalars and keys that change in device tensors"
                )
            self.entries[key] = make()
            self.bytes += _bytes_of(self.entries[key])
            while len(self.entries) > self.size or (self.bytes > self.most_bytes and len(self.entries) > 1):
                self.bytes -= _bytes_of(self.entries.popitem(last=False)[1])
        self.entries.move_to_end(key)
        if capturing:
            self.captured[key] = self.entries[key]
        return self.entries[key]


def _bytes_of(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


_constants = Cache(1024)


def to_device_cached(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device. Values from the host are copied once, then found by their bits: -0.0 is not 0.0."""
    if tensor.device == device:
        return tensor.contiguous()
    bits = tensor.contiguous().view(-1).view(torch.int32).tolist()
    key = (device, tensor.dtype, tensor.shape, tuple(bits))
    return _constants.get(key, lambda: tensor.to(device))


def keys_on(device: torch.device, keys: Tensor | None) -> Tensor | None:
    """Keys on the device, if there are any: rounding to nearest has none."""
    return None if keys is None else to_device_cached(device, keys)


def broadcast_scalars(device: torch.device, *tables: Tensor) -> tuple[list[Tensor], bool]:
    """Tables of scalars on the device, of one width, and whether they have a column per tensor."""
    width = max(t.shape[1] for t in tables)
    return [to_device_cached(device, t.expand(-1, width)) for t in tables], width > 1


def counter_table(device: torch.device) -> Tensor:
    """0 .. 1023, int32 (see ``tiles.counters``).

    Copied from the host, which waits for the copy: a kernel on another stream must not read it half written.
    """
    return _constants.get((device, "counters"), lambda: torch.arange(1024, dtype=torch.int32, device="cpu").to(device))
