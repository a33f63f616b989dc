"""What ``seeded_dot`` and ``squared_norms`` sum, product by product."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch

from .cases import DISTRIBUTIONS, LAYOUTS, Case, dot_arguments, norm_arguments
from .helpers import DTYPES, ops


def products(arguments: dict) -> list[np.ndarray]:
    """The float64 products that each tensor's sum is of; products of two float32 are exact in float64."""
    result = []
    for t, tensor in enumerate(arguments["tensors"]):
        x = tensor.contiguous().float()
        if "anchors" in arguments:
            x = x - arguments["anchors"][t].float()
        other = x
        if "key" in arguments:
            base, row_stride = arguments.get("slices", [(0, max(x.numel(), 1))] * (t + 1))[t]
            rows = x.shape[0] if x.dim() > 1 and "slices" in arguments else 1
            columns = x.numel() // max(rows, 1)
            options = {"distribution": arguments["distribution"], "backend": "reference"}
            key, ident = arguments["key"], arguments["tensor_ids"][t]
            drawn = [ops.draw(columns, key, ident, offset=base + i * row_stride, **options) for i in range(rows)]
            other = torch.cat([*drawn, torch.zeros(0)]).view(x.shape)
        result.append((x.double() * other.double()).flatten().numpy())
    return result


def magnitudes(arguments: dict) -> torch.Tensor:
    """Each tensor's sum of the magnitudes of its products."""
    return torch.tensor([math.fsum(abs(terms)) for terms in products(arguments)], dtype=torch.float64)


def _reduced() -> dict[str, Case]:
    cases = {}
    for i, (dtype, layout) in enumerate(itertools.product(DTYPES, LAYOUTS)):
        build = functools.partial(dot_arguments, dtype, DISTRIBUTIONS[(i + i // 4) % 2], layout)
        cases[f"dot {dtype} {layout}"] = Case("seeded_dot", build)
    for dtype, anchors in itertools.product(DTYPES, (None, torch.float32, "own")):
        build = functools.partial(norm_arguments, dtype, anchors, "strided" if anchors else "plain")
        cases[f"norm {dtype} {anchors}"] = Case("squared_norms", build)
    return cases


REDUCED = _reduced()  # of random numbers, whose sums are rounded
