"""Parameters that are resized, replaced or moved to another place of the model after the optimizer was made."""

from __future__ import annotations

import pytest
import torch
from support.models import assert_same_weights
from support.recipes import EVERY, EVERY_MODE, HOOKED, Net, make, refused, seeded, take_steps
from support.selection import cycled
from torch import nn
from torch.nn.utils import prune as prune_module

from pgap_kernels.optim import MeZO

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("case", EVERY)
def test_resizing_a_weight(case):
    model = seeded(Net)
    optimizer = make(case, model)

    def resize(rows):
        model.last.weight.data, model.last.bias.data = torch.ones(rows, 12), torch.ones(rows)

    resize(3)  # no state yet
    take_steps(optimizer, model, 2)
    resize(5)
    if optimizer.state:
        message = r"^params: 'last\.weight' has the shape \(5, 12\) and state of the shape \(3, 12\); accepted: "
        refused(RuntimeError, message, lambda: take_steps(optimizer, model))
    else:
        take_steps(optimizer, model, 2)


def test_resizing_a_weight_with_a_residual_plane():
    model = seeded(Net).bfloat16()
    optimizer = MeZO(model, lr=1e-3, mode="scratch", residual=True)
    take_steps(optimizer, model)
    model.last.weight.data, model.last.bias.data = torch.ones(5, 12).bfloat16(), torch.ones(5).bfloat16()
    take_steps(optimizer, model)
    assert optimizer.perturbation.residual.planes["last.weight"].shape == (5, 12)


def weight_norm_by_hook(model):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.last)


def tie(model):
    model.middle.weight = nn.Parameter(model.middle.weight.detach().clone())
    model.last = nn.Linear(12, 12)
    model.last.weight = model.middle.weight


REPLACING = {
    "load_state_dict_assign": lambda m: m.load_state_dict(
        {k: v.clone() for k, v in m.state_dict().items()}, assign=True
    ),
    "new_head": lambda m: setattr(m, "last", nn.Linear(12, 3)),
    "removed": lambda m: setattr(m, "norm", nn.Identity()),
    "new_parameter": lambda m: setattr(m.last, "weight", nn.Parameter(torch.zeros(2, 12))),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.last),
    "weight_norm_by_hook": weight_norm_by_hook,
    "to_empty": lambda m: m.to("meta"),
    "tied_anew": tie,
}


# The base class misses the parameter before it asks the mode for anything: two modes for each way to replace it.
@pytest.mark.parametrize("how, case", cycled([*REPLACING], EVERY_MODE, each=2))
def test_replacing_a_parameter_of_the_model(how, case):
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model)
    optimizer.merge()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    REPLACING[how](model)
    message = r"^model: '\w+\.\w+' is not one of its parameters any more, but was replaced .* Make a new optimizer"
    refused(RuntimeError, message, lambda: take_steps(optimizer, model))
    with pytest.raises(RuntimeError, match=message):
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, before, [p for group in optimizer.param_groups for p in group["params"]]))


def prune(model):
    prune_module.l1_unstructured(model.middle, "weight", 0.5)


def nest(model):
    model.middle = nn.Sequential(model.middle, nn.Identity())


def alias(model):
    model.spare = model.middle


MOVING = {
    "parametrization": lambda m: nn.utils.parametrizations.spectral_norm(m.middle),
    "prune": prune,
    "wrapped_layer": nest,
    "second_name": alias,
    "frozen_adapter_beside": lambda m: setattr(m, "adapter", nn.Linear(2, 2).requires_grad_(False)),
}


# Hooks have to find each; in place nobody asks where a parameter is, but for the two-pass schedule's watch.
MOVES = [(how, case) for how in MOVING for case in HOOKED] + cycled([*MOVING], ["pgap-two_pass", "mezo-inplace"])


@pytest.mark.parametrize("how, case", MOVES)
def test_moving_a_parameter_inside_the_model(how, case):
    """The module that uses it is another one now; a new optimizer would find it there."""
    models = [seeded(Net) for _ in range(2)]
    optimizers = [make(case, model) for model in models]
    for optimizer, model in zip(optimizers, models, strict=True):
        take_steps(optimizer, model, 4)
        optimizer.merge()
        torch.manual_seed(2)
        MOVING[how](model.eval())
    state = optimizers[1].state_dict()
    named = list(zip((w.name for w in optimizers[1].weights()), optimizers[1].param_groups[0]["params"], strict=True))
    optimizers[1] = make(case, named, model=models[1])
    optimizers[1].load_state_dict(state)
    for optimizer, model in zip(optimizers, models, strict=True):
        take_steps(optimizer, model, 3)
        optimizer.merge()
    assert_same_weights(*models)
