"""y <- y + x D^T or y + x D with D = A M B^T; ``ops.forward``."""

from __future__ import annotations

import torch


def lowrank_forward_(outputs, inputs, left, right, cores, transposed):
    """Matrix products of float32. Two cores: one for each half of the rows."""
    into, out_of = (left.float(), right.float()) if transposed else (right.float(), left.float())
    with torch.autocast(outputs.device.type, enabled=False):
        _add(outputs, inputs, into, out_of, cores, transposed)


def _add(outputs, inputs, into, out_of, cores, transposed):
    half = len(outputs) // len(cores)
    for i, core in enumerate(cores):
        rows = slice(i * half, (i + 1) * half)
        x = inputs[rows]
        t = x.float() @ into if x.is_floating_point() else into[x]
        product = t @ (core if transposed else core.T) @ out_of.T
        outputs[rows] = outputs[rows].float() + product
