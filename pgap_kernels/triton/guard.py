"""The guard: a look at scalars that were on the device, before the launch that would use them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .cache import to_device_cached
from .config import Config
from .launch import launch

_sticky: dict[torch.device, Tensor] = {}


@triton.jit
def find_nonfinite(scalars_ptr, count, BLOCK: tl.constexpr):
    """1 where one of every BLOCK scalars is not finite, (BLOCK,)."""
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(scalars_ptr + i, mask=i < count, other=0.0)
        bad |= (tl.abs(x) <= 3.4028234663852886e38).to(tl.int32) ^ 1
    return bad


_TABLES = ("table0", "table1", "table2", "table3")
_COUNTS = ("count0", "count1", "count2", "count3")


# Separate arguments, because Triton specialises every element of a tuple: one kernel serves tables of any size.
@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def guard_kernel(
    skip_ptr, sticky_ptr, table0, table1, table2, table3, count0, count1, count2, count3, BLOCK: tl.constexpr
):
    """skip <- 1 if a scalar of a table is not finite, else 0; sticky <- sticky | skip."""
    bad = find_nonfinite(table0, count0, BLOCK) | find_nonfinite(table1, count1, BLOCK)
    bad |= find_nonfinite(table2, count2, BLOCK) | find_nonfinite(table3, count3, BLOCK)
    skip = tl.max(bad, 0)
    tl.store(skip_ptr, skip)
    if skip != 0:
        tl.store(sticky_ptr, 1)


def sticky_flag(device: torch.device) -> Tensor:
    """The device's flag: not 0 once a launch was skipped. Copied from the host, as ``cache.counter_table`` is."""
    if device not in _sticky:
        with torch.inference_mode(False):  # it is written later, wherever that is
            _sticky[device] = torch.zeros(1, dtype=torch.int32, device="cpu").to(device)
    return _sticky[device]


def guard(device: torch.device, *tables: Tensor) -> Tensor:
    """A flag for the kernel to read: not 0 if a scalar that was on the device is not finite.

    Host scalars were checked when they were passed.
    """
    sticky = sticky_flag(device)
    scalars = [t.contiguous() for t in tables if t.device == device and t.is_floating_point()]
    if not scalars or checks.unguarded.get():
        return to_device_cached(device, torch.zeros(1, dtype=torch.int32, device="cpu"))
    skip = torch.empty(1, dtype=torch.int32, device=device)
    counts = [t.numel() for t in scalars] + [0] * (len(_TABLES) - len(scalars))
    scalars += scalars[:1] * (len(_TABLES) - len(scalars))
    given = {**dict(zip(_TABLES, scalars, strict=True)), **dict(zip(_COUNTS, counts, strict=True))}
    launch(guard_kernel, 1, device, Config(), skip_ptr=skip, sticky_ptr=sticky, **given, BLOCK=256)
    return skip


def take_skipped(device: torch.device | None = None) -> list[torch.device]:
    """Devices (all, one, or all of a type) on which a launch was skipped since the last call. Waits for them."""
    found = [d for d, flag in _sticky.items() if device in (None, d, torch.device(d.type)) and flag.item()]
    for d in found:
        _sticky[d].zero_()
    return found
