"""Models that read their weights in other ways than by a layer's own forward: the losses are those in place."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import (
    CASES,
    EVERY_MODE,
    HOOKED,
    INPUTS,
    LABELS,
    PGAP_OPTIONS,
    SIXTEEN_BIT_IN_PLACE,
    Net,
    adapted,
    changed,
    in_place,
    loss_of,
    make,
    seeded,
    take_steps,
)
from support.selection import cycled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as prune_module

from pgap_kernels.optim import PGAP, MeZO
from pgap_kernels.perturbation import LINEAR, kind_of

pytestmark = pytest.mark.filterwarnings("error")


class Attention(nn.Module):
    def __init__(self, batch_first=True) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        words = torch.stack([x, x * 0.5, x.roll(1, 1)], 1)
        return self.last(self.attention(words, words, words, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(torch.stack([x, x * 0.5], 1)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM) -> None:
        super().__init__()
        self.layer, self.last = kind(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.stack([x, -x]))[0][-1])


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ParameterDict({"scale": nn.Parameter(torch.ones(8, 8)), "shift": nn.Parameter(torch.zeros(8))})
        self.several = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.table["scale"] + self.table["shift"]) * self.several[0])


class Branches(nn.Module):
    """Runs inside itself, twice at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.eye(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, levels: int = 2) -> Tensor:
        y = torch.tanh(F.linear(x, self.weight, self.bias))
        return y if not levels else y + self(y, levels - 1) - self(x, levels - 1)


def hooked_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2))


def pruned() -> nn.Module:
    model = Net()
    prune_module.l1_unstructured(model.middle, "weight", 0.5)
    return model


class Vmapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


MODELS = {
    "attention": Attention,
    "encoder": Encoder,
    "containers": Containers,
    "branches": lambda: nn.Sequential(Branches(), nn.Linear(8, 2)),
    "adapters": adapted,
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2)),
    "weight_norm_by_hook": hooked_weight_norm,
    "spectral_norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 2)),
    "pruned": pruned,
    "checkpointed": Checkpointed,
    "vmapped": Vmapped,
    "functional_call": Net,
}


def losses_of(case: str, options, make_model, training: bool) -> list[float]:
    model = seeded(make_model).train(training)
    optimizer, seen = make(case, model, **options), []

    def closure():
        loss = loss_of(model)
        if make_model is MODELS["functional_call"]:  # with the model's own parameters
            loss = F.cross_entropy(torch.func.functional_call(model, dict(model.named_parameters()), (INPUTS,)), LABELS)
        return loss

    for _ in range(4):
        optimizer.step(closure)
        seen += optimizer.last.losses  # a first forward may be repeated
    return seen


# What is particular to training (an attention's fast path, a spectral norm's iterations) is the model's own affair.
WAYS = [(model, case) for model in MODELS for case in HOOKED]


@pytest.mark.parametrize("model, case, training", cycled(WAYS, [True, False]))
def test_a_model_that_reads_its_weights_in_another_way(model, case, training):
    """The losses of the hooked modes are those in place."""
    if model == "vmapped" and CASES[case][1]["mode"] == "folded":
        with pytest.raises(RuntimeError, match=r"^closure: .* is applied to a nested, sparse or vmapped tensor"):
            losses_of(case, {}, MODELS[model], training)
        return
    found, expected = (losses_of(case, options, MODELS[model], training) for options in ({}, in_place(case)))
    assert len({*expected}) > len(expected) / 2
    assert found == pytest.approx(expected, abs=5e-6)


CHOICES = [(model, method) for model in (*MODELS, "lstm", "gru") for method in (MeZO, PGAP)]
CHOICES.remove(("vmapped", PGAP))  # refused in a forward
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("model, method, dtype", cycled(CHOICES, DTYPES))
def test_a_mode_that_was_chosen_can_run(model, method, dtype):
    others = {"lstm": Recurrent, "gru": functools.partial(Recurrent, nn.GRU)}
    module = seeded((MODELS | others)[model]).to(dtype)
    told = model in others and dtype == torch.bfloat16
    with pytest.warns(UserWarning, match=SIXTEEN_BIT_IN_PLACE) if told else contextlib.nullcontext() as warned:
        optimizer = method(module, **(PGAP_OPTIONS if method is PGAP else {}))
    assert not told or [w.filename for w in warned] == [__file__]
    take_steps(optimizer, module, 2)
    if model in others:
        assert optimizer.mode == "inplace"
        with pytest.raises(
            ValueError, match=r"^mode: got 'scratch', but 'layer\.\w+' belongs to the \w+ 'layer', whose"
        ):
            method(module, mode="scratch")


@pytest.mark.parametrize("case", EVERY_MODE[1:])
def test_disabling_an_adapter_inside_the_closure(case):
    """As a DPO-like loss does: ``requires_grad_`` is no use of a weight."""
    model, model_in_place = seeded(adapted), seeded(adapted)
    losses = ([], [])
    optimizers = make(case, model), make(case, model_in_place, **in_place(case))
    for optimizer, m, seen in zip(optimizers, (model, model_in_place), losses, strict=True):

        def closure(m=m, seen=seen):
            with m.first.disable_adapter(), m.middle.disable_adapter():
                reference = loss_of(m)
            loss = F.softplus(loss_of(m) - reference)
            seen.append((reference.item(), loss.item()))
            return loss

        for _ in range(4):
            optimizer.step(closure)
        assert [p.requires_grad for p in m.parameters()] == [p.requires_grad for p in seeded(adapted).parameters()]
    assert torch.allclose(*(torch.tensor(seen) for seen in losses), atol=2e-6, rtol=0)
    assert len({reference for reference, _ in losses[0]}) == 1  # the adapters' perturbation is not in it


