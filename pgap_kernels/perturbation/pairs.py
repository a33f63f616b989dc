"""Both signs in one forward: the batch is stacked twice, and what a module runs on is filled once for each half.

forward(x+ over x-)  =  forward(x+) on W + a z  over  forward(x-) on W - a z
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .hooks import Use, tensors_in

if TYPE_CHECKING:
    from .scratch import Scratch


class Halves:
    """In place of a module's ``forward``: while the scratch is active, each half runs on its own filling."""

    transparent = True  # the module computes what its class says

    def __init__(self, scratch: Scratch, use: Use) -> None:
        self.scratch, self.use = scratch, use
        self.own = use.module.__dict__.get("forward")
        self.forward = use.module.forward
        use.module.forward = self  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.use.module.forward
        if self.own is not None:
            self.use.module.forward = self.own  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scratch, module = self.scratch, self.use.module
        places = [place for place in self.use.places if scratch.fills(place)] if scratch.active else []
        if not places:
            return self.forward(*args, **kwargs)
        rows = next((t.shape[0] for t in tensors_in((args, kwargs)) if t.dim()), 0)
        scratch.rows = scratch.rows or rows
        if rows == 0 or rows % 2 or rows % scratch.rows:
            raise RuntimeError(
                f"paired: a {type(module).__name__} got {rows} rows, the forward began with {scratch.rows}; accepted: "
                "models whose layers keep the two halves of a stacked batch apart, in order. Choose paired=False"
            )
        results = []
        for sign, part in ((1, slice(0, rows // 2)), (-1, slice(rows // 2, rows))):
            own_args, own_kwargs = _rows_of((args, kwargs), rows, part)
            scratch.push(module, places, sign)
            result = self.forward(*own_args, **own_kwargs)
            kept = scratch.kept(result)
            scratch.pop()
            results.append(result if kept is None else kept)
        return _stacked(*results)


def _rows_of(values: Any, rows: int, part: slice) -> Any:
    """Of every tensor with that many rows, some of them."""

    def cut(t: Tensor) -> Tensor:
        return t[part] if t.dim() and len(t) == rows else t

    return tree_map_only(Tensor, cut, values)


def _stacked(plus: Any, minus: Any) -> Any:
    first, structure = tree_flatten(plus)
    second, _ = tree_flatten(minus)
    both = [torch.cat((a, b)) if isinstance(a, Tensor) and a.dim() else a for a, b in zip(first, second, strict=True)]
    return tree_unflatten(both, structure)
