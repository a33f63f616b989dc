"""Tensors as runs of consecutive logical indices, small enough for the temporaries to stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .noise import stochastic_round, words

_CHUNK = 1 << 18  # elements drawn at a time


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor as (rows, columns) in its own storage: first dimension by the rest, vectors as one row."""
    if tensor.dim() < 2:
        return tensor.as_strided((1, tensor.numel()), (tensor.numel(), 1))
    columns = tensor.numel() // tensor.shape[0]
    return tensor.as_strided((tensor.shape[0], columns), (tensor.stride(0), 1))


def runs(
    tensors: list[Tensor], base: int = 0, row_stride: int | None = None
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(first logical index, length, views) of the runs of tensors of one shape."""
    if tensors[0].numel() == 0:
        return
    matrices = [_matrix(t) for t in tensors]
    rows, columns = matrices[0].shape
    row_stride = row_stride or columns
    if row_stride == columns and all(m.is_contiguous() for m in matrices):
        matrices, rows, columns = [m.view(1, -1) for m in matrices], 1, rows * columns
    for row in range(rows):
        for begin in range(0, columns, _CHUNK):
            end = min(begin + _CHUNK, columns)
            yield base + row * row_stride + begin, end - begin, [m[row, begin:end] for m in matrices]


def column(table: Tensor, t: int) -> int:
    """The column of a table of scalars that tensor t takes."""
    return t if table.shape[-1] > 1 else 0


def rounded(value: Tensor, like: Tensor, rounding_key: int | None, begin: int, tensor_id: int) -> Tensor:
    """float32 values in the dtype of ``like``: to nearest, or stochastically under a key."""
    if rounding_key is None:
        return value.to(like.dtype)
    return stochastic_round(value, words(begin, value.numel(), tensor_id, rounding_key, value.device), like.dtype)


def ints(tensor: Tensor | None) -> list[int] | None:
    """A tensor of keys on the host."""
    return None if tensor is None else tensor.tolist()
