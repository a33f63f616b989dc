"""Kinds of faults that people report against optimizers and fine-tuning tools, one test for each, over its cases."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as prune_module
from torch.testing._internal.two_tensor import TwoTensor

from pgap_kernels.optim import PGAP, MeZO, ZOOptimizer
from pgap_kernels.optim.dizo import DiZO
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


# ---- the weights change under the optimizer -------------------------------------------------------------------------


def fresh_run(case: str, steps: int, freeze, more: int, loss=loss_of) -> nn.Module:
    """As the run should have been: a new optimizer for the frozen model takes the state over."""
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model, steps, loss)
    state, copy = optimizer.state_dict(), seeded(Net)
    copy.load_state_dict(model.state_dict())
    freeze(copy)
    other = make(case, copy)
    other.load_state_dict(state)
    take_steps(other, copy, more, loss)
    other.merge()
    return copy


@every_case
@pytest.mark.parametrize("between", ["nothing", "load", "load_and_read", "read", "cost", "mode"])
def test_freezing_a_layer_between_steps(case, between):
    def freeze(model):
        model.first.requires_grad_(False)
        model.last.weight.requires_grad_(False)

    expected = snapshot(fresh_run(case, 4, freeze, 5))
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model, 4)
    state = optimizer.state_dict()
    freeze(model)
    before = snapshot(model)
    if between.startswith("load"):
        optimizer.load_state_dict(state)
    if between.endswith("read"):
        optimizer.weights()
        optimizer.state_dict()
    if between == "cost":
        optimizer.cost()
    if between == "mode":
        optimizer.mode = optimizer.mode
    take_steps(optimizer, model, 5)
    optimizer.merge()
    assert {*changed(model, before)} == {"middle.weight", "middle.bias", "norm.weight", "norm.bias", "last.bias"}
    assert changed(model, expected) == []


@every_case
def test_unfreezing_a_layer_between_steps(case):
    model = seeded(Net)
    model.first.requires_grad_(False)
    model.last.requires_grad_(False)
    optimizer = make(case, list(model.named_parameters()), model=model)
    take_steps(optimizer, model, 2)
    state = optimizer.state_dict()
    model.requires_grad_(True)
    before = snapshot(model)
    take_steps(optimizer, model)
    with torch.no_grad():  # evaluates what the parameters are, whichever layer runs first
        evaluated = loss_of(model)
        optimizer.merge()
        assert loss_of(model).item() == pytest.approx(evaluated.item(), abs=1e-6)
    assert len(changed(model, before)) == len(before)
    optimizer.load_state_dict(state)  # made when they were frozen
    take_steps(optimizer, model, 2)


@every_case
def test_freezing_everything(case):
    model = seeded(Net)
    optimizer = make(case, model)
    take_steps(optimizer, model)
    model.requires_grad_(False)
    refused(ValueError, r"^params: got no trainable parameter", lambda: take_steps(optimizer, model))
    model.requires_grad_(True)
    take_steps(optimizer, model)


SIXTEEN_BIT_IN_PLACE = r"^16-bit weights are perturbed in place"


@every_case
@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
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
    assert changed(model, before) == [] and model.first.weight.dtype == dtype


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
        assert changed(model, before) == [] or dtype == torch.float32


@every_case
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


@every_case
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


@every_case
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


@every_case
@pytest.mark.parametrize("how", REPLACING)
def test_replacing_a_parameter_of_the_model(case, how):
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


@every_case
@pytest.mark.parametrize("how", MOVING)
def test_moving_a_parameter_inside_the_model(case, how):
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
    assert changed(models[0], snapshot(models[1])) == []


# ---- numbers of other types, and what schedulers make of them -------------------------------------------------------

NUMBERS = {
    "int": 1,
    "np_float32": np.float32(1e-3),
    "np_float64": np.float64(1e-3),
    "np_int64": np.int64(1),
    "np_array": np.array(1e-3),
    "0_dim_tensor": torch.tensor(1e-3),
    "one_element": torch.tensor([1e-3]),
    "bf16_tensor": torch.tensor(1e-3, dtype=torch.bfloat16),
    "int_tensor": torch.tensor(1),
}


def as_python(value):
    return value.item() if hasattr(value, "item") else value


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "delta", "lr_dense", "eps_dense", "eps_probe"])
def test_giving_a_hyper_parameter_as_another_type_of_number(name, number):
    given, models = NUMBERS[number], [seeded(Net) for _ in range(2)]
    for model, value in zip(models, (given, as_python(given)), strict=True):
        optimizer = PGAP(model, mode="inplace", **{"lr": 1e-3, **PGAP_OPTIONS, name: value})
        take_steps(optimizer, model, 2)
        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        stream.seek(0)
        if number != "np_array":  # an array stays what it is, as a tensor does
            optimizer.load_state_dict(torch.load(stream, weights_only=True))
        take_steps(optimizer, model, 2)
    assert changed(models[0], snapshot(models[1])) == []


@pytest.mark.parametrize("number", [np.int64(2), np.int8(2), torch.tensor(2), np.array(2)], ids=repr)
@pytest.mark.parametrize(
    "case, name", [("pgap-folded", "rank"), ("pgap-scratch", "window"), ("mezo-inplace", "probes")]
)
def test_giving_a_count_as_another_type_of_number(case, name, number):
    models = [seeded(Net) for _ in range(2)]
    for model, value in zip(models, (number, 2), strict=True):
        take_steps(make(case, model, **{name: value}), model, 3)
    assert changed(models[0], snapshot(models[1])) == []


@pytest.mark.parametrize("name", ["beta1", "beta2", "gamma", "floor", "batch_size", "anneal_steps"])
@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_giving_a_momentum_as_another_type_of_number(name, kind):
    value = {"beta1": 0.5, "beta2": 0.5, "gamma": 2.0, "floor": 0.5, "batch_size": 4, "anneal_steps": 8.0}[name]
    given = np.int64(value) if name == "batch_size" and kind is np.float32 else kind(value)
    models = [seeded(Net) for _ in range(2)]
    for model, v in zip(models, (given, value), strict=True):
        take_steps(make("helene-inplace", model, **{name: v}), model, 3)
    assert changed(models[0], snapshot(models[1])) == []


schedulers = torch.optim.lr_scheduler
TABLE = np.linspace(1, 0.1, 10, dtype=np.float32)
SCHEDULES = {
    "lambda_of_numpy": lambda o: schedulers.LambdaLR(o, lambda step: TABLE[step]),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 2e-2, total_steps=10, cycle_momentum=False),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 3),
    "warmup": lambda o: schedulers.LinearLR(o),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("case", ["mezo-inplace", "mezo-two_pass", "pgap-folded", "pgap-window", "helene-scratch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor], ids=["float", "numpy", "tensor"])
def test_scheduling_the_learning_rate(case, schedule, kind):
    models = [seeded(Net) for _ in range(2)]
    optimizer = make(case, models[0], lr=kind(1e-2))
    by_hand = make(case, models[1], lr=float(kind(1e-2)))
    scheduler = SCHEDULES[schedule](optimizer)
    rates = []
    for _ in range(5):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        by_hand.param_groups[0]["lr"] = rates[-1]
        for o, model in ((optimizer, models[0]), (by_hand, models[1])):
            take_steps(o, model)
        scheduler.step()
    optimizer.merge()
    by_hand.merge()
    assert len({*rates}) > 1 and changed(models[0], snapshot(models[1])) == []
    copy = make(case, seeded(Net))
    copy.load_state_dict(optimizer.state_dict())
    assert float(copy.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])


BAD_NUMBERS = {
    "lr": [math.nan, math.inf, "1e-3", None, True, 1j, torch.ones(2), torch.ones((), device="meta")],
    "eps": [math.nan, 0, 0.0, -1e-3, "x", torch.tensor(0.0)],
    "weight_decay": [math.nan, None],
}


@every_case
@pytest.mark.parametrize(
    "name, value", [pytest.param(n, v, id=f"{n}-{v!r}") for n, vs in BAD_NUMBERS.items() for v in vs]
)
def test_scheduling_what_is_no_number(case, name, value):
    """Refused by its name before anything is perturbed, in the constructor as in a step."""
    with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: "):
        make(case, seeded(Net), **{name: value})
    model, calls = seeded(Net), []
    optimizer = make(case, model)
    take_steps(optimizer, model)
    before, good = snapshot(model), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    refused(ValueError, rf"^{name}: got .*; accepted: ", lambda: optimizer.step(lambda: calls.append(1)))
    assert not calls and changed(model, before) == []
    optimizer.param_groups[0][name] = good
    take_steps(optimizer, model)


# ---- patterns and names that match nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["", "parameter", "memory"])
@pytest.mark.parametrize("given", ["model", "named"])
def test_excluding_a_weight_by_any_of_its_names(tied, given):
    containers = list, tuple, set, dict.fromkeys, iter
    patterns = "*words*", "words.weight", "*head*", "head.weight", "?ead.*"
    for container, pattern in zip(containers, patterns, strict=True):
        model = seeded(Tagger, tied)
        named = list(model.named_parameters(remove_duplicate=False)) if tied == "memory" else None
        for method, options in ((PGAP, {"window": 2, "probes": 1}), (LOZO, {"window": 2})):
            params = model if given == "model" or named is None else named
            optimizer = method(params, rank=2, exclude=container([pattern]), **options)
            both = ["layer.weight"]
            one = ["layer.weight", "head.weight"] if "word" in pattern else ["words.weight", "layer.weight"]
            assert [w.name for w in optimizer.matrices()] == (both if tied else one)
            in_dry_run = optimizer.cost().state_bytes
            take_steps(optimizer, model, 2, tagging_loss)
            assert optimizer.cost().state_bytes == in_dry_run
            chosen = {w.name for w in optimizer.weights() if optimizer.state.get(w.tensor)}
            assert chosen == {w.name for w in optimizer.matrices()}


UNKNOWN_PATTERNS = {
    "head": r"'\*head\*' matches 'head\.weight'\)",
    "*HEAD*": r"'\*head\*' matches 'head\.weight'\)",
    "*wrods.weight": r"near names: '[a-z]+\.weight'",
    "nothing": r"(near names|names are like) ",
    "": r"names are like 'words\.weight'",
}


@pytest.mark.parametrize("pattern", UNKNOWN_PATTERNS)
def test_excluding_a_name_that_no_weight_has(pattern):
    near = UNKNOWN_PATTERNS[pattern]
    for tied in ("", "parameter"):
        model = seeded(Tagger, tied)
        for method, name, value in (
            (PGAP, "exclude", ["*words*", pattern]),
            (LOZO, "exclude", [pattern]),
            (DiZO, "select", [pattern]),
            (functools.partial(HELENE, batch_size=4), "floors", {pattern: 1.0}),
        ):
            with pytest.raises(ValueError, match=rf"^{name}: {re.escape(repr(pattern))} matches no parameter") as error:
                method(model, **{name: value})
            if tied == "":
                assert re.search(near, str(error.value))
            assert str(error.value).count("'head.weight'") <= 1 + (pattern == "head.weight")


def test_naming_a_parameter_that_is_not_there():
    with pytest.raises(ValueError, match=r"^tensor_ids: got 'first.wieght'; .*near names: 'first.weight'"):
        MeZO(seeded(Net), tensor_ids={"first.wieght": 3})
    with pytest.raises(TypeError, match=r"^exclude: got the string 'head'; accepted: a list"):
        PGAP(seeded(Tagger), exclude="head")
    with pytest.raises(TypeError, match=r"^exclude: got 3; accepted: name patterns"):
        PGAP(seeded(Tagger), exclude=[3])


def test_excluding_a_weight_that_is_frozen_for_now():
    model = seeded(Tagger)
    model.words.requires_grad_(False)
    optimizer = PGAP(model, rank=2, exclude=["words.*"], window=2)
    take_steps(optimizer, model, 1, tagging_loss)
    model.words.requires_grad_(True)
    take_steps(optimizer, model, 1, tagging_loss)
    assert [w.name for w in optimizer.matrices()] == ["layer.weight", "head.weight"]


# ---- elements that torch's training leaves alone --------------------------------------------------------------------


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


@every_case
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("padding_idx", [3, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_an_embedding(case, kind, padding_idx, dtype):
    model = seeded(Bag, kind, padding_idx).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SIXTEEN_BIT_IN_PLACE)
        optimizer = make(case, model, lr=1e-1, weight_decay=0.5)
    before, seen = snapshot(model), []
    if kind is nn.Embedding:
        padding = torch.full((1, 1), padding_idx % 20)
        model.words.register_forward_hook(lambda module, args, out: seen.append(out[args[0] == padding.item()]))
    take_steps(optimizer, model, 7, bag_loss)
    with torch.no_grad():
        bag_loss(model)  # reads an open window as well
    optimizer.merge()
    moved = (model.words.weight != before["words.weight"]).any(1)
    assert not moved[padding_idx] and moved.sum() == 19
    assert all((rows == before["words.weight"][padding_idx]).all() for rows in seen)
    expected = seeded(Bag, kind, padding_idx)  # torch's own
    loss = bag_loss(expected)
    loss.backward()
    assert not expected.words.weight.grad[padding_idx].any()


@every_case
@pytest.mark.parametrize("tied", ["parameter", "memory"])
def test_padding_an_embedding_that_is_the_head_too(case, tied):
    """As in torch, whose gradient of the row then comes from the head."""
    model = seeded(Tagger, tied, padding_idx=4)
    optimizer = make(case, model)
    before = snapshot(model)
    take_steps(optimizer, model, 3, tagging_loss)
    optimizer.merge()
    assert (model.words.weight != before["words.weight"]).any(1).all()
    tagging_loss(model).backward()
    gradient = model.head.weight.grad
    assert gradient[4].any()


def test_padding_an_embedding_with_a_residual_plane():
    model = seeded(Bag, nn.Embedding, 3).bfloat16()
    optimizer = MeZO(model, lr=1e-2, weight_decay=0.5, mode="scratch", residual=True)
    before = snapshot(model)
    take_steps(optimizer, model, 5, bag_loss)
    assert torch.equal(model.words.weight[3], before["words.weight"][3])
    assert not optimizer.perturbation.residual.planes["words.weight"][3].any()


# ---- buffers --------------------------------------------------------------------------------------------------------

BIG = 1 << 19  # elements: more bytes than are copied on suspicion


class Buffered(nn.Module):
    """A layer beside a buffer that each forward changes in some way; keeps what the forwards began with."""

    def __init__(self, change, size: int = 8, made=torch.zeros) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.change, self.began = change, []
        self.register_buffer("state", made(size) if size else None)

    def forward(self, x: Tensor) -> Tensor:
        begin = (0.0, 0) if self.state is None else (self.state.view(-1)[0].item(), self.state._version > 0)
        self.began.append((begin[0], torch.rand(1).item()))
        self.change(self, x)
        return self.layer(x) + (0 if self.state is None else self.state.view(-1)[0])


def add_in_place(module, x):
    module.state += 1


def add_past_the_version_counter(module, x):
    module.state.data.add_(1)


def add_by_view(module, x):
    module.state[:3] += 1


def replace(module, x):
    module.state = module.state + 1


def make_on_demand(module, x):
    if module.state is None:
        module.state = torch.randn(8)


def register_on_demand(module, x):
    if "late" not in module._buffers:
        module.register_buffer("late", torch.randn(8))
    module.began[-1] += (module.late[0].item(),)


def only_in_training(module, x):
    if module.training:
        module.state.data.add_(1)


CHANGES = {f.__name__: f for f in (add_in_place, add_past_the_version_counter, add_by_view, replace, only_in_training)}
BUFFER_CASES = ["mezo-inplace", "mezo-two_pass", "mezo-scratch", "pgap-folded", "pgap-window", "pizo-inplace"]


@pytest.mark.parametrize("case", BUFFER_CASES)
@pytest.mark.parametrize("size", [8, BIG], ids=["small", "big"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_buffer_that_every_forward_changes(case, change, size):
    """Moving statistics, codebooks: all forwards of a step begin with one state, and the last one's stays."""
    model = seeded(Buffered, CHANGES[change], size)
    if change == "only_in_training":
        model.eval()
    optimizer = make(case, model)
    calls = []
    for step in range(4):
        if step == 2:
            model.train()
        model.began.clear()
        take_steps(optimizer, model)
        assert len({*model.began[-2:]}) == 1 and len({*model.began[1:]}) == 1
        calls.append(len(model.began))
        changes = change != "only_in_training" or step >= 2
        assert model.state.view(-1)[0].item() == model.began[-1][0] + changes
    learnt = size == BIG and change != "replace"  # with one forward more, the first time
    assert calls[0] - calls[1] >= learnt * (change != "only_in_training") or case.startswith("pgap")
    assert model.state.view(-1)[0].item() == (4 if change != "only_in_training" else 2) + learnt


