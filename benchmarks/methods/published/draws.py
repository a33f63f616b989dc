"""What the published methods draw."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Directions = Iterator[tuple[torch.nn.Parameter, Tensor]]


def normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal noise, of the type and device of another tensor."""
    return torch.normal(mean=0, std=1, size=shape, device=like.device, dtype=like.dtype)
