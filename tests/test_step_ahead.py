"""Loops that call ``step()`` themselves: a step is taken ahead; what it saw is in ``last``; accelerate's wrapper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pgap_kernels.optim import LastStep, NonFiniteLossError, Signal, make_optimizer

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def model_and_closure(scale: float = 1.0):
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    return model, lambda: model(X).square().mean() * scale


def test_a_step_ahead_is_the_next_step():
    weights = []
    for ahead in (False, True):
        model, closure = model_and_closure()
        optimizer = make_optimizer("mezo", model, lr=1e-2)
        scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(3):
            if ahead:
                loss = optimizer.step_ahead(closure)
                assert optimizer.is_ahead and optimizer.step() == loss == optimizer.last.loss
            else:
                optimizer.step(closure)
            assert not optimizer.is_ahead
            scheduler.step()
        assert optimizer.steps == 3
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_steps_ahead_do_not_pile_up():
    model, closure = model_and_closure()
    optimizer = make_optimizer("mezo", model)
    optimizer.step_ahead(closure)
    with pytest.raises(RuntimeError, match=r"step_ahead: called twice in a row; accepted: with step\(\) in between"):
        optimizer.step_ahead(closure)
    with pytest.raises(RuntimeError, match="step: got a closure, but step_ahead has taken this step already"):
        optimizer.step(closure)
    optimizer.step()
    with pytest.raises(TypeError, match=r"closure: got None; accepted: a function.*ZOTrainer"):
        optimizer.step()
    with pytest.raises(ValueError, match="one"):
        optimizer.step_ahead(lambda: (_ for _ in ()).throw(ValueError("one")))
    assert not optimizer.is_ahead and optimizer.steps == 1
    state = optimizer.state_dict()
    optimizer.step_ahead(closure)
    optimizer.load_state_dict(state)
    assert not optimizer.is_ahead and optimizer.steps == 1, "the step ahead was of another run"


def _pairs(losses):
    return zip(losses[::2], losses[1::2], strict=True)


@pytest.mark.parametrize("method, options, losses, slopes", [
    ("mezo", {}, 2, 1),
    ("mezo", {"probes": 3}, 6, 3),
    ("mezo", {"probes": 3, "baseline": "clean"}, 4, 3),
    ("mezo", {"probes": 3, "baseline": "loo"}, 3, 3),
    ("pgap", {"rank": 2, "probes": 2, "window": 2}, 6, 1),
    ("helene", {"batch_size": 8, "refresh_every": 2}, 2, 1),
    ("fzoo", {"probes": 3}, 4, 0),
])  # fmt: skip
def test_last_says_what_a_step_saw(method, options, losses, slopes):
    model, closure = model_and_closure()
    optimizer = make_optimizer(method, model, lr=1e-3, mode="inplace", **options)
    assert optimizer.last == LastStep() and math.isnan(optimizer.last.loss)
    seen = []
    loss = optimizer.step(lambda: seen.append(closure()) or seen[-1])
    last = optimizer.last
    assert last.loss == loss and last.losses == tuple(map(float, seen)) and len(seen) == losses
    assert len(last.rho) == slopes and last.signal == Signal() and not last.skipped
    assert last.refreshed == (method in ("pgap", "helene"))
    eps = optimizer.param_groups[0]["eps"]
    f = last.losses
    if options.get("baseline") == "clean":
        expected = [(tried - f[-1]) / eps for tried in f[:-1]]
    elif options.get("baseline") == "loo":
        expected = [(tried - (sum(f) - tried) / 2) / eps for tried in f]
    elif method != "fzoo":
        expected = [(plus - minus) / (2 * eps) for plus, minus in _pairs(f[-2 * slopes :])]
    else:
        expected = []
    assert last.rho == pytest.approx(expected, rel=1e-9)
    optimizer.step(closure)
    assert not optimizer.last.refreshed


def test_last_after_a_step_that_was_skipped():
    model, closure = model_and_closure(math.inf)
    optimizer = make_optimizer("mezo", model, on_nonfinite="skip")
    assert math.isnan(optimizer.step(closure))
    assert optimizer.last.skipped and optimizer.last.losses == (math.inf, math.inf) and optimizer.last.rho == ()
    optimizer = make_optimizer("mezo", model)
    with pytest.raises(NonFiniteLossError):
        optimizer.step(closure)
    assert optimizer.last == LastStep()


def test_a_base_and_what_derives_from_it_load_each_others_state():
    from pgap_kernels.optim import MeZO

    class Mine(MeZO):
        pass

    model, closure = model_and_closure()
    optimizer = make_optimizer("mezo", model)
    optimizer.step(closure)
    mine = Mine(model)
    mine.load_state_dict(optimizer.state_dict())
    assert mine.steps == 1


# ---- accelerate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator_of():
    accelerate = pytest.importorskip("accelerate")
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("method, options", [
    ("mezo", {"mode": "inplace"}),
    ("pgap", {"mode": "folded", "merge": "window", "rank": 2, "probes": 2}),
])  # fmt: skip
def test_accelerate_prepares_saves_and_loads(method, options, accelerator_of, tmp_path):
    results = []
    for resumed in (False, True):
        accelerator = accelerator_of()
        model, _ = model_and_closure()
        own = make_optimizer(method, model, lr=1e-2, **options)
        scheduler = LambdaLR(own, lambda step: 0.5**step)
        model, optimizer, scheduler = accelerator.prepare(model, own, scheduler)
        for step in range(4):
            if step == 2 and not resumed:
                accelerator.save_state(str(tmp_path), safe_serialization=False)
            if step < 2 and resumed:
                continue
            if step == 2 and resumed:
                accelerator.load_state(str(tmp_path))
                assert own.steps == 2
            optimizer.step(lambda model=model: model(X).square().mean())
            scheduler.step()
        own.merge()
        assert own.last.loss > 0  # the wrapper returns nothing
        results.append((model.weight.detach().clone(), own.param_groups[0]["lr"]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_accelerates_accumulation_is_refused(accelerator_of):
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    model, _ = model_and_closure()
    own = make_optimizer("mezo", model)
    model, optimizer = accelerator.prepare(model, own)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="accelerate accumulates 2 batches, of which it would see the last alone"):
        for _ in range(2):
            with accelerator.accumulate(model):
                optimizer.step(lambda: model(X).square().mean())
    assert torch.equal(model.weight, before) and own.steps == 0
    own.step(lambda: model(X).square().mean())  # by itself it may be called beside others that accumulate
    assert own.steps == 1
