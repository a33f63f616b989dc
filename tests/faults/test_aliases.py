"""Weights whose memory a buffer or another weight shares, or that a forward writes."""

from __future__ import annotations

import functools

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import (
    HOOKED,
    PGAP_OPTIONS,
    Bag,
    bag_loss,
    distance,
    make,
    refused,
    seeded,
    take_steps,
)
from support.selection import cycled
from torch import Tensor, nn
from torch.nn import functional as F

from pgap_kernels.optim import PGAP, MeZO

pytestmark = pytest.mark.filterwarnings("error")


class TiedByHand(nn.Module):
    """An embedding whose head is a buffer: a view of the weight, or of some of its rows."""

    def __init__(self, shared=slice(None)) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.register_buffer("head", self.words.weight.detach()[shared])

    def forward(self, rows: Tensor) -> Tensor:
        return self.words(rows) @ self.head.T


# Buffers are put back before each forward, but not those that share elements with a weight: in place, that would undo
# its perturbation. The hooked modes refuse to read any part of a weight through a buffer.
PARTS = [slice(None), slice(0, 10), slice(5, 15), slice(3, 5)]


@pytest.mark.parametrize(
    "case, part", [*[("mezo-inplace", part) for part in PARTS], *cycled(["pgap-two_pass", *HOOKED], PARTS)]
)
def test_a_buffer_that_is_a_view_of_a_weight(case, part):
    model = seeded(TiedByHand, part)
    labels = len(model.head)
    optimizer = make(case, model, lr=0.0)
    before = snapshot(model)
    rows = torch.arange(20)

    def step():
        optimizer.step(lambda: F.cross_entropy(model(rows), rows % labels))

    if optimizer.mode != "inplace":
        refused(RuntimeError, r"^closure: 'words\.weight' is used by \w+ outside the forward of the module", step)
        assert_same_weights(model, before)
        return
    for _ in range(50):
        step()
    optimizer.merge()
    assert distance(model, before) < 1e-5
    assert model.head.data_ptr() == model.words.weight[part].data_ptr()


def test_a_buffer_in_the_same_storage_as_a_weight():
    """All of a model in one flat tensor: a buffer beside the weights is put back before each forward, as any other."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    tensors = [*model.parameters(), model[1].running_mean, model[1].running_var]
    flat = torch.cat([t.detach().flatten() for t in tensors])
    for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.data = piece.view(t.shape)
    means = []
    model[1].register_forward_pre_hook(lambda module, args: means.append(module.running_mean.clone()))
    for case in ("mezo-inplace", "mezo-scratch"):
        means.clear()
        take_steps(make(case, model), model)
        assert torch.equal(*means) and model[1].running_mean.any()  # both forwards began with the same means


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_rescales_its_weight_in_the_forward(kind):
    # The rows of the weight have norms near 3, so that a forward changes them.
    rescaled_bag = functools.partial(Bag, functools.partial(kind, max_norm=1.0), padding_idx=3)
    message = r"^mode: got 'inplace', but 'words\.weight' is rescaled by the forwards of its \w+ \(max_norm=1\.0\)"
    for case in ("mezo-inplace", "mezo-two_pass", "pgap-inplace"):
        with pytest.raises(ValueError, match=message):
            make(case, seeded(rescaled_bag))
    for method, options in ((MeZO, {}), (PGAP, PGAP_OPTIONS)):  # default modes leave the weight alone
        model = seeded(rescaled_bag)
        optimizer = method(model, lr=0.0, **options)
        before = snapshot(model)
        take_steps(optimizer, model, 10, bag_loss)
        assert optimizer.mode == {MeZO: "scratch", PGAP: "folded"}[method]
        assert_same_weights(model, before)
    model = seeded(rescaled_bag)
    model.words.requires_grad_(False)  # a frozen embedding is not perturbed, so it may be rescaled
    take_steps(make("mezo-inplace", model), model, 1, bag_loss)


def test_weights_that_share_some_of_their_elements():
    flat = torch.ones(10)
    model = nn.Module()
    model.one, model.two = nn.Parameter(flat[:6]), nn.Parameter(flat[5:])
    with pytest.raises(ValueError, match=r"^params: 'one' and 'two' share some of their elements"):
        MeZO(model)
    model.two = nn.Parameter(flat[6:])
    MeZO(model)
    model.three = nn.Parameter(torch.ones(4, 4)[:, :2])
    model.four = nn.Parameter(model.three.data.as_strided((4, 2), (4, 1), 2))  # the other columns of three's memory
    MeZO(model)
