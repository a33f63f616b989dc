"""sum z(key) T with a key, sum T^2 or sum (T - T0)^2 without; ``ops.reduction``."""

from __future__ import annotations

import torch

from ..arguments import ReductionArguments
from .layout import runs
from .noise import noise


def reduce(tensors, arguments: ReductionArguments):
    """Products and sums in float64; one value per tensor."""
    anchors, keys, tensor_ids, slices = arguments.anchors, arguments.keys, arguments.tensor_ids, arguments.slices
    device = tensors[0].device
    totals = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    for t, tensor in enumerate(tensors):
        group = [x.contiguous() for x in (tensor, *anchors[t : t + 1])]  # so that no sum depends on strides
        for begin, count, (value, *anchor) in runs(group, *slices[2 * t : 2 * t + 2]):
            x = value.float()
            if anchor:
                x = x - anchor[0].float()
            other = x
            if len(keys):
                other = noise(begin, count, tensor_ids[t], int(keys[0]), arguments.distribution, device)
            totals[t] += x.double() @ other.double()
    return totals
