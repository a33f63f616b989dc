"""Rows of an embedding that torch's training leaves alone: no forward sees them moved, and no update moves them."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from support.models import snapshot
from support.recipes import (
    EVERY,
    EVERY_MODE,
    SIXTEEN_BIT_IN_PLACE,
    Bag,
    Tagger,
    bag_loss,
    make,
    seeded,
    tagging_loss,
    take_steps,
)
from support.selection import cycled
from torch import nn

from pgap_kernels.optim import MeZO

pytestmark = pytest.mark.filterwarnings("error")


# Which row it is the weight knows, whatever its layer; passes and hooks, which keep it, know neither layer nor dtype.
PADDED = list(itertools.product([nn.Embedding, nn.EmbeddingBag], [3, -1], [torch.float32, torch.bfloat16]))


@pytest.mark.parametrize("case, kind, padding_idx, dtype", cycled([*EVERY, "pgap-scratch"], PADDED, each=3))
def test_padding_an_embedding(case, kind, padding_idx, dtype):
    model = seeded(Bag, kind, padding_idx).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SIXTEEN_BIT_IN_PLACE)
        optimizer = make(case, model, lr=1e-1, **({} if case.startswith("dizo") else {"weight_decay": 0.5}))
    before, seen = snapshot(model), []
    if kind is nn.Embedding:
        padding = torch.full((1, 1), padding_idx % 20)
        model.words.register_forward_hook(lambda module, args, out: seen.append(out[args[0] == padding.item()]))
    take_steps(optimizer, model, 7, bag_loss)
    with torch.no_grad():
        bag_loss(model)  # reads an open window as well
    optimizer.merge()
    moved = (model.words.weight != before["words.weight"]).any(1)
    assert not moved[padding_idx] and moved.sum() == 19
    assert all((rows == before["words.weight"][padding_idx]).all() for rows in seen)
    expected = seeded(Bag, kind, padding_idx)  # torch's own
    loss = bag_loss(expected)
    loss.backward()
    assert not expected.words.weight.grad[padding_idx].any()


@pytest.mark.parametrize("case, tied", cycled(EVERY_MODE, ["parameter", "memory"]))
def test_padding_an_embedding_that_is_the_head_too(case, tied):
    """As in torch, whose gradient of the row then comes from the head."""
    model = seeded(Tagger, tied, padding_idx=4)
    optimizer = make(case, model)
    before = snapshot(model)
    take_steps(optimizer, model, 3, tagging_loss)
    optimizer.merge()
    assert (model.words.weight != before["words.weight"]).any(1).all()
    tagging_loss(model).backward()
    gradient = model.head.weight.grad
    assert gradient[4].any()


def test_padding_an_embedding_with_a_residual_plane():
    model = seeded(Bag, nn.Embedding, 3).bfloat16()
    optimizer = MeZO(model, lr=1e-2, weight_decay=0.5, mode="scratch", residual=True)
    before = snapshot(model)
    take_steps(optimizer, model, 5, bag_loss)
    assert torch.equal(model.words.weight[3], before["words.weight"][3])
    assert not optimizer.perturbation.residual.planes["words.weight"][3].any()
