"""A tiny random model of every family of transformers that can be made small by its configuration's common names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .finetune_tiny import WORDS

VOCABULARY = 64

#: Sizes by the names that configurations give them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "n_embed", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim",
                     "d_ff", "moe_intermediate_size", "shared_expert_intermediate_size", "dff", "hidden_dim",
                     "expert_ffn_hidden_size", "ffn_hidden_size", "shared_intermediate_size", "block_ff_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "kv_channels"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "vocab_size": VOCABULARY, "attention_hidden_size": 32, "rotary_dim": 4, "lru_width": 32, "qk_head_dim": 16,
    "word_embed_proj_dim": 32, "time_step_rank": 4, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    "initializer_range": 0.2, "init_std": 0.2, "type_vocab_size": 2,
}  # fmt: skip

SPECIAL = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "mask_token": "[MASK]",
}


def tiny_folder(kind: str, folder: Path) -> Path | None:
    """Save a tiny model of a family with a word tokenizer; None if transformers does not have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if kind not in CONFIG_MAPPING:
        return None
    known = CONFIG_MAPPING[kind]().to_dict()
    config = CONFIG_MAPPING[kind](**{name: value for name, value in SIZES.items() if name in known})
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind, "").endswith("ForMaskedLM")
    torch.manual_seed(0)
    (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config).save_pretrained(folder)
    words = [*SPECIAL.values(), ".", *WORDS[2:]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return folder
