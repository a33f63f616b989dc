"""Tiny models and data for the tests of the Trainer."""

from __future__ import annotations

import tempfile

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from pgap_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments

WORDS, TOKENS = 64, 10
MODES = {
    "mezo-inplace": {"zo_method": "mezo", "zo_mode": "inplace"},
    "mezo-two-pass": {"zo_method": "mezo", "zo_mode": "inplace", "zo_two_pass": True},
    "mezo-scratch": {"zo_method": "mezo", "zo_mode": "scratch"},
    "pgap-inplace": {"zo_mode": "inplace"},
    "pgap-scratch": {"zo_mode": "scratch"},
    "pgap-window": {"zo_mode": "folded", "zo_merge": "window"},
}
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": WORDS}


def model_of(kind: str) -> nn.Module:
    """Two layers, the same weights every time, with dropout where the family has it."""
    torch.manual_seed(0)
    if kind == "opt":
        own = {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 32, "layerdrop": 0.0}
        return OPTForCausalLM(OPTConfig(**SMALL, **own))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=64, num_labels=3))
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=32))


def examples(kind: str, count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Random words; a class each for BERT, the words themselves as labels for language models, some of them masked."""
    made = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        words = torch.randint(5, WORDS, (TOKENS,), generator=made)
        labels = torch.tensor(index % 3) if kind == "bert" else words.clone()
        if kind != "bert":
            labels[: index % 4] = -100
        found.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return found


class InOrder(IterableDataset):
    """Examples in their order, so that a loop by hand sees the same batches."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def arguments(folder=None, **own) -> ZOTrainingArguments:
    """Six steps of two examples, with little said."""
    default = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", "seed": 3,
        "zo_window": 4, "zo_rank": 4, "zo_probes": 2,
    }  # fmt: skip
    if own.get("zo_method", "pgap") != "pgap":
        for name in ("zo_window", "zo_rank", "zo_probes"):
            del default[name]
    return ZOTrainingArguments(str(folder or tempfile.mkdtemp()), **{**default, **own})


def trainer_of(
    kind: str = "llama", folder=None, *, model=None, data=None, cls=ZOTrainer, named=None, **own
) -> ZOTrainer:
    """A trainer of a tiny model; ``own`` are its arguments, ``named`` those of its class."""
    rows = examples(kind) if data is None else data
    model = model_of(kind) if model is None else model
    return cls(model, arguments(folder, **own), train_dataset=rows, **(named or {}))


def digest(model: nn.Module) -> dict[str, bytes]:
    """All bits of a model's parameters."""
    return {name: p.detach().contiguous().numpy().tobytes() for name, p in model.named_parameters()}
