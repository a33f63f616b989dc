"""What the GPU tests share: which device, when they run, and calls that are built on the CPU and made there.

``pytest -m gpu`` runs them on any machine with a CUDA or ROCm device and Triton; the first run compiles some hundred
kernels, which takes minutes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgap_kernels import backends

from .cases import Case, flat, storage
from .helpers import ops

DEVICE = torch.device("cuda", 0)


def missing() -> str | None:
    """What keeps the GPU tests from running here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA or ROCm device: torch.cuda.is_available() is False"
    reason = backends.triton.refusal("dense_perturb_", DEVICE, torch.float32)
    return reason and f"needs the Triton backend: {reason}"


marks = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def moved(value, device: torch.device | None = None, seen: dict | None = None):
    """Nested lists, tuples and dictionaries with every tensor at its place in a copy of its storage on the device."""
    device, seen = device or DEVICE, {} if seen is None else seen
    if isinstance(value, Tensor):
        key = value.untyped_storage().data_ptr(), value.dtype
        if key not in seen:
            seen[key] = storage(value).to(device, copy=True)
        return seen[key].as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, dict):
        return {name: moved(x, device, seen) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(x, device, seen) for x in value)
    return value


def run_there(case: Case) -> list[Tensor]:
    """``cases.run`` on the device, by the Triton backend; what it left behind, on the CPU."""
    arguments = moved(case.build())
    if case.op == "draw":  # has no tensor that names the device
        arguments["device"] = DEVICE
    returned = getattr(ops, case.op)(**arguments, backend="triton")
    left = [storage(t) for name in case.written for t in flat(arguments[name])] if case.written else flat(returned)
    return [t.cpu() for t in left]
