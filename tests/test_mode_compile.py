"""Compiled models: the same losses in every mode, one graph, no recompilation from step to step."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_contract import UNIT, snapshot
from test_modes import Losses, Words
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pgap_kernels.optim import PGAP, MeZO

STEPS, WINDOW = 12, 5  # refreshes at 0, 5 and 10
RUNS = [
    (MeZO, "inplace"),
    (MeZO, "two_pass"),
    (MeZO, "scratch"),
    (PGAP, "inplace"),
    (PGAP, "scratch"),
    (PGAP, "folded"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def optimizer(method, mode, model):
    own = {"probes": 2} if method is MeZO else {"rank": 3, "window": WINDOW, "probes": 2, "weight_decay": 0.5}
    chosen = {"mode": "inplace", "two_pass": True} if mode == "two_pass" else {"mode": mode}
    return method(model, lr=0.02, eps=0.02, seed=3, **own, **chosen)


def run(method, mode, how, backend, steps=STEPS):
    """Losses, weights and compilations so far of a run; ``how``: whether and when the model is compiled."""
    model = Words()
    called = model
    if how == "before":
        called = torch.compile(model, backend=backend, fullgraph=True)
        opt = optimizer(method, mode, called)
    else:
        opt = optimizer(method, mode, model)
        if how == "after":
            called = torch.compile(model, backend=backend, fullgraph=True)
        elif how == "method":
            model.compile(backend=backend, fullgraph=True)
    closure, counts = Losses(called), []
    for _ in range(steps):
        opt.step(closure)
        counts.append(getattr(backend, "frame_count", 0))
    opt.merge()
    return torch.tensor(closure.seen, dtype=torch.float64), snapshot(model), counts


@pytest.mark.parametrize(
    "method, mode, how",
    [(*run, "before") for run in RUNS] + [(*RUNS[i], how) for i in (2, 5) for how in ("after", "method")],
)
def test_eager_backend_gives_the_same_bits(method, mode, how):
    """Without a graph break, and with no compilation after every kind of step has been seen."""
    counter = CompileCounterWithBackend("eager")
    losses, weights, counts = run(method, mode, how, counter)
    plain, same, _ = run(method, mode, "not", None)
    assert torch.equal(losses, plain)
    assert all(torch.equal(w, same[name]) for name, w in weights.items())
    assert counts[-1] == counts[WINDOW]
    # Dense or in a subspace, with or without a decay in the window, before and after the first window; the very first
    # forward looks for weights that are used elsewhere, if it does not know that the model is compiled.
    assert counts[-1] <= {"inplace": 1, "two_pass": 1, "scratch": 2, "folded": 4}[mode] + (how == "after")


def test_inductor():
    """To rounding: sums of at most 11 products in five layers, in another order; losses of mean size 0.1."""
    losses, *_ = run(PGAP, "folded", "after", "inductor", steps=1)  # later losses follow the last bits of the first
    plain, *_ = run(PGAP, "folded", "not", None, steps=1)
    assert ((losses - plain).abs() <= 1000 * UNIT).all()
    assert (plain[::2] - plain[1::2]).abs().min() > 10_000 * UNIT


@pytest.mark.parametrize("method, mode", [(MeZO, "scratch"), (PGAP, "folded")])
def test_compiled_and_called_before_the_optimizer_was_made(method, mode):
    """Its graph has no hooks: an error, or another compilation with them, and never clean weights in silence."""
    model = Words()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        Losses(compiled)()
    opt, closure = optimizer(method, mode, model), Losses(compiled)
    before = snapshot(model)
    try:
        opt.step(closure)
    except RuntimeError as error:
        assert "compiled before the optimizer was made" in str(error)
        assert opt.steps == 0 and all(torch.equal(w, before[name]) for name, w in snapshot(model).items())
        return
    plain = Words()
    same = Losses(plain)
    optimizer(method, mode, plain).step(same)
    assert closure.seen == same.seen


@pytest.mark.parametrize("method, mode", [(MeZO, "scratch"), (PGAP, "folded")])
def test_modules_are_clean_after_a_failing_compiled_forward(method, mode):
    model = Words()
    parameters = {(m, name): p for m in model.modules() for name, p in m._parameters.items()}
    opt = optimizer(method, mode, model)
    compiled = torch.compile(model, backend="eager")
    opt.step(Losses(compiled))
    before = snapshot(model)

    def fails():
        Losses(compiled)()
        raise ValueError("deliberate")

    with pytest.raises(ValueError, match="deliberate"):
        opt.step(fails)
    assert all(m._parameters[name] is p for (m, name), p in parameters.items())
    if mode == "scratch":
        assert all(torch.equal(w, before[name]) for name, w in snapshot(model).items())


def test_pairs_of_compiled_models_are_served_or_refused():
    seen = []
    for compiled in (False, True):
        model = Words()
        opt = MeZO(model, lr=0.02, eps=0.02, seed=3, mode="scratch", paired=True)
        closure = Losses(torch.compile(model, backend="eager") if compiled else model, paired=True)
        try:
            opt.step(closure)
        except RuntimeError as error:
            assert compiled and "paired" in str(error) and opt.steps == 0
            return
        seen.append(closure.seen)
    assert seen[0] == seen[1]


def test_evaluation_of_a_compiled_model_within_a_window():
    model = Words()
    opt = optimizer(PGAP, "folded", model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        opt.step(Losses(compiled))
    assert opt.perturbation.pending
    with torch.no_grad():
        assert torch.equal(Losses(compiled)(), Losses(model)())
        opt.merge()
        assert torch.equal(Losses(compiled)(), Losses(model)())


# ---- CUDA graphs: what may be replayed -------------------------------------------------------------------------------


class Sequence(TorchDispatchMode):
    """The ops of a forward: which, with which arguments left out, and on which of the memory that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kept: list = []
        if "pgap_kernels" in str(func):
            begin, end = (2, 4) if "forward" in str(func) else (0, 3)  # weights and factors; cores may be copies
            for value in args[begin:end]:
                tensors = value if isinstance(value, (list, tuple)) else [value]
                kept += [t.data_ptr() for t in tensors if isinstance(t, Tensor)]
        self.seen.append((str(func), tuple(value is None for value in args), tuple(kept)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("method, mode", [(MeZO, "scratch"), (PGAP, "scratch"), (PGAP, "folded")])
def test_forwards_of_one_graph_key_are_one_graph(method, mode, paired, decay, loads):
    """Over windows, one of which stays open for a skipped step, and over a loaded state."""
    model = Words()
    own = {} if method is MeZO else {"rank": 3, "window": 3, "probes": 2}
    options = {"lr": 0.02, "eps": 0.02, "seed": 3, "mode": mode, "paired": paired, "weight_decay": decay}
    opt = method(model, on_nonfinite="skip", **own, **options)
    losses, graphs = Losses(model, paired), {}

    def closure():
        with Sequence() as ops:
            loss = losses()
        key = opt.perturbation.graph_key
        if opt.perturbation.verified:  # the very first forward looks for stray uses
            assert graphs.setdefault(key, ops.seen) == ops.seen
        return loss * (torch.nan if opt.steps == 5 else 1.0)

    for step in range(8):
        if loads and step == 4:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step(closure)
    assert opt.skipped == 1 and len(graphs) >= (1 if method is MeZO else 2)
