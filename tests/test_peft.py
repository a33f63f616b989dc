"""Adapters of PEFT: every type in every mode, or refused at construction; whoever reads adapters finds them whole."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from support.trainer_tiny import digest, examples, model_of, trainer_of

from pgap_kernels.optim import make_optimizer

BATCH = {"input_ids": torch.arange(10).view(1, 10) + 5, "attention_mask": torch.ones(1, 10, dtype=torch.long)}
BATCH["labels"] = BATCH["input_ids"]
Q, QV = ["q_proj"], ["q_proj", "v_proj"]
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": peft.LoraConfig(r=2, target_modules=QV, init_lora_weights=False),
    "lora all, dropout": peft.LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False, task_type="CAUSAL_LM"
    ),
    "rslora, bias": peft.LoraConfig(r=2, target_modules=QV, use_rslora=True, bias="lora_only", init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, target_modules=QV, use_dora=True, init_lora_weights=False),
    "modules to save": peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"], init_lora_weights=False),
    "lora on embeddings": peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
    "tokens": peft.LoraConfig(r=2, target_modules=Q, trainable_token_indices=[5, 6], init_lora_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=Q, init_weights=False),
    "loha": peft.LoHaConfig(r=2, target_modules=Q, init_weights=False),
    "lokr": peft.LoKrConfig(r=2, target_modules=Q, init_weights=False),
    "adalora": peft.AdaLoraConfig(init_r=2, target_modules=Q, total_step=100, init_lora_weights=False),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=Q, init_weights=False),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["lm_head"], init_weights=False),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prefix": peft.PrefixTuningConfig(**PROMPT),
    "prefix, projected": peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=8),
    "prompt": peft.PromptTuningConfig(**PROMPT),
    "p-tuning": peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),
}
# No weight of theirs is that of a linear layer or an embedding that is called.
NOT_FOLDED = {"lora on embeddings", "ia3", "loha", "lokr", "adalora", "boft", "oft"}


def adapted(name: str):
    torch.manual_seed(1)
    return peft.get_peft_model(model_of("llama"), CONFIGS[name]).eval()


def loss_of(model):
    return model(**BATCH).loss


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def optimizer_of(model, mode: str, **own):
    method = "pgap" if mode in ("folded", "auto") else "mezo"
    own = {"rank": 2, "probes": 2, **own} if method == "pgap" else own
    return make_optimizer(method, model, lr=1e-2, mode=mode, **own)


@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded", "auto"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_adapter_trains_or_is_refused(name, mode):
    model = adapted(name)
    if mode == "folded" and name in NOT_FOLDED:
        with pytest.raises(ValueError, match="mode: got 'folded', but no low-rank direction could be folded"):
            optimizer_of(model, mode)
        return
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = digest(model)
    optimizer = optimizer_of(model, mode)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
        assert optimizer.last.rho[0] != 0
    after = digest(model)
    assert {name for name in after if after[name] != before[name]} == trained


@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_all_modes_take_the_same_steps(mode):
    """Two of MeZO's, or of LOZO's where the mode is for low-rank methods, are those in place to rounding."""
    losses = []
    for tried in ("inplace", mode):
        model = adapted("lora all, dropout")
        optimizer = make_optimizer("lozo", model, lr=1e-2, rank=1, mode=tried)
        losses.append([optimizer.step(lambda model=model: loss_of(model)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def pending(name: str = "lora"):
    """A model and its optimizer in an open window."""
    model = adapted(name)
    optimizer = optimizer_of(model, "folded", merge="window", window=100)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model))
    assert optimizer.pending
    return model, optimizer


def weighted(model):
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    return model


def reloaded(model, folder):
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(model_of("llama"), folder).eval()


READERS = {
    "merge_and_unload": lambda model, folder: model.merge_and_unload(),
    "merge_adapter": lambda model, folder: (model.merge_adapter(), model)[1],
    "add_weighted_adapter": lambda model, folder: weighted(model),
    "save_pretrained": reloaded,
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_adapters_find_what_was_learnt(reader, tmp_path):
    model, optimizer = pending()
    shown = logits_of(model)
    found = logits_of(READERS[reader](model, tmp_path))
    assert (found - shown).abs().max() < 1e-5 and not optimizer.pending


def test_one_layer_may_be_merged_alone():
    model, optimizer = pending()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default")
    assert not optimizer.pending and torch.equal(before, layer.get_delta_weight("default"))


def test_a_detached_model_has_its_own_methods_again():
    model, optimizer = pending()
    optimizer.detach()
    assert not any("merge" in vars(module) or "unload" in vars(module) for module in model.modules())
    assert model.merge_and_unload() is not None


@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_a_closure_may_disable_the_adapter(mode):
    """As DPO's does, for the reference: it sees the base model, perturbed nowhere."""
    model = adapted("lora")
    optimizer = optimizer_of(model, mode)
    with model.disable_adapter():
        base = loss_of(model).item()
    seen = []

    def closure():
        policy = loss_of(model)
        with torch.no_grad(), model.disable_adapter():
            seen.append(loss_of(model).item())
        return policy - seen[-1]

    for _ in range(2):
        optimizer.step(closure)
    assert set(seen) == {base} and optimizer.last.rho[0] != 0