@pytest.mark.parametrize("case", BUFFER_CASES)
@pytest.mark.parametrize("change", [make_on_demand, register_on_demand])
def test_a_buffer_that_the_first_forward_makes(case, change):
    model = seeded(Buffered, change, 0 if change is make_on_demand else 8)
    optimizer = make(case, model)
    for step in range(3):
        model.began.clear()
        take_steps(optimizer, model)
        assert len({*model.began[step == 0 :]}) == 1


@pytest.mark.parametrize("case", BUFFER_CASES)
def test_batch_norm_in_training(case):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    means = []
    model[1].register_forward_pre_hook(lambda module, args: means.append(module.running_mean.clone()))
    optimizer = make(case, model)
    for _ in range(3):
        means.clear()
        take_steps(optimizer, model)
        assert all(map(torch.equal, means, means[1:]))
    assert model[1].num_batches_tracked == 3 and model[1].running_mean.any()


def peak_of(call) -> int:
    """The largest piece of memory that a call asks torch for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("case", BUFFER_CASES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.bool])
def test_a_large_buffer_that_no_forward_changes(case, dtype):
    """Packed weights of quantised models: no copy, not even once, and no forward more."""
    model = seeded(Buffered, lambda module, x: None, 64 * BIG, lambda size: torch.ones(size, dtype=dtype))
    optimizer = make(case, model)
    assert peak_of(lambda: take_steps(optimizer, model)) < model.state.nbytes
    model.began.clear()
    take_steps(optimizer, model)
    assert len(model.began) == {"pizo-inplace": 6}.get(case, 2)


UNUSUAL = {
    "expanded": lambda size: torch.ones(1, 1).expand(4, size),
    "inference": torch.inference_mode()(torch.ones),
    "meta": lambda size: torch.ones(size, device="meta"),
    "sparse": lambda size: torch.ones(size).to_sparse(),
    "wrapping": lambda size: TwoTensor(torch.ones(size), torch.ones(size)),
    "float64": lambda size: torch.ones(size, dtype=torch.float64),
    "empty": lambda size: torch.ones(0),
    "scalar": lambda size: torch.ones(()),
    "transposed": lambda size: torch.ones(size // 8, 8).T,
}


@pytest.mark.parametrize("case", BUFFER_CASES)
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("size", [8, BIG])
def test_a_buffer_of_an_unusual_kind(case, kind, size):
    model = seeded(Net)
    model.register_buffer("unusual", UNUSUAL[kind](size))
    take_steps(make(case, model), model, 2)
    plain = seeded(Net)
    take_steps(make(case, plain), plain, 2)
    assert [n for n, p in plain.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])] == []


@pytest.mark.parametrize("case", BUFFER_CASES)
@pytest.mark.parametrize("size", [8, BIG])
def test_inference_mode_around_everything(case, size):
    """The model, its buffers, its forwards: "forward passes only"."""
    with torch.inference_mode():
        model = seeded(Buffered, lambda module, x: module.state.add_(1), size)
        model.forward = functools.partial(_forward_without_version, model)
        optimizer = make(case, model)
        for _ in range(3):
            model.began.clear()
            take_steps(optimizer, model)
            assert len({*model.began[-2:]}) == 1
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.merge()


def _forward_without_version(model, x):
    model.began.append((model.state[0].item(), torch.rand(1).item()))
    model.change(model, x)
    return model.layer(x)


class TiedByHand(nn.Module):
    """A buffer that is a view of the weight, or of a part of it."""

    def __init__(self, part=slice(None)) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.register_buffer("head", self.words.weight.detach()[part])

    def forward(self, rows: Tensor) -> Tensor:
        return self.words(rows) @ self.head.T


@pytest.mark.parametrize("part", [slice(None), slice(0, 10), slice(5, 15), slice(3, 5)])
@every_case
def test_a_buffer_that_is_a_view_of_a_weight(case, part):
    model = seeded(TiedByHand, part)
    size = len(model.head)
    optimizer = make(case, model, lr=0.0)
    before = snapshot(model)
    rows = torch.arange(20)

    def step():
        optimizer.step(lambda: F.cross_entropy(model(rows), rows % size))

    if optimizer.mode != "inplace":
        refused(RuntimeError, r"^closure: 'words\.weight' is used by \w+ outside the forward of the module", step)
        assert changed(model, before) == []
        return
    for _ in range(50):
        step()
    optimizer.merge()
    assert distance(model, before) < 1e-5
    assert model.head.data_ptr() == model.words.weight[part].data_ptr()


def test_a_buffer_in_the_same_storage_as_a_weight():
    """All of a model in one flat tensor: what is not the weights' is put back."""
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
        assert torch.equal(*means) and model[1].running_mean.any()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_rescales_its_weight_in_the_forward(kind):
    def rescaled():
        model = Bag(functools.partial(kind, max_norm=1.0), 3)
        bag_loss(model)
        return model

    message = r"^mode: got 'inplace', but 'words\.weight' belongs to .* with max_norm=1\.0, whose forward rescales"
    for case in ("mezo-inplace", "mezo-two_pass", "pgap-inplace"):
        with pytest.raises(ValueError, match=message):
            make(case, seeded(rescaled))
    for method, options in ((MeZO, {}), (PGAP, PGAP_OPTIONS)):
        model = seeded(rescaled)
        optimizer = method(model, lr=0.0, **options)
        before = snapshot(model)
        take_steps(optimizer, model, 10, bag_loss)
        assert optimizer.mode == {MeZO: "scratch", PGAP: "folded"}[method] and changed(model, before) == []
    model = seeded(rescaled)
    model.words.requires_grad_(False)
    take_steps(make("mezo-inplace", model), model, 1, bag_loss)