class Experts(nn.Module):
    """Some experts get no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        which, result = (x[:, 0] > 0).long(), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            result[which == i] = expert(x[which == i])
        return self.last(result)


@pytest.mark.parametrize("case", EVERY_MODE)
def test_a_layer_that_gets_no_rows(case):
    model = seeded(Experts)
    optimizer = make(case, model)
    take_steps(optimizer, model, 4)
    before = snapshot(model)
    take_steps(optimizer, model)
    optimizer.merge()
    assert {"experts.0.weight", "experts.2.weight"} <= {*changed(model, before)}


class Hooked:
    """What accelerate puts in place of a module's forward."""

    def __init__(self, module) -> None:
        self.forward = module.forward
        module.forward = self

    def __call__(self, *args):
        return self.forward(*args)


def test_layers_whose_forward_was_replaced_on_the_instance():
    model = seeded(Net)
    for layer in (model.first, model.middle, model.last):
        Hooked(layer)
    optimizer = PGAP(model, **PGAP_OPTIONS)
    assert optimizer.mode == "inplace" and "whose forward (replaced on this instance" in optimizer.mode_reason
    take_steps(optimizer, model)
    with pytest.raises(ValueError, match=r"^mode: got 'folded', but no .* whose forward \(replaced on this instance"):
        PGAP(model, mode="folded", **PGAP_OPTIONS)
    plain = seeded(Net)
    model.load_state_dict(plain.state_dict())
    for m in (model, plain):
        take_steps(make("mezo-scratch", m), m, 3)
    assert_same_weights(model, plain)


class Marked(nn.Parameter):
    """A subclass that adds nothing."""


@pytest.mark.parametrize("case", EVERY_MODE)
def test_parameters_of_a_subclass(case):
    model, plain = seeded(Net), seeded(Net)
    model.middle.weight = Marked(model.middle.weight.detach())
    for m in (model, plain):
        optimizer = make(case, m)
        take_steps(optimizer, m, 4)
        optimizer.merge()
    assert_same_weights(model, plain)


CHANGES = {  # of a model that has taken steps: the optimizer goes on with what it computes then
    "forward": lambda m: setattr(m.middle, "forward", lambda x: F.linear(x, 3 * m.middle.weight, m.middle.bias)),
    "class": lambda m: setattr(m.middle, "__class__", Tripled),
    "wrapped": lambda m: Hooked(m.middle),
    "unwrapped": lambda m: m.first.__dict__.pop("forward"),
    "hook": lambda m: m.middle.register_forward_hook(lambda module, args, y: 3 * y, prepend=True),
    "pre_hook": lambda m: m.middle.register_forward_pre_hook(lambda module, args: (3 * args[0],), prepend=True),
    "tied": lambda m: setattr(m.spare, "weight", m.middle.weight),
}


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Spared(Net):
    """With a layer whose weight is not trained, until it is one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(12, 12).requires_grad_(False)
        Hooked(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.spare(self.middle(torch.tanh(self.first(x))))))


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("case", ["mezo-scratch", "pgap-folded", "pgap-window"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_between_steps(change, case, members):
    losses = []
    for options in ({**in_place(case)}, {"members": members}):
        model = seeded(Spared)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = make(case, named, model=model, eps=1e-2, **options)
        copies = optimizer.members

        def closure(model=model, copies=copies):
            rows = F.cross_entropy(model(torch.cat([INPUTS] * copies)), torch.cat([LABELS] * copies), reduction="none")
            return rows if copies > 1 else rows.mean()

        for _ in range(4):
            optimizer.step(closure)
        CHANGES[change](model)
        optimizer.step(closure)
        losses.append(optimizer.last.losses)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and abs(losses[0][0] - losses[0][1]) > 1e-3


def test_a_replaced_forward_under_one_that_runs_slices():
    """Another optimizer still sees that it was replaced."""
    model = seeded(Net)
    model.middle.forward = lambda x: F.linear(x, 3 * model.middle.weight, model.middle.bias)
    optimizer = make("pgap-folded", model, members=2)
    optimizer.step(lambda: F.cross_entropy(model(INPUTS.repeat(2, 1)), LABELS.repeat(2), reduction="none"))
    assert "forward" in model.first.__dict__ and kind_of(model.first) == LINEAR
    assert kind_of(model.middle) is None


def test_forward_derivatives_in_a_closure():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what it imports for them
        torch.func.jvp(torch.sin, (INPUTS,), (INPUTS,))
    losses = []
    for mode in ("inplace", "scratch"):
        model = seeded(Net)
        optimizer = make("mezo-scratch", model, eps=1e-2, mode=mode)
        optimizer.step(lambda model=model: torch.func.jvp(model, (INPUTS,), (INPUTS,))[1].square().mean())
        losses.append(optimizer.last.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][1]
