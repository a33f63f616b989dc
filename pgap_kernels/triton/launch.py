"""How kernels are launched: on the tensors' device, with the target's options, and quickly the second time.

Scalars and keys that come from the host are copied once per value (cache.py); those on the device are passed as they
are, so a captured CUDA graph replays with what they hold then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .config import NVIDIA, Config
from .noise import Noise
from .rounding import INTERPRETED

_HERE = contextlib.nullcontext()
# Compiled kernels, and their arguments that are constants (by position), by all that Triton specialises a kernel for.
# Triton finds that out anew at each launch, which takes it a tenth of a millisecond.
_compiled: dict[Hashable, tuple[Any, dict[int, Any]]] = {}


def active(device: torch.device) -> contextlib.AbstractContextManager:
    """The tensors' device as the active one: a launch goes to that, wherever its pointers are."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.current_device() == device.index):
        return _HERE
    return torch.get_device_module(device).device(device)


@functools.cache
def _wrapped(group_type: type, group: tuple) -> tuple:
    return group_type(*map(tl.constexpr, group))


def blocks(size: int, block: int) -> int:
    """How many blocks hold so many elements; Triton's own function takes longer than all around it."""
    return -(-size // block)


def wrap_constants(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with every field of a group of constants (named in capitals) as a tl.constexpr.

    Triton 3.6 treats the fields of a plain group as run-time values; the interpreter takes no tl.constexpr.
    """
    groups = {k: v for k, v in arguments.items() if k.isupper() and isinstance(v, tuple) and not INTERPRETED.value}
    return arguments | {name: _wrapped(type(group), group) for name, group in groups.items()}


def launch(kernel, programs: int, device: torch.device, config: Config, **arguments: Any) -> None:
    """Launch by keyword on the tensors' device."""
    if not programs:
        return
    with active(device):
        values = [arguments[name] for name in kernel.arg_names]
        kinds = [x if constant else _specialised(x) for x, constant in zip(values, _constants(kernel), strict=True)]
        key = (kernel, device, config, tuple(kinds))
        if key not in _compiled:
            wrapped = wrap_constants(arguments)
            compiled = kernel[(programs,)](**wrapped, **config.options(architecture(device)))
            if not INTERPRETED.value:
                named = zip(range(len(values)), kernel.arg_names, _constants(kernel), strict=True)
                _compiled[key] = compiled, {i: wrapped[name] for i, name, constant in named if constant}
            return
        compiled, constants = _compiled[key]
        for i, constant in constants.items():
            values[i] = constant
        compiled[(programs, 1, 1)](*values)


@functools.cache
def _constants(kernel) -> tuple[bool, ...]:
    """Which arguments of a kernel are constants: those named in capitals."""
    return tuple(name.isupper() for name in kernel.arg_names)


def _specialised(value: Any) -> Hashable:
    """What of an argument's value Triton may compile in."""
    if isinstance(value, Tensor):
        # On ROCm offsets within less than 2 GiB of memory are compiled to 32 bits.
        near = torch.version.hip is None or value.untyped_storage().size() < 2**31
        return value.dtype, value.data_ptr() % 16 == 0, near
    if isinstance(value, tuple):
        return tuple(map(_specialised, value))
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    return value


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of configurations: "hopper" (warp-group products), "nvidia", "cdna" (waves of 64 lanes) or "other"."""
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        return "cdna" if torch.cuda.get_device_properties(device).warp_size == 64 else "other"
    return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "nvidia"


def is_nvidia(device: torch.device) -> bool:
    """Whether the device is NVIDIA's: only there is the fast tier; elsewhere it is served exactly."""
    return architecture(device) in NVIDIA


def noise_on(device: torch.device, distribution: str, tier: str) -> Noise:
    """The distribution, and whether the tier is fast where there is one."""
    return Noise(distribution, tier == "fast" and is_nvidia(device))
