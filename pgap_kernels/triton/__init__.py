"""The Triton backend: one file per kernel family, named as in ``ops``. Triton is imported when an op first needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

from ..checks import WEIGHT_DTYPES

name = "triton"

OLDEST = (3, 6)
_GPUS = ("cuda", "xpu")
_FAMILIES = {
    "dense_perturb_": "dense",
    "masked_perturb_": "dense",
    "assemble_gradient_": "dense",
    "lowrank_perturb_": "lowrank",
    "lowrank_forward_": "forward",
    "aligned_core": "lowrank",
    "preconditioned_": "preconditioned",
    "anchor_affine_": "anchor",
    "reduce": "reduction",
}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (slow; for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install 'pgap-kernels[triton]'`"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # with ROCm and XPU it is distributed under other names
        version = importlib.import_module("triton").__version__
    if tuple(int(x) for x in version.split(".")[:2]) < OLDEST:
        return f"needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, found {version}"
    return None


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend does not serve the op there, or None."""
    if device.type == "cpu":
        if not interpreted():
            return "serves CUDA, ROCm and XPU tensors; CPU tensors only under Triton's interpreter, TRITON_INTERPRET=1"
    elif device.type not in _GPUS:
        return f"serves CUDA, ROCm and XPU tensors, not {device.type}"
    elif interpreted():
        return "TRITON_INTERPRET=1 is set: the interpreter serves CPU tensors"
    if dtype not in WEIGHT_DTYPES:
        return f"serves {', '.join(map(str, WEIGHT_DTYPES))}, not {dtype}"
    return _missing()


def __getattr__(op: str) -> Any:
    """The host function of an op, from its family's file: found once, and from then on an attribute as any other."""
    if op not in _FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {op!r}")
    function = globals()[op] = getattr(importlib.import_module(f"{__name__}.{_FAMILIES[op]}"), op)
    return function
