"""Calls that must be refused: the error names the argument, and nothing has been written."""

from __future__ import annotations

import pytest
import torch

from .cases import flat, storage
from .helpers import ops


def refused(op: str, arguments: dict, error, match: str) -> None:
    """The call raises ``error`` that matches, and no storage behind its arguments has changed."""
    behind = storages(list(arguments.values()))
    before, versions = [pattern(s) for s in behind], [t._version for t in flat(arguments)]
    with pytest.raises(error, match=match):
        getattr(ops, op)(**arguments)
    assert all(torch.equal(pattern(s), b) for s, b in zip(behind, before, strict=True))
    assert [t._version for t in flat(arguments)] == versions


def storages(value) -> list[torch.Tensor]:
    """The whole storages behind every tensor in an argument that has values to look at."""
    return [storage(t) for t in flat(value) if t.layout == torch.strided and t.device.type != "meta"]


def pattern(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).clone()
