"""Compiled models: the same losses in every mode, one graph, no recompilation from step to step."""

from __future__ import annotations

import copy

import pytest
import torch
from support.contract import build, losses_of_points
from support.counted import UNIT
from support.methods import ROWS, options_of
from support.models import IDS, Losses, Words, assert_clean, assert_same_weights, filled, parameters_of, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

ROW = {row.id: row for row in ROWS}
OPTIONS = {"lr": 0.02, "eps": 0.05}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """A layer of each kind, one matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.up_proj = nn.Linear(6, 11, bias=False)
        self.up_proj.weight = self.embed.weight
        filled(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up_proj(self.up(self.norm(self.embed(ids))))


def optimizer(id: str, mode: str, model):
    own = {"select": ["up.*"]} if id == "dizo" else {"weight_decay": 0.5}
    return ROW[id].make(model, **{**ROW[id].options, **OPTIONS, **own, **options_of(mode)})


def run(id: str, mode: str, how: str, backend, steps: int):
    """Losses, weights and compilations so far of a run; ``how``: whether and when the model is compiled."""
    model = Small()
    called = torch.compile(model, backend=backend, fullgraph=True) if how == "before" else model
    opt = optimizer(id, mode, called)
    if how == "after":
        called = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "method":
        model.compile(backend=backend, fullgraph=True)
    closure, losses, counts = Losses(called), losses_of_points(opt), []
    for _ in range(steps):
        opt.step(closure)
        counts.append(getattr(backend, "frame_count", 0))
    opt.merge()
    return losses, snapshot(model), counts


# Graphs: with and without a decay in a window, dense or low-rank, before and after the first window. Compiled after the
# optimizer was made, the very first forward, which looks for weights that are used elsewhere, may take one more.
@pytest.mark.parametrize(
    "id, mode, how, graphs",
    [
        ("mezo-3", "inplace", "before", 1),
        ("mezo-3", "two_pass", "before", 1),
        ("mezo-3", "scratch", "after", 2),
        ("helene", "scratch", "method", 1),
        ("dizo", "scratch", "before", 2),
        ("pgap", "scratch", "before", 2),
        ("lozo", "folded", "method", 2),
        ("pgap", "window", "before", 4),
        ("lozo", "window", "after", 5),
    ],
)
def test_eager_backend_gives_the_same_bits(id, mode, how, graphs):
    """Without a graph break, and with no compilation after every kind of step has been seen."""
    counter, period = CompileCounterWithBackend("eager"), ROW[id].period
    steps = 2 * period + 2
    losses, weights, counts = run(id, mode, how, counter, steps)
    plain, same, _ = run(id, mode, "not", None, steps)
    assert losses == plain
    assert_same_weights(weights, same)
    assert counts[-1] == counts[period + 1]
    assert counts[-1] <= graphs


@pytest.mark.slow
def test_inductor():
    """To rounding: sums of at most 11 products in four layers, in another order; losses of mean size 0.1."""
    losses, *_ = run("lozo", "folded", "after", "inductor", steps=1)  # later losses follow the last bits of the first
    plain, *_ = run("lozo", "folded", "not", None, steps=1)
    losses, plain = torch.tensor(losses, dtype=torch.float64), torch.tensor(plain, dtype=torch.float64)
    assert ((losses - plain).abs() <= 1000 * UNIT).all()
    assert (plain[::2] - plain[1::2]).abs().min() > 10_000 * UNIT


@pytest.mark.parametrize("id, mode", [("mezo-3", "scratch"), ("lozo", "folded")])
def test_compiled_and_called_before_the_optimizer_was_made(id, mode):
    """Its graph has no hooks; it is compiled once more."""
    model = Small()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        Losses(compiled)()
    opt = optimizer(id, mode, model)
    losses = losses_of_points(opt)
    opt.step(Losses(compiled))
    plain = Small()
    same = optimizer(id, mode, plain)
    wanted = losses_of_points(same)
    same.step(Losses(plain))
    assert losses == wanted


@pytest.mark.parametrize("id, mode", [("mezo-3", "scratch"), ("lozo", "folded")])
def test_parts_that_were_compiled_and_called_before(id, mode):
    """Those alone have no hooks; the rest of the model is called as ever."""
    model, plain = Small(), Small()
    model.up.compile(backend="eager")
    with torch.no_grad():
        Losses(model)()
    opt, same = optimizer(id, mode, model), optimizer(id, mode, plain)
    losses, wanted = losses_of_points(opt), losses_of_points(same)
    opt.step(Losses(model))
    same.step(Losses(plain))
    assert losses == wanted


def test_what_was_compiled_before_two_pass_sees_restored_weights():
    model = Small()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
    opt = optimizer("mezo-3", "two_pass", model)
    opt.step(Losses(compiled))
    assert opt.pending
    with torch.no_grad():
        seen = compiled(IDS)
        opt.merge()
        assert torch.equal(seen, model(IDS))


@pytest.mark.parametrize("mode", ["two_pass", "scratch"])
def test_a_replay_is_no_stale_compiled_code(mode, monkeypatch):
    """A CUDA graph calls no modules either, but what it runs is what was captured: it is not repeated."""
    model = Small()
    opt, losses, forwards = optimizer("mezo", mode, model), Losses(model), []
    monkeypatch.setattr(opt.perturbation, "on_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def step(run):
        before = len(forwards)
        opt.step(lambda: forwards.append(run()) or forwards[-1])
        return len(forwards) - before

    assert step(losses) >= 2 and step(losses) == 2

    def capture():
        losses()  # so that nothing is compiled or allocated for the first time in a capture
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            return losses()

    assert step(capture) == 2
    assert step(lambda: forwards[0]) == 2


@pytest.mark.parametrize("id, mode", [("mezo-3", "scratch"), ("lozo", "window")])
def test_modules_are_clean_after_a_failing_compiled_forward(id, mode):
    model = Small()
    parameters = parameters_of(model)
    opt = optimizer(id, mode, model)
    compiled = torch.compile(model, backend="eager")
    opt.step(Losses(compiled))
    before = snapshot(model)

    def fails():
        Losses(compiled)()
        raise ValueError("deliberate")

    with pytest.raises(ValueError, match="deliberate"):
        opt.step(fails)
    assert_clean(parameters)
    assert_same_weights(model, before)


def test_pairs_of_compiled_models_are_served_or_refused():
    seen = []
    for compiled in (False, True):
        model = Small()
        opt = optimizer("mezo-3", "scratch-stacked", model)
        losses = losses_of_points(opt)
        try:
            opt.step(Losses(torch.compile(model, backend="eager") if compiled else model, stacked=True))
        except RuntimeError as error:
            assert compiled and "members" in str(error) and opt.steps == 0
            return
        seen.append(losses)
    assert seen[0] == seen[1]


def test_evaluation_of_a_compiled_model_within_a_window():
    model = Small()
    opt = optimizer("lozo", "window", model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        opt.step(Losses(compiled))
    assert opt.pending
    with torch.no_grad():
        assert torch.equal(compiled(IDS), model(IDS))
        opt.merge()
        assert torch.equal(compiled(IDS), model(IDS))


def test_other_weights_within_a_window_are_evaluated_as_they_are():
    """Between steps, by functional_call: no update of this model belongs to them."""
    model = Small()
    opt = optimizer("lozo", "window", model)
    other = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    opt.step(Losses(model))
    assert opt.pending
    with torch.no_grad():
        seen = torch.func.functional_call(model, other, (IDS,), tie_weights=True)
        opt.detach()
        for name, p in model.named_parameters():
            p.copy_(other[name])
        assert torch.equal(seen, model(IDS))


# ---- CUDA graphs: what may be replayed -------------------------------------------------------------------------------


class Sequence(TorchDispatchMode):
    """The ops of a forward: which, with which arguments left out, and on which of the memory that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kept: list = []
        if "pgap_kernels" in str(func):
            # Weights, factors and anchors; cores, keys and coefficients may be copies.
            values = [args[0] if "perturb" in str(func) or "affine" in str(func) else []]
            values += [(kwargs or {}).get(name, []) for name in ("left", "right", "anchors", "deltas")]
            for value in values:
                tensors = value if isinstance(value, (list, tuple)) else [value]
                kept += [t.data_ptr() for t in tensors if isinstance(t, Tensor)]
        self.seen.append((str(func), tuple(value is None for value in args), tuple(kept)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize(
    "id, mode",
    [
        ("mezo-3", "scratch"),
        ("mezo-3", "scratch-stacked"),
        ("dizo", "scratch"),
        ("pgap", "scratch"),
        ("pgap", "folded"),
        ("pgap", "folded-stacked"),
        ("lozo-m", "window"),
        ("pgap", "window-stacked"),
    ],
)
def test_forwards_of_one_graph_key_are_one_graph(id, mode, loads):
    """Over windows, one of which stays open for a skipped step, and over a loaded state."""
    row = ROW[id]
    decay = {} if id == "dizo" else {"weight_decay": 0.5}
    _model, opt, losses = build(row, mode, Words(), on_nonfinite="skip", **decay)
    graphs: dict = {}

    def closure():
        with Sequence() as ops:
            loss = losses()
        if opt.steps:  # the first step tries the model out
            assert graphs.setdefault(opt.perturbation.graph_key, ops.seen) == ops.seen
        return loss * (torch.nan if opt.steps == 5 else 1.0)

    for step in range(row.period + 6):
        if loads and step == 4:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step(closure)
    assert opt.skipped == 1 and len(graphs) >= (1 if id == "mezo-3" else 2)
