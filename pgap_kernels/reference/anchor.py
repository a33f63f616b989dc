"""W <- fma(c, X, W0), X = Delta or W - W0; ``ops.anchor``."""

from __future__ import annotations

from .layout import column, ints, rounded, runs
from .noise import fma


def anchor_affine_(weights, anchors, deltas, coefficient, rounding_key, tensor_ids, slices):
    """One rounding per weight."""
    coefficient, rounding_key = coefficient.to(weights[0].device), ints(rounding_key)
    for t, weight in enumerate(weights):
        c = coefficient[0, column(coefficient, t)]
        tensors = [weight, anchors[t], *(deltas[t : t + 1])]
        for begin, _, (written, anchor, *delta) in runs(tensors, *slices[2 * t : 2 * t + 2]):
            origin = anchor.float()
            distance = delta[0].float() if delta else written.float() - origin
            key = None if rounding_key is None else rounding_key[0]
            written.copy_(rounded(fma(c, distance, origin), written, key, begin, tensor_ids[t]))
