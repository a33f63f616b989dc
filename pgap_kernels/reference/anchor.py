"""W <- fma(c, X, W0), X = Delta or W - W0; ``ops.anchor``."""

from __future__ import annotations

from ..arguments import AnchorArguments
from .layout import column, ints, rounded, runs
from .noise import fma


def anchor_affine_(weights, out, arguments: AnchorArguments):
    """One rounding per weight."""
    anchors, deltas, tensor_ids, slices = arguments.anchors, arguments.deltas, arguments.tensor_ids, arguments.slices
    coefficient, rounding_key = arguments.coefficient.to(weights[0].device), ints(arguments.rounding_key)
    for t, (weight, target) in enumerate(zip(weights, out, strict=True)):
        c = coefficient[0, column(coefficient, t)]
        tensors = [weight, target, anchors[t], *(deltas[t : t + 1])]
        for begin, _, (value, written, anchor, *delta) in runs(tensors, *slices[2 * t : 2 * t + 2]):
            origin = anchor.float()
            distance = delta[0].float() if delta else value.float() - origin
            key = None if rounding_key is None else rounding_key[0]
            written.copy_(rounded(fma(c, distance, origin), written, key, begin, tensor_ids[t]))
