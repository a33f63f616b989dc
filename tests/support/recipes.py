"""Optimizers in every mode, and small models that they train: what the tests of faults run.

A fault of a mode needs one recipe in each mode (``EVERY_MODE``); a fault of a recipe, or of what the base class does
with its state, needs each recipe in one mode besides (``EVERY``).
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgap_kernels.optim import HELENE, LOZOM, PGAP, PIZO, DiZO, MeZO, ZOMuon, ZOOptimizer

INPUTS = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
LABELS = (INPUTS[:, 0] > 0).long()
ROWS = torch.arange(40).remainder(20)[torch.randperm(40, generator=torch.Generator().manual_seed(3))].view(8, 5)


class Net(nn.Module):
    """Matrices, vectors, and a layer that nobody folds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.middle = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.middle(torch.tanh(self.first(x)))))


class Tagger(nn.Module):
    """An embedding, a layer, and a head that may be tied to the embedding."""

    def __init__(self, tied: str = "", **embedding) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, **embedding)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied == "parameter":
            self.head.weight = self.words.weight
        elif tied == "memory":
            self.head.weight = nn.Parameter(self.words.weight.data)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.words(rows))))


def seeded(make, *args, **options) -> nn.Module:
    torch.manual_seed(1)
    return make(*args, **options)


def loss_of(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(INPUTS.to(dtype)).float(), LABELS)


def tagging_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(ROWS).flatten(0, 1).float(), ROWS.flatten())


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


def distance(model: nn.Module, before: dict[str, Tensor]) -> float:
    return max((p.detach().float() - before[name].float()).abs().max().item() for name, p in model.named_parameters())


DIZO_OPTIONS = {"select": ["*weight"], "kappa": 2, "iterations": 2}
PGAP_OPTIONS = {"rank": 2, "probes": 2, "window": 3}
LOZO_OPTIONS = {"beta": 0.9, "window": 3}
# Methods without state, with subspaces, with momentum of both kinds, with dense state, with a point that losses chose.
CASES = {
    "mezo-inplace": (MeZO, {"mode": "inplace"}),
    "mezo-two_pass": (MeZO, {"mode": "inplace", "two_pass": True}),
    "mezo-scratch": (MeZO, {"mode": "scratch"}),
    "pgap-inplace": (PGAP, {"mode": "inplace", **PGAP_OPTIONS}),
    "pgap-two_pass": (PGAP, {"mode": "inplace", "two_pass": True, **PGAP_OPTIONS}),
    "pgap-scratch": (PGAP, {"mode": "scratch", **PGAP_OPTIONS}),
    "pgap-folded": (PGAP, {"mode": "folded", **PGAP_OPTIONS}),
    "pgap-window": (PGAP, {"mode": "folded", "merge": "window", **PGAP_OPTIONS}),
    "lozo-inplace": (LOZOM, {"mode": "inplace", **LOZO_OPTIONS}),
    "lozo-window": (LOZOM, {"mode": "folded", "merge": "window", **LOZO_OPTIONS}),
    "helene-scratch": (HELENE, {"mode": "scratch", "batch_size": 16}),
    "dizo-scratch": (DiZO, {"mode": "scratch", **DIZO_OPTIONS}),
    "pizo-inplace": (PIZO, {"mode": "inplace"}),
    "zo-muon-folded": (ZOMuon, {"mode": "folded", "rank": 2, "window": 3, "directions": 2}),
}
EVERY_MODE = ["mezo-inplace", "pgap-two_pass", "helene-scratch", "pgap-folded", "lozo-window"]
EVERY = [*EVERY_MODE, "dizo-scratch", "pizo-inplace"]
DEFERRED = ["pgap-two_pass", "lozo-window"]  # those of them whose parameters are not the model between steps
HOOKED = ["helene-scratch", "pgap-folded", "lozo-window"]
PAIRABLE = ["mezo-scratch", "pgap-scratch", "pgap-folded", "pgap-window"]
SIXTEEN_BIT_IN_PLACE = r"^16-bit weights are perturbed in place"


def make(case: str, params, **options) -> ZOOptimizer:
    method, own = CASES[case]
    return method(params, **{"lr": 1e-2, **own, **options})


def in_place(case: str) -> dict:
    """Options with which a case is run in place instead, in three passes."""
    return {name: {"mode": "inplace", "merge": "step", "two_pass": False}[name]
            for name in CASES[case][1] if name in ("mode", "merge", "two_pass")}  # fmt: skip


def take_steps(optimizer: ZOOptimizer, model: nn.Module, count: int = 1, loss=loss_of) -> None:
    for _ in range(count):
        optimizer.step(lambda: loss(model))


def refused(error, match: str, call) -> None:
    """The call raises, and raises once more if it is tried again."""
    for _ in range(2):
        with pytest.raises(error, match=match):
            call()


@contextlib.contextmanager
def setting(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


class Bag(nn.Module):
    def __init__(self, kind, padding_idx: int) -> None:
        super().__init__()
        self.words = kind(20, 8, padding_idx=padding_idx)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.words.weight[padding_idx] = 0.7  # not 0: decay may not touch it either

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.words(rows)
        return self.head(hidden.mean(1) if hidden.dim() == 3 else hidden)


def bag_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(ROWS).float(), torch.arange(8) % 2)


class LoRA(nn.Module):
    """A frozen layer with an adapter, as PEFT makes them: factors in containers without a forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.disabled = base.requires_grad_(False), False
        n, m = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, m, bias=False)})
        self.scales = nn.ParameterDict({"default": nn.Parameter(torch.ones(m))})
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(m))])

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        if not self.disabled:
            adapted = self.lora_B["default"](self.lora_A["default"](x))
            result = result + adapted * self.scales["default"] + self.shifts[0]
        return result

    @contextlib.contextmanager
    def disable_adapter(self):
        self.disabled = True
        self.requires_grad_(False)
        yield
        self.disabled = False
        for part in (self.lora_A, self.lora_B, self.scales, self.shifts):
            part.requires_grad_(True)

    def merged(self) -> nn.Linear:
        """``merge_and_unload``."""
        layer = copy.deepcopy(self.base)
        delta = self.lora_B["default"].weight @ self.lora_A["default"].weight
        layer.weight.data += self.scales["default"][:, None] * delta
        layer.bias.data += self.shifts[0]
        return layer


def adapted() -> Net:
    model = Net().requires_grad_(False)
    model.first, model.middle = LoRA(model.first), LoRA(model.middle)
    return model
