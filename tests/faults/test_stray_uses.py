"""Weights that a forward uses where no hook has put the perturbed ones: refused, with the weight's name."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.models import assert_clean, assert_same_weights, parameters_of, snapshot
from support.recipes import HOOKED, INPUTS, LABELS, Net, loss_of, make, refused, seeded, take_steps
from support.selection import cycled
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("error")


class Stray(Net):
    """Uses a weight outside of its module's forward, always or in one branch."""

    def __init__(self, read, training=None) -> None:
        super().__init__()
        self.read, self.only = read, training
        self.register_buffer("view", self.middle.weight.detach()[2:5])

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if self.only is None or self.training == self.only:
            result = result + self.read(self).sum() * torch.tensor([1.0, 0.0])
        return result


READS = {
    "function": lambda m: F.linear(torch.ones(12), m.middle.weight),
    "view": lambda m: m.middle.weight[1:],
    "transposed": lambda m: m.middle.weight.T,
    "data": lambda m: m.middle.weight.data,
    "row": lambda m: m.middle.weight[3],
    "buffer": lambda m: m.view,
    "bias": lambda m: m.middle.bias,
    "inside_another": lambda m: m.norm.bias * m.last.weight.mean(),
}


# How a weight is read, in which branch, and by which of the hooked modes it was perturbed are three questions apart.
BRANCHES = {"always": None, "train": True, "eval": False}


@pytest.mark.parametrize("read, branch, case", cycled([*READS], list(itertools.product(BRANCHES, HOOKED)), each=2))
def test_a_stray_use_of_a_weight(read, branch, case):
    branch = BRANCHES[branch]
    model = seeded(Stray, READS[read], branch).train(branch is not True)
    optimizer = make(case, model)
    if branch is not None:
        take_steps(optimizer, model, 2)  # the other branch
        model.train(branch)
    optimizer.merge()
    parameters, before = parameters_of(model), snapshot(model)
    message = r"^closure: '\w+\.\w+' is used by \w+ outside the forward of the module .* choose mode='inplace'"
    refused(RuntimeError, message, lambda: take_steps(optimizer, model))
    assert_same_weights(model, before)
    assert_clean(parameters)
    if branch is not None:
        model.train(not branch)
        take_steps(optimizer, model)


@pytest.mark.parametrize("case, given", cycled(HOOKED, ["zeros", "copies", "one"]))
def test_calling_the_model_with_other_parameters(case, given):
    """``functional_call`` with what is not trained: the loss would not depend on the perturbation."""
    model = seeded(Net)
    optimizer = make(case, model)
    before = snapshot(model)
    others = {n: torch.zeros_like(p) if given == "zeros" else p.detach().clone() for n, p in model.named_parameters()}
    if given == "one":
        others = {"middle.bias": others["middle.bias"]}

    def closure():
        return F.cross_entropy(torch.func.functional_call(model, others, (INPUTS,)), LABELS)

    refused(RuntimeError, r"^closure: '\w+\.\w+' was replaced for this forward", lambda: optimizer.step(closure))
    assert_same_weights(model, before)
    take_steps(optimizer, model)


class FusedHead(Net):
    """Reads its last layer's weight itself, as losses that are fused with the head do."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.middle(torch.tanh(self.first(x))))
        return hidden @ self.last.weight.T + self.last.bias


@pytest.mark.parametrize("case", HOOKED)
def test_a_weight_that_another_module_reads(case):
    """Where the optimizer knows of it, the forward sees what it sees where the layer is called."""
    read_by = {"last.weight": "", "last.bias": ""}
    losses = []
    for cls, options in ((Net, {}), (FusedHead, {"read_by": read_by})):
        model = seeded(cls)
        optimizer = make(case, model, **options)
        losses.append([optimizer.step(lambda model=model: loss_of(model)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    refused(RuntimeError, r"^closure: 'last\.\w+' is used by", lambda: take_steps(make(case, model), model))
    message = "read_by: got 'lost.weight'; accepted: names of the model's parameters"
    refused(ValueError, message, lambda: make(case, model, read_by={"lost.weight": ""}))
    message = "read_by: got 'lost' for 'last.weight'; accepted: names of modules"
    refused(ValueError, message, lambda: make(case, model, read_by={"last.weight": "lost"}))


class Keeper(nn.Module):
    """Hands its weight on in a way that nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, found: list) -> None:
        found.append(self.weight)


class Kept(Net):
    def __init__(self) -> None:
        super().__init__()
        self.keeper = Keeper()

    def forward(self, x: Tensor) -> Tensor:
        found = []
        self.keeper(found)
        return super().forward(x) + (x @ found[0].T).mean(1, keepdim=True) * torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("case", HOOKED)
def test_a_perturbed_weight_that_is_used_when_its_memory_has_others_in_it(case):
    model = seeded(Kept)
    optimizer = make(case, model)
    before = snapshot(model)
    message = r"^closure: a weight of the shape \(12, 8\) is used by \w+ outside the forward of the module"
    refused(RuntimeError, message, lambda: take_steps(optimizer, model))
    assert_same_weights(model, before)
