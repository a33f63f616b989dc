"""Losses of each example of a batch, as optimizers with ``members`` or ``groups`` take them from the closure."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORE = -100


def per_example_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """Cross-entropy of each example, reduced in float32.

    Args:
        logits: (batch, classes) for classification; (batch, tokens, vocabulary) for a causal language model, whose
            position t predicts token t + 1.
        labels: class indices (batch,), or token ids (batch, tokens). Only tokens with another label than
            ``ignore_index`` count: mask prompts and padding with it, as ``transformers`` does.
        ignore_index: see above.

    Returns:
        float32 (batch,): the loss, or its mean over the tokens of each example that count; 0 where none does.

    Raises:
        ValueError: shapes that do not go together.
    """
    if logits.dim() == 2 and labels.shape == logits.shape[:1]:
        return cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; accepted: (batch,) "
            "for (batch, classes), or (batch, tokens) for (batch, tokens, vocabulary)"
        )
    following = labels[:, 1:]
    counts = following != ignore_index
    # Only positions that count are converted to float32: logits are most of a forward's memory.
    losses = cross_entropy(logits[:, :-1][counts].float(), following[counts], reduction="none")
    example = counts.nonzero()[:, 0]
    total = torch.zeros(len(logits), dtype=torch.float32, device=logits.device).index_add_(0, example, losses)
    return total / counts.sum(1).clamp(min=1)
