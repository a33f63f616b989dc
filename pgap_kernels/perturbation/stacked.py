"""Several points in one forward: the batch's rows are N equal slices, and a module runs once for each on its filling.

forward(x_1 over ... over x_N)  =  forward(x_1) at W + point_1  over ... over  forward(x_N) at W + point_N

Neighbouring slices that see the same point share a filling. Linear layers and embeddings, whose rows cannot mix, also
run on it together. Layers of which only vectors move run once, with vectors for each row (``row_wise``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .hooks import ModuleUse, ParamRef, tensors_in
from .row_wise import row_wise


class Filler(Protocol):
    """What fills the parameters of a module for one of the points."""

    rows: int  # leading dimension of the stacked batch; 0 before a module has seen it
    slicing: str  # the module that runs on one slice after the other now, if any
    count: int  # of points, each with a slice of the rows
    runs: list[range]  # of neighbouring points that are the same

    def refs_to_fill(self, use: ModuleUse) -> list[ParamRef]: ...

    def at_points(self, index: int) -> list[Tensor]: ...

    def push(self, use: ModuleUse, refs: Sequence[ParamRef], run: int) -> None: ...

    def pop(self) -> None: ...

    def detached_output(self, output: Any) -> Any: ...


class StackedForward:
    """Replaces a module's ``forward``: if parameters are filled, each slice of rows runs on those of its point."""

    def __init__(self, filler: Filler, use: ModuleUse) -> None:
        self.filler, self.use = filler, use
        self.own = use.module.__dict__.get("forward")
        self.forward = use.module.forward
        self.row_wise = row_wise(use)
        self.removed = False
        use.module.forward = self  # type: ignore[method-assign, assignment]

    @property
    def transparent(self) -> bool:
        """Whether the module computes what its class says."""
        return self.own is None or getattr(self.own, "transparent", False)

    def is_in_place(self) -> bool:
        """Whether the module has it, or another that has it."""
        around = self.use.module.__dict__.get("forward")
        while isinstance(around, StackedForward) and around is not self:
            around = around.own
        return around is self

    def remove(self) -> None:
        """Put back the module's own forward, also inside the one that another optimizer has wrapped around this.

        What somebody else has wrapped around it may go on calling it: it does nothing any more.
        """
        self.removed = True
        around = self.use.module.__dict__.get("forward")
        if around is self:
            del self.use.module.forward
            if self.own is not None:
                self.use.module.forward = self.own  # type: ignore[method-assign]
            return
        while isinstance(around, StackedForward):
            if around.own is self:
                around.own, around.forward = self.own, self.forward
            around = around.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        filler, use = self.filler, self.use
        refs = filler.refs_to_fill(use) if filler.count > 1 and not self.removed else []
        if not refs:
            return self.forward(*args, **kwargs)
        if isinstance(use.module, nn.Embedding):
            args, kwargs = tree_map_only(Tensor, self._repeated, (args, kwargs))
        rows = next((t.shape[0] for t in tensors_in((args, kwargs)) if t.dim()), 0)
        check_rows(filler, use, rows)
        if self.row_wise is not None and self._moves_vectors(refs):
            x, *others = (*args, *kwargs.values())
            if not others and isinstance(x, Tensor) and x.dim() > 1 and x.layout == torch.strided and not x.is_nested:
                return self.row_wise(use.module, x, {ref.name: self._of_rows(ref, x) for ref in refs})
        results = []
        size = rows // filler.count
        for number, run in enumerate(filler.runs):
            filler.push(use, refs, number)
            filler.slicing = use.name or type(use.module).__name__
            for slices in [run] if use.kind is not None else [range(i, i + 1) for i in run]:
                own_args, own_kwargs = _rows_of((args, kwargs), rows, slice(slices.start * size, slices.stop * size))
                result = self.forward(*own_args, **own_kwargs)
                kept = filler.detached_output(result)
                results.append(result if kept is None else kept)
            filler.pop()
            filler.slicing = ""
        return _stack(results)

    def _moves_vectors(self, refs: Sequence[ParamRef]) -> bool:
        vectors = all(ref.owner is self.use.module and ref.parameter.dim() == 1 for ref in refs)
        return vectors and (self.use.kind is None or [ref.name for ref in refs] == ["bias"])

    def _of_rows(self, ref: ParamRef, x: Tensor) -> Tensor:
        """A vector at each row's point, (rows, 1, ..., 1, size)."""
        points = torch.stack(self.filler.at_points(ref.index))
        rows = points.unsqueeze(1).expand(-1, len(x) // len(points), -1)
        return rows.reshape(len(x), *[1] * (x.dim() - 2), -1)

    def _repeated(self, ids: Tensor) -> Tensor:
        """Positions (1, tokens), which stand for every row of the batch, one time for each: rows differ once their
        slices see different weights."""
        return ids.expand(self.filler.rows, -1) if ids.dim() == 2 and len(ids) == 1 and self.filler.rows else ids


def forward_of(module: nn.Module) -> tuple[Any, type]:
    """What a module's forward is, apart from the stacked ones around it: its own, if it was replaced, and its class."""
    own = module.__dict__.get("forward")
    while isinstance(own, StackedForward):
        own = own.own
    return own, type(module)


def check_rows(filler: Filler, use: ModuleUse, rows: int) -> None:
    """Refuse a module whose number of rows shows that they are not those of the stacked batch."""
    if filler.slicing:
        raise RuntimeError(
            f"points: {use.name!r} is called by {filler.slicing!r}, which has parameters of its own that move, and so "
            f"runs on one of {filler.count} slices after the other; accepted: parameters that move in one of the two. "
            "Freeze the others, or run one point at a time (members=1)"
        )
    filler.rows = filler.rows or rows
    if rows == 0 or rows % filler.count or rows % filler.rows:
        raise RuntimeError(
            f"points: {use.name!r} got {rows} rows, the forward began with {filler.rows}, for {filler.count} points; "
            f"accepted: a batch torch.cat([batch] * members), whose rows are {filler.count} equal slices, in models "
            "whose layers keep them apart, in order. Run one point at a time (members=1)"
        )


def runs_of(points: Sequence[object]) -> list[range]:
    """The numbers of points, those of neighbours that are one and the same object together."""
    runs: list[range] = []
    for number, point in enumerate(points):
        if runs and points[runs[-1].start] is point:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _rows_of(values: Any, rows: int, part: slice) -> Any:
    """Some rows of every tensor that has as many as the batch."""

    def cut(t: Tensor) -> Tensor:
        return t[part] if t.dim() and len(t) == rows else t

    return tree_map_only(Tensor, cut, values)


def _stack(results: Sequence[Any]) -> Any:
    """One output of those of all slices."""
    if len(results) == 1:
        return results[0]
    leaves, structures = zip(*(tree_flatten(result) for result in results), strict=True)
    stacked = [
        torch.cat(values) if isinstance(values[0], Tensor) and values[0].dim() else values[0]
        for values in zip(*leaves, strict=True)
    ]
    return tree_unflatten(stacked, structures[0])
