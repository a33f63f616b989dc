"""What an op would launch on a GPU, found out and compiled without one.

    [launch] = recorded(lambda: dense_perturb_([w], [(1, 0.1)], tensor_ids=[0]), "hopper")
    compiled = compile_for(launch, GPUTarget("cuda", 90, 32))

The op runs on CPU tensors up to the Triton backend, which gets tensors on the meta device in their place, so it takes
every decision as for a GPU. Its launches are written down; Triton then specialises and compiles them as at a launch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import pgap_kernels.triton
from pgap_kernels import backends
from pgap_kernels.triton.launch import wrap_constants

MODULES = [
    importlib.import_module(f"pgap_kernels.triton.{x.name}") for x in pkgutil.iter_modules(pgap_kernels.triton.__path__)
]


@dataclass(frozen=True)
class Launch:
    """A kernel, the programs of its grid, its arguments by name, compiler options."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict
    options: dict


class _OnMeta:
    """The Triton backend with every list of tensors moved to the meta device."""

    def __getattr__(self, op: str) -> Callable:
        host = getattr(pgap_kernels.triton, op)
        return lambda *args: host(*(_on_meta(x) for x in args))


def _on_meta(value):
    """Lists of tensors, and those in a record of arguments, on the meta device."""
    if isinstance(value, tuple):
        return type(value)(*map(_on_meta, value))
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [t.to("meta") for t in value]
    return value


def recorded(call: Callable[[], object], architecture: str) -> list[Launch]:
    """The launches of ops called on CPU tensors, as they would be on a GPU of that architecture (launch.py)."""
    found: list[Launch] = []

    def launch(kernel, programs, device, config, **arguments):
        found.append(Launch(kernel, programs, arguments, config.options(architecture)))

    stand_ins = {"launch": launch, "architecture": lambda device: architecture}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "select", lambda *_: _OnMeta()))
        for module in MODULES:
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        call()
    return found


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps a cache of kernels per device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _targeting(target: GPUTarget) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = before


def compile_for(launch: Launch, target: GPUTarget):
    """Triton's compiled kernel."""
    with _targeting(target):
        return launch.kernel.warmup(grid=(launch.programs,), **wrap_constants(launch.arguments), **launch.options)
