"""A state_dict that another class or other shapes get."""

from __future__ import annotations

import pytest
from support.models import assert_same_weights
from support.recipes import CASES, EVERY, Net, make, refused, seeded, take_steps
from torch import nn

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("case", EVERY)
def test_loading_the_state_into_a_subclass(case):
    method, options = CASES[case]
    mine = type("Mine", (method,), {})
    models = [seeded(Net) for _ in range(2)]
    optimizer = method(models[0], lr=1e-2, **options)
    take_steps(optimizer, models[0], 4)
    other = mine(models[1], lr=1e-2, **options)
    other.load_state_dict(optimizer.state_dict())
    models[1].load_state_dict(models[0].state_dict())
    for o, model in ((optimizer, models[0]), (other, models[1])):
        take_steps(o, model, 3)
        o.merge()
    assert_same_weights(*models)


@pytest.mark.parametrize("case", ["pgap-folded", "lozo-inplace", "helene-scratch"])
def test_loading_the_state_of_other_shapes(case):
    small, wide = seeded(Net), seeded(Net)
    wide.middle, wide.last = nn.Linear(12, 14), nn.Linear(14, 2)
    wide.norm = nn.LayerNorm(14)
    optimizer = make(case, wide)
    take_steps(optimizer, wide, 2)
    state, other = optimizer.state_dict(), make(case, small)
    refused(ValueError, r"^state_dict: got .* of shape .*; accepted: ", lambda: other.load_state_dict(state))
    take_steps(other, small)
