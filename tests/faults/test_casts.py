"""The model is cast after the optimizer was made: the mode follows, or the constructor's refusal is given."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import (
    EVERY,
    EVERY_MODE,
    INPUTS,
    LABELS,
    PGAP_OPTIONS,
    SIXTEEN_BIT_IN_PLACE,
    Net,
    changed,
    distance,
    make,
    refused,
    seeded,
    setting,
    take_steps,
)
from support.selection import cycled
from torch.nn import functional as F

from pgap_kernels.optim import HELENE, PGAP, MeZO

pytestmark = pytest.mark.filterwarnings("error")


# By .data or by swapping the tensors: what the parameters are then is read anew, whatever the recipe and the mode.
CASTS = list(itertools.product([torch.bfloat16, torch.float16], [False, True]))


@pytest.mark.parametrize("case, dtype, swap", cycled(EVERY, CASTS, each=2))
def test_casting_the_model_after_the_optimizer_was_made(case, dtype, swap):
    model = seeded(Net)
    optimizer = make(case, model, lr=0.0)
    take_steps(optimizer, model)
    with setting(torch.__future__.set_swap_module_params_on_conversion, swap, False):
        model.to(dtype)
    if optimizer.mode == "inplace":  # the constructor warns of it
        refused(UserWarning, SIXTEEN_BIT_IN_PLACE, lambda: take_steps(optimizer, model))
        return
    before = snapshot(model)
    take_steps(optimizer, model, 4)
    optimizer.merge()
    assert_same_weights(model, before)
    assert model.first.weight.dtype == dtype


@pytest.mark.parametrize("method, options", [(MeZO, {}), (PGAP, PGAP_OPTIONS), (HELENE, {"batch_size": 16})])
def test_casting_the_model_of_an_optimizer_that_chose_its_mode(method, options):
    model = seeded(Net)
    optimizer = method(model, lr=0.0, **options)
    take_steps(optimizer, model)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model.to(dtype)
        before = snapshot(model)
        take_steps(optimizer, model, 3)
        expected = method(seeded(Net).to(dtype), **options)
        assert (optimizer.mode, optimizer.mode_reason) == (expected.mode, expected.mode_reason)
        assert dtype == torch.float32 or changed(model, before) == []


@pytest.mark.parametrize("case", EVERY_MODE)
def test_casting_a_part_of_the_model(case):
    """Other parts stay float32, and so does what the open window or the two-pass schedule has added."""
    model = seeded(Net)
    optimizer = make(case, model)
    twin = seeded(Net)
    other = make(case, twin)

    def mixed_loss(m):
        hidden = torch.tanh(m.first(INPUTS)).to(m.middle.weight.dtype)
        return F.cross_entropy(m.last(m.norm(m.middle(hidden).float())), LABELS)

    for m, o in ((model, optimizer), (twin, other)):
        take_steps(o, m, 2, mixed_loss)
    other.merge()
    for m in (model, twin):
        m.middle.bfloat16()
    if optimizer.mode == "inplace":
        refused(UserWarning, SIXTEEN_BIT_IN_PLACE, lambda: take_steps(optimizer, model, 1, mixed_loss))
        return
    model.state_dict()
    assert distance(model, snapshot(twin)) <= 2**-7 * twin.middle.weight.abs().max()
    take_steps(optimizer, model, 3, mixed_loss)


@pytest.mark.parametrize("case", EVERY_MODE)
def test_casting_the_model_to_float64(case):
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model)
    model.double()
    message = r"^params: got 'first\.weight' with dtype torch\.float64; accepted: torch\.float32, torch\.bfloat16"
    refused(TypeError, message, lambda: take_steps(optimizer, model))
    with pytest.raises(TypeError, match=message):
        make(case, model)
    model.float()
    take_steps(optimizer, model, 3)


def test_casting_weights_with_a_residual_plane():
    model = seeded(Net).bfloat16()
    optimizer = MeZO(model, lr=1e-3, mode="scratch", residual=True)
    take_steps(optimizer, model, 3)
    kept = optimizer.perturbation.residual.planes["middle.weight"].clone()
    assert kept.any()
    model.middle.requires_grad_(False)
    take_steps(optimizer, model)
    state = optimizer.state_dict()
    model.middle.requires_grad_(True)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.perturbation.residual.planes["middle.weight"], kept)
    model.half()  # the bits of a bfloat16's plane mean nothing beside a float16
    optimizer.cost()
    assert not optimizer.perturbation.residual.planes["middle.weight"].any()
    take_steps(optimizer, model)
    model.float()
    message = r"^residual: got True with mode='scratch' and torch\.float32 weights"
    refused(ValueError, message, lambda: take_steps(optimizer, model))
