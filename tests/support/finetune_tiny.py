"""A tiny random model with its tokenizer, and a tiny labelled data set, for the tests of ``finetune``."""

from __future__ import annotations

import csv
import random
from pathlib import Path

SPECIAL = ["[UNK]", "[PAD]", "It", "was", "great", "terrible"]
FILLERS = ["film", "plot", "cast", "the", "a", "and", "with", "of", "scene", "x", "very", "quite", "actor", "music"]
WORDS = [*SPECIAL, "good", "bad", *FILLERS]


def tiny_model(folder: Path, kind: str) -> Path:
    """Save a two-layer model of that kind with a word tokenizer in ``folder``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    size = len(WORDS)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                initializer_range=0.2,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        )
    model.save_pretrained(folder)
    return folder


def csv_file(path: Path, extra: list[tuple[str, int]] | None = None) -> Path:
    """Write 200 sentences whose label is given by the word good (1) or bad (0), and ``extra`` rows."""
    draw = random.Random(0)
    rows = []
    for index in range(200):
        words = draw.choices(FILLERS, k=draw.randint(2, 6))
        words.insert(draw.randint(0, len(words)), "good" if index % 2 else "bad")
        rows.append((" ".join(words), index % 2))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows, *(extra or [])])
    return path
