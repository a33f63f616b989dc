"""Kinds of faults that people report against optimizers and fine-tuning tools, one test for each, over its cases."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgap_kernels.optim import PGAP, MeZO, ZOOptimizer
from pgap_kernels.optim.helene import HELENE
from pgap_kernels.optim.lozo import LOZO
from pgap_kernels.optim.pizo import PIZO

pytestmark = pytest.mark.filterwarnings("error")

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


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


def distance(model: nn.Module, before: dict[str, Tensor]) -> float:
    return max((p.detach().float() - before[name].float()).abs().max().item() for name, p in model.named_parameters())


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
    "lozo-inplace": (LOZO, {"mode": "inplace", **LOZO_OPTIONS}),
    "lozo-folded": (LOZO, {"mode": "folded", **LOZO_OPTIONS}),
    "lozo-window": (LOZO, {"mode": "folded", "merge": "window", **LOZO_OPTIONS}),
    "helene-inplace": (HELENE, {"mode": "inplace", "batch_size": 16}),
    "helene-scratch": (HELENE, {"mode": "scratch", "batch_size": 16}),
    "pizo-inplace": (PIZO, {"mode": "inplace"}),
    "pizo-scratch": (PIZO, {"mode": "scratch"}),
}
HOOKED = [case for case, (_, options) in CASES.items() if options["mode"] != "inplace"]
PAIRABLE = ["mezo-scratch", "pgap-scratch", "pgap-folded", "pgap-window"]
every_case = pytest.mark.parametrize("case", CASES)
every_hooked_case = pytest.mark.parametrize("case", HOOKED)


def make(case: str, params, **options) -> ZOOptimizer:
    method, own = CASES[case]
    return method(params, **{"lr": 1e-2, **own, **options})


def take_steps(optimizer: ZOOptimizer, model: nn.Module, count: int = 1, loss=loss_of) -> None:
    for _ in range(count):
        optimizer.step(lambda: loss(model))


def refused(error, match: str, call) -> None:
    """The call raises, and raises once more if it is tried again."""
    for _ in range(2):
        with pytest.raises(error, match=match):
            call()


# ---- ambient state of torch -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


AMBIENT = {
    "inference_mode": torch.inference_mode,
    "grad_mode": torch.enable_grad,
    "device_context": lambda: torch.device("meta"),
    "default_device": lambda: setting(torch.set_default_device, "meta", None),
    "default_dtype_bf16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default_dtype_f64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


def run_of_all_calls(case: str, context, where: str):
    """Every public call in a run, some of them under an ambient state, and steps outside of it at the end."""

    def under(call: str):
        return context() if call in where else contextlib.nullcontext()

    model = seeded(Net)
    for last in (False, True):
        named = list(model.named_parameters())
        with under("make"):
            optimizer = make(case, named[:-2], model=model)
            optimizer.add_param_group({"params": named[-2:]})
            optimizer.mode = optimizer.mode
        if last:
            with under("read"):
                optimizer.load_state_dict(state)  # noqa: F821
        for _ in range(4):
            with under("step"):
                take_steps(optimizer, model)
        with under("read"):
            optimizer.cost()
            model.state_dict()
            state = optimizer.state_dict()  # noqa: F841
    take_steps(optimizer, model)
    return optimizer, model


@every_case
@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("where", ["step", "make read"])
def test_optimizing_under_an_ambient_state_of_torch(case, ambient, where):
    expected = snapshot(run_of_all_calls(case, contextlib.nullcontext, "")[1])
    optimizer, model = run_of_all_calls(case, AMBIENT[ambient], where)
    assert changed(model, expected) == []
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert not any(t.is_inference() or t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors)


def test_a_closure_sees_the_callers_default_device_and_dtype():
    model = seeded(Net)
    optimizer = make("mezo-inplace", model)
    seen = []

    def closure():
        seen.append((torch.zeros(1).device.type, torch.zeros(1, device="cpu").dtype))
        return F.cross_entropy(model(INPUTS), LABELS)

    with AMBIENT["default_device"](), AMBIENT["default_dtype_f64"]():
        optimizer.step(closure)
        assert torch.zeros(1).device.type == "meta"
    assert set(seen) == {("meta", torch.float64)}
