"""Low-rank directions on a layer's output: what the points of a forward add to one weight, as calls of one op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..arguments import ForwardArguments
from ..directions import Fold, Weight, draw_factor
from .hooks import EMBEDDING, LINEAR


def forward_arguments(weight: Weight, points: Sequence[Sequence[Fold]]) -> list[ForwardArguments]:
    """Arguments of the calls that add the folds of every point, each to that point's slice of the rows."""
    return [_joined(weight, column) for column in _columns(points)]


def _columns(points: Sequence[Sequence[Fold]]) -> Iterator[list[Fold | None]]:
    """The first folds of all points, then the second ones, and so on; those of different kinds in columns of their own.

    None stands for a point that has no such fold.
    """
    for j in range(max(map(len, points), default=0)):
        column = [folds[j] if j < len(folds) else None for folds in points]
        for kind in dict.fromkeys(fold.kind for fold in column if fold is not None):
            yield [fold if fold is not None and fold.kind == kind else None for fold in column]


def _joined(weight: Weight, column: Sequence[Fold | None]) -> ForwardArguments:
    """One call for a column: a point without a fold gets one that adds 0, as a call serves every slice."""
    some = next(fold for fold in column if fold is not None)
    zero = some._replace(
        core=None if some.core is None else torch.zeros_like(some.core),
        coefficient=torch.zeros_like(some.coefficient),
    )
    folds = [zero if fold is None else fold for fold in column]
    drawn = some.left is None or some.right is None
    return ForwardArguments(
        left=_shared([fold.left for fold in folds]),
        right=_shared([fold.right for fold in folds]),
        cores=[fold.core for fold in folds if fold.core is not None],
        coefficients=[] if some.core is not None else [fold.coefficient for fold in folds],
        keys=[fold.keys for fold in folds] if drawn else [],
        shape=list(weight.tensor.shape),
        rank=some.rank,
        tensor_id=weight.id,
        span=weight.span or (),
    )


def _shared(factors: Sequence[Tensor | None]) -> list[Tensor]:
    """The stored factors: one for each slice, or a single one that all share; none where they are drawn."""
    stored = [factor for factor in factors if factor is not None]
    return stored[:1] if len({*map(id, stored)}) == 1 else stored


def add_lowrank(output: Tensor, x: Tensor, arguments: ForwardArguments) -> None:
    """output <- output + x (A C B^T)^T, or x (A C B^T) if transposed, slice by slice of the rows."""
    if torch.compiler.is_compiling():  # torch can trace the op itself, but none of the Python functions that call it
        ops.torch_ops.lowrank_forward_(output, x, **arguments._asdict())
    else:
        ops.add_lowrank_(output, x, arguments)


def fold_differentiably(kind: str | None, weight: Weight, folds: Sequence[Fold], x: Tensor, output: Tensor) -> Tensor:
    """The output plus all folds of a point, by torch operations: for closures that take gradients of their inputs."""
    for fold in folds:
        left, right = (_materialised(weight, fold, side) for side in (0, 1))
        core = fold.core if fold.core is not None else fold.coefficient * _eye(fold.rank, output)
        # A linear layer has y = x W^T; embeddings and Conv1D have y = x W.
        first, middle, last = (right, core.T, left) if kind == LINEAR else (left, core, right)
        projected = first[x] if kind == EMBEDDING else x.float() @ first
        output = output + (projected @ middle @ last.T).to(output.dtype)
    return output


def _eye(rank: int, like: Tensor) -> Tensor:
    return torch.eye(rank, dtype=torch.float32, device=like.device)


def _materialised(weight: Weight, fold: Fold, side: int) -> Tensor:
    """A (side 0) or B (side 1), drawn now if it is not stored."""
    stored = (fold.left, fold.right)[side]
    return draw_factor(weight, side, fold.rank, fold.keys[side]) if stored is None else stored
