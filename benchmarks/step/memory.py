"""Peak memory of a piece of code, counted in two ways.

tensors   bytes of the storages that are alive, exact and repeatable. What an op allocates inside (C++ scratch, LAPACK
          workspaces, compiled code) is not seen.
process   resident memory as Linux has it (VmHWM): sees all of that, and what the allocator keeps for itself. What was
          freed before and is used again is not seen, so it begins with giving that back to the system.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorBytes(TorchDispatchMode):
    """Counts the storages that torch functions make while it is entered, as long as they live, on top of ``known``.

    Attributes:
        alive: bytes now, those of ``known`` included.
        peak: the most since it was made, or since it was last set to ``alive``.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            # A view of, or a write into, memory that was there before is no new memory.
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        weakref.finalize(storage, self._forget, place, size).atexit = False
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _forget(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.alive -= size


def resident() -> int | None:
    """Bytes of the process that are in memory, once what was freed is given back; None without Linux's /proc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Let ``peak_resident`` begin anew."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_resident() -> int | None:
    """The most that ``resident`` has been since ``reset_peak``; None without Linux's /proc."""
    return _status("VmHWM")


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(found[name].split()[0]) * 1024
