"""Modules of every kind under the hooks of scratch and folded."""

from __future__ import annotations

import copy

import pytest
import torch
from support.contract import losses_of_points
from support.counted import UNIT
from support.finetune_tiny import tiny_model
from support.methods import ROWS, options_of
from support.models import INPUTS, LABELS, assert_clean, parameters_of, snapshot
from support.models import filled as filled_with
from torch import nn
from torch.nn import functional as F

ROW = {row.id: row for row in ROWS}
# Methods whose directions hang on no loss, so that runs in two modes have the same ones.
HOOKED = [("mezo-groups", "scratch"), ("lozo", "scratch"), ("lozo", "folded"), ("lozo", "window")]
ALL = [("mezo-groups", "inplace"), ("mezo-groups", "two_pass"), ("lozo", "inplace"), ("lozo", "two_pass"), *HOOKED]


def optimizer(id, mode, model, **options):
    """Of one group."""
    return ROW[id].make(model, **{**ROW[id].options, "lr": 1e-3, "eps": 0.01, **options_of(mode), **options})


def filled(model: nn.Module) -> nn.Module:
    return filled_with(model, 0.5)


def mlp() -> nn.Sequential:
    return filled(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)))


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(INPUTS.to(next(model.parameters()).dtype))[:, :4].float(), LABELS)


def losses_of(id, mode, model, loss=loss_of, steps=4, **options):
    """Every loss of some steps, and the weights afterwards."""
    parameters, opt = parameters_of(model), optimizer(id, mode, model, **options)
    seen = losses_of_points(opt)
    for _ in range(steps):
        opt.step(lambda: loss(model))
    opt.merge()
    assert_clean(parameters)
    return torch.tensor(seen, dtype=torch.float64), snapshot(model)


def both(id, mode, build, loss=loss_of, hooked=None, **options):
    """``losses_of`` in place and in another mode."""
    return [losses_of(id, m, build(), loss, **options, **more) for m, more in (("inplace", {}), (mode, hooked or {}))]


def rounding(model: nn.Module, loss=loss_of, unit: float = UNIT, roundings: int = 200) -> float:
    """How far rounding may move a loss from one mode to the other, to first order, by backpropagation in float64.

    Every element of a weight and every product in a layer is rounded at most so often: 64 products in a sum, 2 r + 10
    times in U Z V^T, at most 6 passes in each of 4 steps, what is no layer, twice for two modes, and as much again
    through the updates (a loss that is off by e moves the next by lr |dL/dD|^2 e / eps, under 0.1 e here).
    """
    twin, layers = copy.deepcopy(model).double(), []

    def keep(module, args, output):
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.requires_grad:
            output.retain_grad()
            layers.append((module, args, output))

    for module in twin.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)
    loss(twin).backward()
    total = sum((p.grad * (p.abs() + 0.1)).abs().sum() for p in twin.parameters() if p.grad is not None)
    for module, args, y in layers:
        reach = y.abs()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            with torch.no_grad():
                for p in module.parameters():
                    p.abs_()
                reach = type(module).forward(module, args[0].abs())
        total = total + (y.grad.abs() * reach).sum()
    return roundings * unit * total.item()


def close(left, right, bound) -> None:
    """Losses of two modes: their difference is rounding, and that is little beside what a direction does to them."""
    assert ((left - right).abs() <= bound).all()
    assert bound < 0.1 * (left[::2] - left[1::2]).abs().max()


def near(left, right, bound, lr=1e-3, eps=0.01) -> None:
    """Weights of two modes: rounded themselves, and moved by 4 steps' differences of losses; no |D| reaches 40."""
    for name, w in left.items():
        assert ((w - right[name]).abs() <= 200 * UNIT * (w.abs() + 1) + 4 * lr * 2 * bound / eps * 40).all(), name


