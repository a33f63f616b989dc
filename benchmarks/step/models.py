"""The models that ``benchmarks.step`` takes steps on, with batches of random tokens of one length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgap_kernels.finetune import layers, models
from pgap_kernels.finetune.scoring import Encoded, Scorer

BATCH = 16  # sentences
LABEL_TOKENS = (3, 4)


class Workload:
    """A model whose linear layers are tuned. Tokens are random: what they say costs no time."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.name = name
        with torch.device(device):
            self.model = MODELS[name](dtype).eval().to(device)
        layers.choose(self.model, ["linear"])
        for parameter in self.model.parameters():  # in memory, rather than where a file is mapped
            parameter.data = parameter.data.clone()

    def fork(self) -> Any:
        """Modules of one's own over the same parameters: hooks stay apart, and memory is taken once."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def batch(self, tokens: int, step: int) -> Encoded:
        """The sentences of a step, each of so many tokens."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self.model.config.vocab_size, (BATCH, tokens), generator=generator)
        labels = torch.randint(2, (BATCH,), generator=generator)
        ids, labels = ids.to(self.model.device), labels.to(self.model.device)
        return Encoded({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)


def loss_of(model: Any) -> Callable[[Encoded], Tensor]:
    """The loss by which a model is fine-tuned (pgap_kernels.finetune)."""
    return Scorer(model, LABEL_TOKENS, pad_token=0).loss


def _smollm2(dtype: torch.dtype) -> Any:
    return models.load("default", dtype, torch.device("cpu"))[0]


def _opt(dtype: torch.dtype, hidden: int, heads: int, layers: int, vocabulary: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
    )
    return OPTForCausalLM(config).to(dtype)


def _opt13b(dtype: torch.dtype) -> Any:
    """One decoder layer with OPT-13B's shapes, at random; its vocabulary is small, so that the layer is the model."""
    return _opt(dtype, hidden=5120, heads=40, layers=1, vocabulary=512)


def _opt1_3b(dtype: torch.dtype) -> Any:
    """OPT-1.3B's shapes, at random."""
    return _opt(dtype, hidden=2048, heads=32, layers=24, vocabulary=50272)


def _tiny(dtype: torch.dtype) -> Any:
    """Two small layers at random, to try a command out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


MODELS: dict[str, Callable[[torch.dtype], Any]] = {
    "smollm2": _smollm2,
    "opt13b": _opt13b,
    "opt1.3b": _opt1_3b,
    "tiny": _tiny,
}
