"""The examples run, learn, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pgap_kernels import draw, noise
from pgap_kernels.finetune import Config
from pgap_kernels.finetune.options import options_of
from pgap_kernels.noise import Role
from pgap_kernels.optim import registry

EXAMPLES = Path(__file__).parents[1] / "examples"


class EntryPoint(NamedTuple):
    """Of an installed package."""

    name: str
    value: type

    def load(self):
        return self.value


def run(name, as_program=True):
    """What an example leaves behind."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__" if as_program else name)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.iterdir()} - {"__pycache__"} == {
        "lightning_module", "lora", "own_method", "plain_trainer", "tasks", "trainer", "trl_sft",
    }  # fmt: skip


def test_the_method_of_ones_own_learns_and_says_so(capsys):
    left = run("own_method")
    assert left["loss"] < 0.5 * left["first"]
    out = capsys.readouterr().out
    assert f"{left['first']:.3f} -> {left['loss']:.3f}" in out and "forwards=9.0, weight_passes=9.0" in out


def test_the_method_of_ones_own_takes_the_step_of_its_equation():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 3), torch.randn(10, 6)
    names, before = zip(*((name, p.detach().double()) for name, p in model.named_parameters()), strict=True)
    ids = [noise.tensor_id(name) for name in names]

    def signs(i):
        key = noise.derive(0, 0, Role.DENSE, i)
        return [draw(w.shape, key, id, distribution="rademacher").double() for w, id in zip(before, ids, strict=True)]

    def loss(u, eps):
        weight, bias = (w + eps * s for w, s in zip(before, u, strict=True))
        return (x.double() @ weight.T + bias).square().mean()

    u = [signs(i) for i in range(4)]
    losses = torch.stack([loss(s, 0.1) for s in u])
    scores = (losses - loss(u[0], 0.0)) / losses.std(unbiased=False)
    run("own_method", as_program=False)["FZOO"](model, lr=1.0, eps=0.1, probes=4).step(lambda: model(x).square().mean())
    for i, (w, p) in enumerate(zip(before, model.parameters(), strict=True)):
        expected = w - sum(score * s[i] for score, s in zip(scores, u, strict=True)) / 4
        # Differences of float32 losses, which are a few percent of them, have four digits.
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_the_method_of_ones_own_has_its_options_on_the_command_line(monkeypatch):
    FZOO = run("own_method", as_program=False)["FZOO"]
    points = {"pgap_kernels.methods": [EntryPoint("own-fzoo", FZOO)]}
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    config = Config(method="own-fzoo", options={"probes": 2})
    assert config.make_optimizer(torch.nn.Linear(2, 2)).probes == 2 and config.options["lr"] == 5e-5
    assert {"lr": float, "probes": int}.items() <= {n: o.read for n, o in options_of("own-fzoo").items()}.items()


def test_the_plain_trainer_learns(capsys):
    left = run("plain_trainer")
    assert left["accuracy"] > 0.8 and f"accuracy {left['accuracy']:.2f}" in capsys.readouterr().out


@pytest.mark.model
@pytest.mark.slow(seconds=50)
def test_one_data_set_is_several_tasks(tmp_path, capsys):
    pytest.importorskip("transformers")
    main = run("tasks", as_program=False)["main"]
    short = ["--only", "choice", "generation", "--steps", "1", "--sizes", "20", "4", "4"]
    main(["--method", "mezo", *short, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    for task, metric in (("choice", "accuracy"), ("generation", "exact_match")):
        assert f"{task}: {{'loss': " in out and metric in out
        assert (tmp_path / task / "report.html").is_file()


@pytest.fixture
def tiny(tmp_path):
    """A tiny language model in a folder, with a word for every class."""
    pytest.importorskip("transformers")
    from support.finetune_tiny import tiny_model

    return str(tiny_model(tmp_path / "model", "llama"))


def short(example):
    """An example is read by whoever wants to see how it is done."""
    return len((EXAMPLES / f"{example}.py").read_text().splitlines()) <= 60


@pytest.mark.model
@pytest.mark.slow
def test_the_trainer(tiny, tmp_path):
    """Tokens have no words here but those of the classes: that these come next is what is learnt."""
    given = ["--model", tiny, "--output_dir", str(tmp_path), "--max_steps", "40", "--zo_rank", "8", "--use_cpu",
             "--report_to", "none", "--learning_rate", "3e-3"]  # fmt: skip
    before, after = run("trainer", as_program=False)["main"](given)
    assert after < 0.8 * before and short("trainer")


@pytest.mark.model
@pytest.mark.slow
def test_lora(tiny, tmp_path, capsys):
    pytest.importorskip("peft")
    options = ["--model", tiny, "--steps", "4", "--output", str(tmp_path / "adapter")]
    tuned, loaded = run("lora", as_program=False)["main"](options)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, loaded.eval()(ids).logits)
    assert "MeZO in mode inplace: loss" in capsys.readouterr().out and short("lora")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--use_peft"]])
def test_trl_sft(more, tiny, tmp_path):
    pytest.importorskip("trl")
    given = ["--model", tiny, "--output_dir", str(tmp_path), "--max_steps", "20", "--use_cpu", "--report_to", "none"]
    losses = run("trl_sft", as_program=False)["main"]([*given, *more])
    assert len(losses) == 2 and short("trl_sft")


@pytest.mark.slow
def test_the_lightning_module_learns():
    pytest.importorskip("lightning")
    assert run("lightning_module", as_program=False)["main"]() > 0.8 and short("lightning_module")
