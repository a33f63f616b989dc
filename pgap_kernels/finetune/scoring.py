"""Score prompts by the two label tokens at their last position: loss for training, loss and accuracy for evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from ..losses import per_example_loss
from .data import Example


@dataclass(frozen=True)
class Encoded:
    """A left-padded batch on the model's device: arguments for the model, and the labels (0 or 1)."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats over the two label tokens, accuracy from 0 to 1, and the number of examples."""

    loss: float
    accuracy: float
    examples: int


class Scorer:
    """Scores batches with a model.

    Args:
        model: a causal language model.
        label_tokens: the tokens that stand for labels 0 and 1.
        pad_token: any valid token id; padded positions are masked.
    """

    def __init__(self, model: Any, label_tokens: tuple[int, int], pad_token: int) -> None:
        self.model = model
        self.label_tokens = list(label_tokens)
        self.pad_token = pad_token
        self._columns: dict[torch.device, torch.Tensor] = {}

    @cached_property
    def _accepted(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Pad to the longest example, on the left so that the last position is every prompt's last token."""
        length = max(len(example.tokens) for example in examples)
        padding = [length - len(example.tokens) for example in examples]
        device = self.model.device
        tokens = torch.tensor(
            [[self.pad_token] * pad + list(example.tokens) for pad, example in zip(padding, examples, strict=True)],
            device=device,
        )
        columns = torch.arange(length, device=device)
        first = torch.tensor(padding, device=device)[:, None]
        inputs = {"input_ids": tokens, "attention_mask": (columns >= first).long()}
        # Models do not all derive positions from the mask, so a prompt's first token is told that it is position 0.
        if "position_ids" in self._accepted:
            inputs["position_ids"] = (columns - first).clamp(min=0)
        return Encoded(inputs, torch.tensor([example.label for example in examples], device=device))

    def logits(self, batch: Encoded) -> torch.Tensor:
        """Scores of the two label tokens in fp32, shape (batch, 2)."""
        # Only the last position goes through the vocabulary-wide head.
        keep = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        logits = self.model(**batch.inputs, **keep, use_cache=False).logits
        return logits[:, -1].index_select(1, self._labels_on(logits.device)).float()

    def _labels_on(self, device: torch.device) -> torch.Tensor:
        """The label tokens on a device: a list would be copied there in every forward, which no CUDA graph can do."""
        if device not in self._columns:
            with torch.inference_mode(False):
                self._columns[device] = torch.tensor(self.label_tokens, device=device)
        return self._columns[device]

    def loss(self, batch: Encoded) -> torch.Tensor:
        """Mean cross-entropy over the two label tokens, a scalar in fp32."""
        return functional.cross_entropy(self.logits(batch), batch.labels)

    def losses(self, batch: Encoded) -> torch.Tensor:
        """Cross-entropy of each row over the two label tokens, in fp32."""
        return per_example_loss(self.logits(batch), batch.labels)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch_size: int) -> Score:
        """Loss and accuracy over all of ``examples``."""
        loss, correct = 0.0, 0
        # By length, so that little is spent on padding; the result does not depend on the order.
        ordered = sorted(examples, key=lambda example: len(example.tokens))
        for start in range(0, len(ordered), batch_size):
            batch = self.encode(ordered[start : start + batch_size])
            logits = self.logits(batch)
            loss += functional.cross_entropy(logits, batch.labels, reduction="sum").item()
            correct += int((logits.argmax(-1) == batch.labels).sum())
        return Score(loss / len(ordered), correct / len(ordered), len(ordered))