def test_only_the_active_adapter_is_trained():
    model = adapted("lora")
    model.add_adapter("other", CONFIGS["lora"])
    model.set_adapter("other")
    before = digest(model)
    optimizer = optimizer_of(model, "scratch")
    optimizer.step(lambda: loss_of(model))
    moved = {name for name, bits in digest(model).items() if bits != before[name]}
    assert moved and all(".other." in name for name in moved)
    model.set_adapter("default")
    before = digest(model)
    optimizer.step(lambda: loss_of(model))
    moved = {name for name, bits in digest(model).items() if bits != before[name]}
    assert moved and all(".default." in name for name in moved)


def test_a_merged_adapter_is_noticed():
    """In place nothing but the losses tells; with hooks the module that should be called is not."""
    model = adapted("lora")
    optimizer = optimizer_of(model, "inplace")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="no perturbation reaches the loss"):
        for _ in range(10):
            optimizer.step(lambda: loss_of(model))
    with pytest.raises(RuntimeError, match="were not perturbed, as the forward did not call the module"):
        optimizer_of(model, "scratch").step(lambda: loss_of(model))


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_adapters_on_a_sixteen_bit_base(mode):
    torch.manual_seed(1)
    model = peft.get_peft_model(model_of("llama").bfloat16(), CONFIGS["lora"]).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = optimizer_of(model, mode)
    optimizer.step(lambda: loss_of(model).float())
    assert optimizer.last.rho[0] != 0


def test_layers_that_accelerate_dispatches_fold(caplog):
    accelerate = pytest.importorskip("accelerate")
    losses = []
    for dispatched in (False, True):
        model = model_of("llama").eval()
        if dispatched:
            accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        with caplog.at_level(logging.INFO, logger="pgap_kernels"):
            optimizer = make_optimizer("pgap", model, lr=1e-2, rank=2, probes=2)
        assert optimizer.mode == "folded"
        losses.append([optimizer.step(lambda model=model: loss_of(model)) for _ in range(2)])
    assert losses[0] == losses[1]


# ---- in the Trainer -------------------------------------------------------------------------------------------------

#: p-tuning and projected prefixes are left out: PEFT saves what their encoders give, and not the encoders.
SAVED = ["lora", "lora all, dropout", "dora", "ia3", "prefix", "prompt", "modules to save"]


@pytest.mark.parametrize("name", SAVED)
def test_a_trainer_resumes_adapters_to_the_same_bits(name, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = trainer_of(folder=tmp_path, model=adapted(name), **options)
    whole.train()
    resumed = trainer_of(folder=tmp_path, model=adapted(name), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert digest(resumed.model) == digest(whole.model) and resumed.zo.steps == 4


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    trainer = trainer_of(
        folder=tmp_path, model=adapted("lora"), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, named={"eval_dataset": examples("llama", 8)},
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_a_rate_for_whole_models_is_said(caplog):
    for rate, said in ((None, 1), (1e-4, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="pgap_kernels"):
            trainer_of(model=adapted("lora"), learning_rate=rate, max_steps=1).train()
        assert sum("adapters usually need a larger one" in record.getMessage() for record in caplog.records) == said
