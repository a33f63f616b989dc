"""y <- y + x D^T or y + x D with D = A C B^T of each slice of the rows; ``ops.forward``."""

from __future__ import annotations

import torch

from .noise import noise


def lowrank_forward_(outputs, inputs, arguments):
    """Matrix products of float32, slice by slice."""
    a = arguments
    rows = len(outputs) // a.slices
    for s in range(a.slices):
        left, right = (_factor(stored, side, s, a) for side, stored in enumerate((a.left, a.right)))
        own = slice(s * rows, (s + 1) * rows)
        with torch.autocast(outputs.device.type, enabled=False):
            into, out_of = (left, right) if a.transposed else (right, left)
            x = inputs[own]
            t = x.float() @ into if x.is_floating_point() else into[x]
            t = t @ (a.cores[s] if a.transposed else a.cores[s].T) if a.cores else t * a.coefficients[s]
            outputs[own] = outputs[own].float() + t @ out_of.T


def _factor(stored, side, s, a):
    """A or B of a slice in float32; a drawn one of a shard has the rows of the unsharded one."""
    if stored:
        return stored[s if len(stored) > 1 else 0].float()
    base, row_stride = a.span or (0, 1)
    first = (base // row_stride, base % row_stride)[side]
    rows = a.shape[side]
    key = a.keys[s][side]
    z = noise(first * a.rank, rows * a.rank, a.tensor_id, int(key), "normal", key.device)
    return z.view(rows, a.rank)
