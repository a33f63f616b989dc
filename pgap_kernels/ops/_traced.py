"""Public ops as a compiled function sees them: attributes of this module, made when ``torch.compile`` first reads them.

To say so while this package is imported would import ``torch._dynamo``, which takes longer than all of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

functions: dict[str, Callable] = {}  # the ops, as they run without a compiler, by name


def __getattr__(name: str) -> Callable:
    """An op that stands in a graph as one node: its checks run while it is traced, and are not traced themselves."""
    if name not in functions:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    function = functions[name]

    @torch._dynamo.nonstrict_trace
    def traced(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_constant, (args, kwargs))
        returned = function(*args, **kwargs)
        return () if returned is None else returned  # None cannot be an output of a graph

    globals()[name] = traced  # guards of compiled functions ask for the same object again
    return traced


def _constant(value: Any) -> Any:
    """A number that changes from call to call is a variable in a graph. Ops take numbers as they are: another graph."""
    if isinstance(value, torch.SymInt):
        return int(value)
    return float(value) if isinstance(value, torch.SymFloat) else value
