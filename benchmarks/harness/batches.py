"""Losses of stacked batches, as optimizers with ``members`` or ``groups`` take them from their closure."""

from __future__ import annotations

import torch
from torch import Tensor

from pgap_kernels.finetune.scoring import Encoded, Scorer


def stacked(batch: Encoded, copies: int) -> Encoded:
    """The batch so many times over."""
    if copies == 1:
        return batch
    inputs = {name: torch.cat([tensor] * copies) for name, tensor in batch.inputs.items()}
    return Encoded(inputs, torch.cat([batch.labels] * copies))


def loss(scorer: Scorer, batch: Encoded, slices: int) -> Tensor:
    """The mean loss of a batch; one loss per row where it has several slices."""
    return scorer.loss(batch) if slices == 1 else scorer.losses(batch)
