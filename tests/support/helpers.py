"""What several test files share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pgap_kernels
from pgap_kernels import use_backend

from . import interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Who serves CPU tensors: under Triton's interpreter its kernels are compared with the reference.
BACKENDS = ("reference", "triton" if interpreter.ON else "cpu")


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns, with one pattern for every NaN."""
    patterns = tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return torch.where(tensor.isnan(), -1, patterns)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal dtype, shape and bits: -0 is not +0, and NaN is NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    different = (bits(got) != bits(want)).flatten().nonzero().flatten()
    if len(different):
        i = int(different[0])
        raise AssertionError(
            f"{len(different)} of {got.numel()} elements differ, first [{i}]: "
            f"{got.flatten()[i].item()!r} != {want.flatten()[i].item()!r}"
        )


def assert_all_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Lists of tensors with the same bits."""
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def weights(shapes, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Random tensors of those shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def integers(shapes, bound: int, seed: int) -> list[Tensor]:
    """Random whole numbers up to a bound: their products and sums are exact, in whatever order they are made."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-bound, bound + 1, shape, generator=generator).float() for shape in shapes]


def in_turn(values: Sequence, others: Sequence, times: int = 1) -> list[tuple]:
    """Each of the values with so many of the others, which take turns: not all pairs, where a case takes seconds."""
    return [(value, others[(i + k) % len(others)]) for i, value in enumerate(values) for k in range(times)]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def poison(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of the same shapes and dtype, full of NaN."""
    return [torch.full_like(t, float("nan")) for t in tensors]


def serving(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """``use_backend``, or nothing where the choice is left to the package."""
    return contextlib.nullcontext() if backend is None else use_backend(backend)


class Ops:
    """``pgap_kernels.ops`` whose functions take ``backend=``, for tests that compare backends."""

    def __getattr__(self, name: str) -> Any:
        function: Callable = getattr(pgap_kernels.ops, name)
        if isinstance(function, type):  # a rule
            return function

        def call(*arguments, backend: str | None = None, **options):
            with serving(backend):
                return function(*arguments, **options)

        return call


ops = Ops()
