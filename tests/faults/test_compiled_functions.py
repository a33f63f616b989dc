"""Compiled functions around the model, and scripted models."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.models import assert_same_weights
from support.recipes import EVERY_MODE, INPUTS, LABELS, PGAP_OPTIONS, Net, make, seeded, take_steps
from support.selection import cycled
from torch.nn import functional as F

from pgap_kernels.optim import PGAP, MeZO

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("case", ["mezo-inplace", "mezo-two_pass", "mezo-scratch", "pgap-folded"])
def test_a_scripted_model(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.trace(seeded(Net), INPUTS)
    if case != "mezo-inplace":
        with pytest.raises(ValueError, match=r"'first\.weight' belongs to a scripted module|no low-rank direction"):
            make(case, model)
        return
    for method, options in ((MeZO, {}), (PGAP, PGAP_OPTIONS)):
        optimizer = method(model, **options)
        take_steps(optimizer, model, 2)
        assert optimizer.mode == "inplace"


@pytest.mark.parametrize("case, before", cycled(EVERY_MODE, [True, False]))
def test_a_compiled_function_around_the_model(case, before):
    """Made before or after the optimizer, and a layer frozen later: as without it, but for forwards of the search."""
    expected = seeded(Net)
    optimizer = make(case, expected)
    take_steps(optimizer, expected, 3)
    expected.first.requires_grad_(False)
    take_steps(optimizer, expected, 3)
    optimizer.merge()
    torch._dynamo.reset()
    model = seeded(Net)
    if before:
        optimizer, compiled = make(case, model), torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        optimizer = make(case, model)
    for frozen in (False, True):
        model.first.requires_grad_(not frozen)
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(compiled(INPUTS), LABELS))
    optimizer.merge()
    torch._dynamo.reset()
    assert_same_weights(model, expected)