class Shared(nn.Module):
    """One layer in two places, one called twice, parameters of a parent beside children, a branch that is not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6, 6))
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.inner = nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6))
        self.idle = nn.Linear(6, 6)
        filled(self)

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.again(self.inner(torch.tanh(self.first(x)))))
        return F.linear(x, self.gain)


@pytest.mark.parametrize("id, mode", HOOKED)
def test_shared_nested_and_repeated_modules(id, mode):
    options = {"exclude": ["gain"]} if id == "lozo" else {}
    runs = both(id, mode, Shared, hooked={"allow_unused": True}, **options)
    bound = rounding(Shared())
    close(runs[0][0], runs[1][0], bound)
    near(runs[0][1], runs[1][1], bound)


@pytest.mark.parametrize("id, mode", HOOKED)
def test_a_search_does_not_tell_what_a_fast_path_would(id, mode):
    """The first forward of a transformer of torch's is repeated: while somebody looks on it takes another path."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dtype=torch.float32)
    layer.self_attn.requires_grad_(False)
    model = filled(nn.Sequential(layer)).eval()
    opt, calls = optimizer(id, mode, model), []

    def closure():
        calls.append(len(torch.overrides._get_current_function_mode_stack()))
        return model(torch.ones(1, 3, 8)).square().mean()

    opt.step(closure)
    count = len(opt.last.losses)
    assert len(calls) == count + 1 and calls[0] > 0 and not any(calls[1:])


@pytest.mark.parametrize("id, mode", HOOKED)
def test_a_module_that_is_never_called_is_named(id, mode):
    model = Shared()
    parameters, opt = (
        parameters_of(model),
        optimizer(id, mode, model, **({"exclude": ["gain"]} if id == "lozo" else {})),
    )
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"^closure: 'idle\.weight' and 1 more were not perturbed.*allow_unused"):
        opt.step(lambda: loss_of(model))
    assert opt.steps == 0 and all(torch.equal(w, before[name]) for name, w in snapshot(model).items())
    assert_clean(parameters)


class Tied(nn.Module):
    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        filled(self)
        self.head.weight = nn.Parameter(self.embed.weight.data) if alias else self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(torch.arange(8) % 7)))


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("id, mode", HOOKED)
def test_tied_weights(id, mode, alias):
    theirs = losses_of(id, "inplace", Tied(False))
    ours = losses_of(id, mode, Tied(alias))
    close(ours[0], theirs[0], rounding(Tied(False)))
    if alias:
        assert torch.equal(ours[1]["head.weight"], ours[1]["embed.weight"])


class Position(nn.Module):
    """Gives its own parameter out, whole or a view of it, by itself or in a container."""

    def __init__(self, view: bool, bare: bool) -> None:
        super().__init__()
        self.table, self.view, self.bare = nn.Parameter(torch.zeros(9, 6)), view, bare

    def forward(self):
        rows = self.table[1:9] if self.view else self.table
        return rows if self.bare else {"rows": (rows,)}


class Positioned(nn.Module):
    def __init__(self, view: bool, bare: bool) -> None:
        super().__init__()
        self.position, self.inner, self.outer = Position(view, bare), nn.Linear(6, 20), nn.Linear(20, 4)
        filled(self)

    def forward(self, x):
        rows = self.position()
        rows = rows if self.position.bare else rows["rows"][0]
        hidden = torch.tanh(self.inner(x))  # overwrites the buffer
        return self.outer(hidden) + (rows if len(rows) == 8 else rows[1:])[:, :4]


