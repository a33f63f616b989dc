"""Nothing reaches the forward: losses that do not depend on the weights, step after step, are said."""

from __future__ import annotations

import pytest
import torch
from support.recipes import EVERY, HOOKED, Net, loss_of, make, refused, seeded, take_steps
from support.selection import cycled

from pgap_kernels.optim import MeZO

pytestmark = pytest.mark.filterwarnings("error")


def other_model(model):
    return loss_of(seeded(Net))


def constant(model):
    return torch.tensor(0.5)


def rounded_away(model):
    return loss_of(model).round()


# Recipes differ in their losses and modes in what they refuse; what makes the losses flat is for none of them to know.
@pytest.mark.parametrize("case, loss", cycled(EVERY, [other_model, constant, rounded_away]))
def test_a_loss_that_does_not_depend_on_the_weights(case, loss):
    model = seeded(Net)
    optimizer = make(case, model, lr=1e-9, **({"allow_unused": True} if case in HOOKED else {}))
    take_steps(optimizer, model, 9, loss)
    with pytest.warns(UserWarning, match=r"last 10 steps were bit-equal: no perturbation reaches the loss") as warned:
        optimizer.step(lambda: loss(model))
    assert [w.filename for w in warned] == [__file__]
    take_steps(optimizer, model, 5, loss)  # said once
    assert optimizer.steps == 15
    if loss is other_model and case in HOOKED:
        strict, message = make(case, model), r"^closure: .* not perturbed, as the forward did not call"
        refused(RuntimeError, message, lambda: take_steps(strict, model, 1, loss))


def test_a_loss_that_is_flat_now_and_then():
    model = seeded(Net)
    optimizer = make("mezo-inplace", model)
    for _ in range(2):
        take_steps(optimizer, model, 9, rounded_away)
        take_steps(optimizer, model)


def test_parameters_that_the_model_does_not_have_any_more_without_a_model():
    """Where only parameters are known, the flat losses tell."""
    model = seeded(Net)
    optimizer = MeZO(list(model.named_parameters()))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="no perturbation reaches the loss"):
        take_steps(optimizer, model, 12)
