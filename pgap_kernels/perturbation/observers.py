"""Sees the inputs of the layers that use a weight, in any mode and beside a mode's own hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..directions import Weight
from .hooks import uses_of

# Called with a weight and the input of a layer that uses it: (..., n), or indices for an embedding.
See = Callable[[Weight, Tensor], None]


class _Observer:
    """A forward pre-hook of one module."""

    def __init__(self, weights: Sequence[Weight], see: See) -> None:
        self.weights, self.see = weights, see

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        for weight in self.weights:
            self.see(weight, x.detach())


@contextlib.contextmanager
def observing(model: nn.Module | None, weights: Sequence[Weight], see: See) -> Iterator[None]:
    """Call ``see(weight, x)`` before each forward of a linear layer or embedding that uses a weight.

    Raises:
        ValueError: there is no model to observe.
    """
    if model is None:
        raise ValueError("model: got None; accepted: the model whose layers' inputs are observed")
    handles = []
    try:
        chosen = {w.index: w for w in weights}
        for use in uses_of(model, weights):
            seen = [chosen[ref.index] for ref in use.refs if use.foldable(ref)]
            if seen:
                handles.append(use.module.register_forward_pre_hook(_Observer(seen, see), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