@pytest.mark.parametrize("view, bare", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("id, mode", HOOKED)
def test_a_parameter_that_is_given_out_is_not_overwritten(id, mode, view, bare):
    options = {"exclude": ["position*"]} if id == "lozo" else {}
    plain, ours = both(id, mode, lambda: Positioned(view, bare), **options)
    close(plain[0], ours[0], rounding(Positioned(view, bare)))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("id, mode", HOOKED)
def test_parametrized_weights(id, mode):
    def build():
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        torch.nn.utils.parametrize.register_parametrization(model[2], "weight", Halved())
        return filled(model)

    options = {"exclude": ["*original"]} if id == "lozo" else {}
    plain, ours = both(id, mode, build, **options)
    close(plain[0], ours[0], rounding(build()))


# ---- models of transformers -----------------------------------------------------------------------------------------


def transformer(kind, folder, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model(folder, kind)).eval().to(dtype)


def language_loss(model):
    ids = torch.arange(24).view(4, 6) % 20
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models(kind, tmp_path):
    """GPT-2 has Conv1D layers, both tie their embeddings."""
    base = transformer(kind, tmp_path)
    bound = rounding(base, language_loss)
    for id, mode in HOOKED:
        plain, ours = both(id, mode, lambda: copy.deepcopy(base), language_loss)
        close(plain[0], ours[0], bound)


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_lora(mode, tmp_path):
    peft = pytest.importorskip("peft")

    def build():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(transformer("llama", tmp_path), config)

    plain, ours = both("lozo", mode, build, language_loss)
    close(plain[0], ours[0], rounding(build(), language_loss))


def test_save_pretrained_within_a_window(tmp_path):
    import transformers

    model = transformer("llama", tmp_path / "a")
    opt = optimizer("lozo", "window", model, window=10)
    opt.step(lambda: language_loss(model))
    seen = language_loss(model).item()
    assert opt.pending
    model.save_pretrained(tmp_path / "b")
    assert not opt.pending
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert language_loss(again).item() == pytest.approx(seen, abs=rounding(again, language_loss))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


# ---- autocast, inference mode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("id, mode", ALL)
def test_autocast(id, mode):
    """The perturbations of float32 weights pass through a bfloat16 forward.

    Around the loop rather than in the closure, autocast keeps the casts of weights that it has seen.
    """

    def cast(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model)

    plain = losses_of(id, "inplace", mlp(), steps=7, eps=0.4)[0]
    within = losses_of(id, mode, mlp(), cast, steps=7, eps=0.4)
    close(plain, within[0], rounding(mlp(), unit=2**-9, roundings=3))  # x, W and y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = losses_of(id, mode, mlp(), steps=7, eps=0.4)
    assert torch.equal(within[0], around[0])
    assert all(torch.equal(w, around[1][name]) for name, w in within[1].items())


@pytest.mark.parametrize("id, mode", [("mezo-groups", "two_pass"), ("lozo", "window")])
def test_a_merge_under_autocast_is_seen(id, mode):
    model = mlp()
    opt = optimizer(id, mode, model, lr=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            opt.step(lambda: loss_of(model))
        model(INPUTS)  # casts the weights, and keeps the casts
        opt.merge()
        seen = model(INPUTS)
        torch.clear_autocast_cache()
        assert torch.equal(seen, model(INPUTS))


# ---- others' hooks and replaced forwards ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("id, mode", HOOKED)
def test_hooks_of_others_see_and_change_the_perturbed_output(id, mode, when):
    def hooked(model):
        model[0].register_forward_hook(lambda module, args, output: 3 * output)
        model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        return model

    runs = []
    for m in ("inplace", mode):
        model = hooked(mlp()) if when == "before" else mlp()
        opt = optimizer(id, m, model, eps=0.1)
        if when == "after":
            hooked(model)
        runs.append(losses_of_points(opt))
        for _ in range(3):
            opt.step(lambda model=model: loss_of(model))
    close(*map(torch.tensor, runs), rounding(hooked(mlp())))


@pytest.mark.parametrize("id, mode", HOOKED)
def test_a_replaced_forward_is_served_or_refused(id, mode):
    """accelerate and others put a ``forward`` into the instance."""

    def build():
        model = mlp()
        model[0].forward = lambda x: F.linear(x, 2 * model[0].weight, model[0].bias)
        return model

    try:
        plain, ours = both(id, mode, build, eps=0.1)
    except ValueError as error:
        assert mode == "folded" and str(error).startswith("mode: got 'folded', but 0.weight")
        return
    close(plain[0], ours[0], 2 * rounding(mlp()))  # its slope is that of twice the weight
