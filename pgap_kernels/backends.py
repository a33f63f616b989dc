"""Which backend serves an op: the first of the list that does not refuse, or the one that was asked for."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch

from . import cpu, reference, triton

BACKENDS: tuple[ModuleType, ...] = (cpu, triton, reference)
OPS = (
    "dense_perturb_",
    "masked_perturb_",
    "lowrank_perturb_",
    "lowrank_forward_",
    "preconditioned_update_",
    "preconditioned_perturb_",
    "anchor_affine_",
    "reduce",
    "assemble_gradient_",
    "aligned_core",
)


def names() -> list[str]:
    """Names that ``backend=`` and PGAP_BACKEND accept."""
    return [backend.name for backend in BACKENDS]


def select(op: str, device: torch.device, dtype: torch.dtype, requested: str | None = None) -> ModuleType:
    """The backend module for ``op`` on tensors of ``dtype`` on ``device``.

    Args:
        requested: a backend's name; None takes PGAP_BACKEND, and if that is unset the first that serves.

    Raises:
        ValueError: unknown name, or the requested backend does not serve the op there (with its reason).
    """
    requested = requested or os.environ.get("PGAP_BACKEND")
    if requested:
        backend = next((b for b in BACKENDS if b.name == requested), None)
        if backend is None:
            raise ValueError(f"backend: got {requested!r}; accepted: {', '.join(names())}")
        reason = backend.refusal(op, device, dtype)
        if reason:
            raise ValueError(f"backend: {requested!r} does not serve {op} on {device} {dtype}: {reason}")
        return backend
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.refusal(op, device, dtype)
        if reason is None:
            if backend is reference:
                _say_slow("; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"{op}: no backend serves {device} {dtype}: {'; '.join(reasons)}")


@functools.cache
def _say_slow(reasons: str) -> None:
    warnings.warn(
        f"pgap_kernels runs on its plain-PyTorch reference, which is exact but slow ({reasons}); "
        "`pgap-kernels doctor` says more",
        stacklevel=2,
    )
