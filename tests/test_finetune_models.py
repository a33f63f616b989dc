"""Which models ``finetune`` takes, what of them it tunes, and what it says of those that it cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from support.finetune_tiny import csv_file, tiny_model
from support.tiny_families import tiny_folder

from pgap_kernels import cli
from pgap_kernels.finetune import Config, UserError, data, layers, models, padding, run
from pgap_kernels.finetune.scoring import Scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def config_for(tmp_path):
    table = str(csv_file(tmp_path / "data.csv"))

    def make(model, **given):
        given = {
            "method": "mezo", "steps": 3, "batch_size": 4, "train_size": 20, "dev_size": 8, "test_size": 8,
            "data": table, "output": str(tmp_path / "run"),
        } | given  # fmt: skip
        return Config(model=str(model), device="cpu", **given)

    return make


# ---- what is tuned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tune, wanted",
    [
        (["all"], lambda name: True),
        (["*q_proj*", "*layers.0.mlp*"], lambda name: "q_proj" in name or "layers.0.mlp" in name),
        (["linear"], lambda name: "proj" in name),
    ],
)
def test_layers_are_chosen_by_pattern(tune, wanted, llama):
    model, _, _ = models.load(str(llama), torch.float32, CPU)
    every = {name for name, _ in model.named_parameters()}
    assert layers.choose(model, tune).keys() == {name for name in every if wanted(name)}
    with pytest.raises(UserError, match=r"^--tune: '\*q_porj\*' matches no parameter; .*near it: .*q_proj"):
        layers.choose(model, ["*q_porj*"])
    with pytest.raises(
        UserError, match=r"^--tune: 'lm_head\*' matches 'lm_head.weight', which is tied; .*embed_tokens"
    ):
        layers.choose(model, ["lm_head*"])


def test_convolutions_are_no_stacks_of_matrices(tmp_path):
    model, _, _ = models.load(str(tiny_folder("mamba", tmp_path / "mamba")), torch.float32, CPU)
    assert not any("conv1d" in name for name in models.tuned_parameters(model))
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"^--lora-rank: no adapter can be put on this model"):
        models.load(str(tmp_path / "mamba"), torch.float32, CPU, lora_rank=2)


@pytest.mark.parametrize("method", ["mezo", "pgap"])
def test_experts_are_tuned_and_learn(method, config_for, tmp_path):
    folder = tiny_folder("mixtral", tmp_path / "mixtral")
    model, _, _ = models.load(str(folder), torch.float32, CPU)
    experts = [name for name in models.tuned_parameters(model) if "experts" in name]
    assert experts and all(model.get_parameter(name).dim() == 3 for name in experts)
    options = {"lr": 1e-2} | ({"rank": 4, "probes": 1, "window": 5} if method == "pgap" else {})
    assert run(config_for(folder, save_model=True, method=method, options=options))["status"] == "completed"
    after, _, _ = models.load(str(tmp_path / "run" / "model"), torch.float32, CPU)
    assert all(not torch.equal(model.get_parameter(name), after.get_parameter(name)) for name in experts)


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_what_gets_no_adapter_is_noted(tmp_path):
    pytest.importorskip("peft")
    folder = str(tiny_folder("mixtral", tmp_path / "mixtral"))
    notes = []
    models.load(folder, torch.float32, CPU, lora_rank=2, note=notes.append)
    assert len(notes) == 1 and re.match(r"--lora-rank: .* left as they are: .*experts", notes[0])
    models.load(folder, torch.float32, CPU, tune=["*q_proj*"], lora_rank=2, note=notes.append)
    assert len(notes) == 1, "all that was chosen has one"


def test_a_lora_adapter_is_begun_saved_and_gone_on_with(llama, config_for, tmp_path):
    pytest.importorskip("peft")
    first = run(config_for(llama, lora_rank=2, save_model=True, steps=5, options={"lr": 3e-2}))
    assert first["model"]["tuned_parameters"] < 0.2 * first["model"]["parameters"]
    assert first["test"]["after"]["loss"] != first["test"]["before"]["loss"]
    assert first["saved_model"]["reloaded_loss"] == pytest.approx(first["saved_model"]["loss"], rel=1e-6)
    files = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    written = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert Path(written["base_model_name_or_path"]).is_absolute(), "it loads from any folder"
    again = run(config_for(tmp_path / "run" / "model", output=str(tmp_path / "more"), options={"lr": 3e-2}))
    assert again["test"]["before"]["loss"] == pytest.approx(first["test"]["after"]["loss"], rel=1e-6)
    assert again["model"]["tuned_parameters"] == first["model"]["tuned_parameters"], "the base stays as it is"
    resumed = config_for(llama, lora_rank=2, steps=5, options={"lr": 3e-2}, output=str(tmp_path / "again"))
    assert run(resumed)["test"] == first["test"], "an adapter is drawn from the seed"


def test_an_adapter_that_cannot_be_used_is_refused(llama, tmp_path):
    pytest.importorskip("peft")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(llama)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for given, message in (
        ({}, r"^--model: the adapter .* does not fit|cannot"),
        ({"lora_rank": 4}, "^--lora-rank: got it with .* an adapter"),
        ({"tune": ["all"]}, "^--tune: got it with .* an adapter"),
    ):
        with pytest.raises(UserError, match=message):
            models.load(str(tmp_path), torch.float32, CPU, **given)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"^--model: the adapter .* does not name its model"):
        models.load(str(tmp_path), torch.float32, CPU)


# ---- refusals -------------------------------------------------------------------------------------------------------


def changed(llama, folder, change=None, **config):
    """A copy of a model with another configuration, and weights that ``change`` has changed."""
    shutil.copytree(llama, folder)
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(llama, tmp_path):
    folder = changed(llama, tmp_path / "m", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        models.load(str(folder), torch.float32, CPU)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights of .* are quantised; accepted"),
        ({"model_type": "t5"}, "is an encoder-decoder .t5."),
        ({"model_type": "vit"}, "is a vit, of which transformers has no language model"),
        ({"model_type": "no-such-thing"}, "^--model: cannot load .*no-such-thing"),
        ({"intermediate_size": 48}, "^--model: the weights of .* do not have the shapes of its config.json"),
    ],
)
def test_models_of_other_kinds_are_refused_in_a_line(config, message, llama, tmp_path):
    with pytest.raises(UserError, match=message) as found:
        models.load(str(changed(llama, tmp_path / "m", **config)), torch.float32, CPU)
    assert "\n" not in str(found.value)


def test_prompts_longer_than_the_positions_are_refused(llama, config_for, tmp_path):
    with pytest.raises(UserError, match=r"^--max-length: there are prompts of \d+ tokens .* the model has 4 positions"):
        run(config_for(changed(llama, tmp_path / "m", max_position_embeddings=4)))
    full = tiny_model(tmp_path / "gpt2", "gpt2")  # whose positions are embeddings: a 65th does not exist
    rows = "text,label\n" + "".join(f"{'good film ' * 40},{n % 2}\n" for n in range(80))
    (tmp_path / "long.csv").write_text(rows)
    config = config_for(full, data=str(tmp_path / "long.csv"), max_length=64, too_long="cut", steps=1)
    assert run(config)["status"] == "completed"


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, config_for, tmp_path):
    def smaller(weights):
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:10].clone()

    with pytest.raises(UserError, match=r"^--model: its tokenizer makes token \d+, .* embeddings for 10 tokens"):
        run(config_for(changed(llama, tmp_path / "m", smaller, vocab_size=10)))


def test_a_tokenizer_without_pad_and_end_serves(llama, config_for, tmp_path):
    folder = changed(llama, tmp_path / "m")
    written = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(written | {"pad_token": None, "eos_token": None}))
    assert run(config_for(folder))["test"] == run(config_for(llama, overwrite=True))["test"]


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused(config_for, tmp_path):
    folder = tiny_folder("bert", tmp_path / "bert")
    written = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(written | {"mask_token": None}))
    with pytest.raises(UserError, match=r"^--model: predicts masked tokens, but its tokenizer has no mask token"):
        run(config_for(folder))


def test_prompts_of_no_tokens_are_dropped(llama, config_for, tmp_path):
    tokenizer = models.load(str(llama), torch.float32, CPU)[1]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": n % 2}) + "\n" for n, t in
                                              enumerate(["\u200b ", "good film"] * 30)))  # fmt: skip
    config = config_for(llama, data=str(tmp_path / "a.jsonl"), template="{text}")
    tokens = tokenizer("\u200b")["input_ids"]
    dataset = data.load(config, tokenizer)
    assert sum(dataset.dropped.values()) == (0 if tokens else 30)


def test_a_model_that_mixes_its_batch_is_refused(llama, config_for):
    model, tokenizer, _ = models.load(str(llama), torch.float32, CPU)
    dataset = data.load(config_for(llama), tokenizer)
    model.model.norm.register_forward_hook(lambda module, given, found: found - found.mean(0, keepdim=True) / 2)
    with pytest.raises(UserError, match=r"^--model: .* depend on what else is in its batch"):
        padding.choose(Scorer(model, dataset.label_tokens, 1), dataset.train)


# ---- modes ----------------------------------------------------------------------------------------------------------


def test_auto_falls_back_to_a_mode_that_serves(llama, config_for, monkeypatch):
    """A layer that is called past its hooks: folded and scratch see that in the first forward, and refuse."""
    load = models.load

    def loaded(*given, **options):
        model, tokenizer, name = load(*given, **options)
        attention = model.model.layers[0].self_attn
        projection = attention.q_proj
        attention.q_proj.forward = lambda x: torch.nn.functional.linear(x, projection.weight * 1.0)
        hidden = model.model.layers[0].mlp
        hidden.forward = lambda x: hidden.down_proj(
            hidden.act_fn(torch.nn.functional.linear(x, hidden.gate_proj.weight)) * hidden.up_proj(x)
        )
        return model, tokenizer, name

    monkeypatch.setattr(models, "load", loaded)
    options = {"rank": 4, "probes": 1, "window": 5, "lr": 1e-2}
    result = run(config_for(llama, method="pgap", options=options))
    assert result["status"] == "completed" and result["mode"]["name"] == "inplace"
    assert any("cannot serve this model" in note for note in result["notes"])
    assert result["timing"]["steps"] == len(result["curves"]["train_loss"]) == 3
    more = {"method": "pgap", "options": options, "schedule": "constant", "checkpoint_every": 1, "steps": 3}
    run(config_for(llama, **more, keep_checkpoints=True, overwrite=True))
    resumed = run(config_for(llama, **more | {"steps": 5}, resume=True))
    assert resumed["status"] == "completed" and resumed["mode"]["name"] == "inplace"
    assert any("cannot serve this model" in note for note in resumed["notes"]), "of the session before"
    with pytest.raises(UserError, match=r"^--mode: "):
        run(config_for(llama, method="pgap", options=options, mode="scratch", overwrite=True))


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("pgap-kernels 0.")
