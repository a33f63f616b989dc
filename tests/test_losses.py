"""per_example_loss: each example's own cross-entropy, whatever its padding and the dtype of the logits."""

from __future__ import annotations

import pytest
import torch
from support.helpers import DTYPES
from torch.nn.functional import cross_entropy

from pgap_kernels import draw, per_example_loss

UNUSED = -100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore_index", [UNUSED, 3])
def test_tokens_are_predicted_by_those_before_them(dtype, ignore_index):
    """The mean over the tokens of an example that count; 0 where none does, and its first token never does."""
    logits = (3 * draw((4, 6, 7), 1, 1)).to(dtype)
    labels = torch.arange(24).view(4, 6) % 3
    labels[0, :3], labels[1, 5], labels[2, 1:], labels[3, ::2] = (ignore_index,) * 4
    losses = per_example_loss(logits, labels, ignore_index=ignore_index)
    assert losses.dtype == torch.float32 and losses[2] == 0
    for i, loss in enumerate(losses):
        counted = [t for t in range(1, 6) if labels[i, t] != ignore_index]
        terms = [cross_entropy(logits[i, t - 1].double(), labels[i, t]) for t in counted]
        # A logarithm of a sum of 7 and a mean of up to 5: a few roundings of numbers below 32.
        assert abs(loss - sum(terms) / max(len(terms), 1)) <= 20 * 2.0**-24 * 32


@pytest.mark.parametrize("dtype", DTYPES)
def test_classes(dtype):
    logits, labels = (3 * draw((5, 4), 1, 1)).to(dtype), torch.tensor([0, 3, UNUSED, 1, 2])
    losses = per_example_loss(logits, labels)
    assert losses.dtype == torch.float32 and losses[2] == 0
    assert torch.equal(losses, cross_entropy(logits.float(), labels, reduction="none"))


@pytest.mark.parametrize(
    "logits, labels", [((4, 6, 7), (4,)), ((4, 6, 7), (4, 5)), ((4, 7), (5,)), ((7,), ())], ids=str
)
def test_shapes_that_do_not_go_together(logits, labels):
    with pytest.raises(ValueError, match=r"^labels: got shape .*; accepted: \(batch,\) for \(batch, classes\)"):
        per_example_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
