"""Several points in one forward: the batch's rows are N equal slices, and a module runs once for each on its filling.

forward(x_1 over ... over x_N)  =  forward(x_1) at W + point_1  over ... over  forward(x_N) at W + point_N

Neighbouring slices that see the same point share a filling. Linear layers and embeddings, whose rows cannot mix, also
run on it together. A linear layer of which only the bias moves runs once, with a bias of its own for each row:

    y = x W^T + b_rows          rounded once, as with one bias for all
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .hooks import CONV1D, LINEAR, ModuleUse, ParamRef, tensors_in


class Filler(Protocol):
    """What fills the parameters of a module for one of the points."""

    rows: int  # leading dimension of the stacked batch; 0 before a module has seen it
    count: int  # of points, each with a slice of the rows
    runs: list[range]  # of neighbouring points that are the same

    def refs_to_fill(self, use: ModuleUse) -> list[ParamRef]: ...

    def at_points(self, index: int) -> list[Tensor]: ...

    def push(self, use: ModuleUse, refs: Sequence[ParamRef], run: int) -> None: ...

    def pop(self) -> None: ...

    def detached_output(self, output: Any) -> Any: ...


class StackedForward:
    """Replaces a module's ``forward``: if parameters are filled, each slice of rows runs on those of its point."""

    transparent = True  # the module computes what its class says

    def __init__(self, filler: Filler, use: ModuleUse) -> None:
        self.filler, self.use = filler, use
        self.own = use.module.__dict__.get("forward")
        self.forward = use.module.forward
        use.module.forward = self  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Put back the module's own forward, also inside the one that another optimizer has wrapped around this."""
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
        refs = filler.refs_to_fill(use) if filler.count > 1 else []
        if not refs:
            return self.forward(*args, **kwargs)
        if isinstance(use.module, nn.Embedding):
            args, kwargs = tree_map_only(Tensor, self._repeated, (args, kwargs))
        rows = next((t.shape[0] for t in tensors_in((args, kwargs)) if t.dim()), 0)
        check_rows(filler, type(use.module).__name__, rows)
        x = next(tensors_in((args, kwargs)))
        if self._moves_only_bias(refs) and x.dim() > 1 and x.layout == torch.strided and not x.is_nested:
            return self._with_a_bias_of_each_row(refs[0], x)
        results = []
        size = rows // filler.count
        for number, run in enumerate(filler.runs):
            filler.push(use, refs, number)
            for slices in [run] if use.kind is not None else [range(i, i + 1) for i in run]:
                own_args, own_kwargs = _rows_of((args, kwargs), rows, slice(slices.start * size, slices.stop * size))
                result = self.forward(*own_args, **own_kwargs)
                kept = filler.detached_output(result)
                results.append(result if kept is None else kept)
            filler.pop()
        return _stack(results)

    def _moves_only_bias(self, refs: Sequence[ParamRef]) -> bool:
        module = self.use.module
        return (
            self.own is None
            and self.use.kind in (LINEAR, CONV1D)
            and [(ref.owner, ref.name) for ref in refs] == [(module, "bias")]
            and type(module.weight) is nn.Parameter  # subclasses may know F.linear alone
        )

    def _with_a_bias_of_each_row(self, bias: ParamRef, x: Tensor) -> Tensor:
        weight: Any = self.use.module.weight
        weight = weight.t() if self.use.kind == LINEAR else weight
        biases = torch.stack(self.filler.at_points(bias.index))
        flat = x.reshape(-1, x.shape[-1])
        rows = biases.unsqueeze(1).expand(-1, len(flat) // len(biases), -1).reshape(len(flat), -1)
        return torch.addmm(rows, flat, weight).view(*x.shape[:-1], -1)

    def _repeated(self, ids: Tensor) -> Tensor:
        """Positions (1, tokens), which stand for every row of the batch, one time for each: rows differ once their
        slices see different weights."""
        return ids.expand(self.filler.rows, -1) if ids.dim() == 2 and len(ids) == 1 and self.filler.rows else ids


def check_rows(filler: Filler, module: str, rows: int) -> None:
    """Refuse a module whose number of rows shows that they are not those of the stacked batch."""
    filler.rows = filler.rows or rows
    if rows == 0 or rows % filler.count or rows % filler.rows:
        raise RuntimeError(
            f"points: a {module} got {rows} rows, the forward began with {filler.rows}, for {filler.count} points; "
            f"accepted: models whose layers keep the {filler.count} slices of a stacked batch apart, in order. Run one "
            "point at a time (members=1)"
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
