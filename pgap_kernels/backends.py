"""Which backend serves an op: the first of the list that does not refuse, or the one that is forced."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from . import checks, cpu, notices, reference, triton

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
_used: ContextVar[str | None] = ContextVar("pgap_kernels.use_backend", default=None)


def names() -> list[str]:
    """Names that ``use_backend`` and PGAP_BACKEND accept."""
    return [backend.name for backend in BACKENDS]


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Force a backend for the ops called in a ``with`` block; it overrides PGAP_BACKEND, and blocks nest.

    The choice belongs to the current context (``contextvars``): other threads keep theirs, unless they run in a copy.

    Args:
        name: "cpu", "triton" or "reference".

    Raises:
        ValueError: unknown name. An op that the backend does not serve raises it when it is called, with the reason.
    """
    return _using(checks.choice("use_backend", name, names()))


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    token = _used.set(name)
    try:
        yield
    finally:
        _used.reset(token)


def forced() -> tuple[str, str] | None:
    """(what forces a backend, its name), if something does."""
    for source, name in (("use_backend", _used.get()), ("PGAP_BACKEND", os.environ.get("PGAP_BACKEND"))):
        if name:
            return source, name
    return None


def select(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module for ``op`` on tensors of ``dtype`` on ``device``.

    Raises:
        TypeError: no backend knows the dtype. The public functions have refused it before; a hook calls the op itself.
        ValueError: PGAP_BACKEND is an unknown name, or the forced backend does not serve the op there (it says why).
    """
    if dtype not in checks.WEIGHT_DTYPES:
        raise TypeError(f"{op}: got {dtype}; accepted: {', '.join(map(str, checks.WEIGHT_DTYPES))}")
    choice = forced()
    if choice is not None:
        source, name = choice
        backend = BACKENDS[names().index(checks.choice(source, name, names()))]
        reason = backend.refusal(op, device, dtype)
        if reason:
            raise ValueError(f"{source}: {name!r} does not serve {op} on {device} {dtype}: {reason}")
        return backend
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.refusal(op, device, dtype)
        if reason is None:
            if backend is reference:
                _warn_slow("; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"{op}: no backend serves {device} {dtype}: {'; '.join(reasons)}")


@functools.cache
def _warn_slow(reasons: str) -> None:
    notices.warn(
        f"pgap_kernels runs on its plain-PyTorch reference, which is exact but slow ({reasons}); "
        "`pgap-kernels doctor` says more"
    )
