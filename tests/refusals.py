"""Calls that must be refused: the error names the argument and nothing has been written; and values no op accepts."""

from __future__ import annotations

import math

import pytest
import torch
from cases import flat, storage

from pgap_kernels import ops


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


SCALARS = [
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    (1e39, ValueError),
    (10**400, ValueError),
    ([0.1, math.nan], ValueError),
    ([0.1, 0.2, 0.3], ValueError),
    ([], ValueError),
    ("0.1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (1j, TypeError),
    ([0.1, "x"], TypeError),
    (torch.tensor(math.nan), ValueError),
    (torch.tensor([0.1, math.inf]), ValueError),
    (torch.tensor(1e300, dtype=torch.float64), ValueError),
    (torch.tensor(1), TypeError),
    (torch.zeros(3), TypeError),
]
KEYS = [
    (-1, ValueError),
    (1 << 64, ValueError),
    (1.0, TypeError),
    (True, TypeError),
    (None, TypeError),
    (torch.tensor(1.0), TypeError),
    (torch.tensor(1, dtype=torch.int32), TypeError),
    (torch.tensor([1, 2]), TypeError),
]


def companions(like: list[torch.Tensor], dtype=torch.float32) -> dict:
    """Lists that do not go with a list of two weights (6, 8) and (5, 7) of float32: value, error, message."""
    right = [torch.ones(t.shape, dtype=dtype) for t in like]
    whole = torch.zeros(100, dtype=dtype)
    return {
        "one short": (right[:1], ValueError, ": got 1 tensors"),
        "not a list": (right[0], TypeError, ": got Tensor"),
        "empty": ([], ValueError, ": got an empty list"),
        "other shape": ([right[0], right[1].T], ValueError, r"\[1\]: got shape \(7, 5\)"),
        "same count, other shape": ([right[0], right[1].view(-1)], ValueError, r"\[1\]: got shape \(35,\)"),
        "float64": ([t.double() for t in right], TypeError, r"\[0\]: got dtype torch.float64"),
        "other 16 bits": ([t.half() for t in right], TypeError, r"\[0\]: got dtype torch.float16"),
        "meta": ([t.to("meta") for t in right], ValueError, ": got 2 tensors on meta"),
        "transposed": ([right[0].T.contiguous().T, right[1]], ValueError, r"\[0\]: got shape .* strides"),
        "the weights": (like, ValueError, r" \+ weights\[\d\] overlaps"),
        "one weight": ([right[0], like[1]], ValueError, r" \+ weights\[\d\] overlaps"),
        "itself": ([whole[:48].view(6, 8), whole[47:82].view(5, 7)], ValueError, r" \+ weights\[\d\] overlaps"),
    }
