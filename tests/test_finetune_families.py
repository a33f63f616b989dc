"""Every family of transformers that can be made tiny: its scores are right in padded batches, or it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from support.finetune_tiny import csv_file
from support.tiny_families import tiny_folder

from pgap_kernels.finetune import Config, UserError, data, models, padding
from pgap_kernels.finetune.scoring import scorer_of

#: By the way that prompts of different lengths go into their forwards (`pgap_kernels.finetune.scoring.PADDING`).
PADDED = """
    afmoe albert apertus arcee aria_text beam bert big_bird biogpt bitnet bloom codegen cohere cohere2
    cohere2_moe ctrl cwm deberta deberta-v2 deepseek_v4 diffllama distilbert doge dots1 electra ernie ernie4_5
    ernie4_5_moe eurobert exaone4 exaone_moe falcon falcon_mamba flex_olmo flint gemma gemma2 gemma3_text
    gemma4_unified_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj
    granite granite_swa granitemoe granitemoe_swa granitemoeshared gte helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jetmoe
    jina_embeddings_v3 kolibri1 laguna layoutlm lfm2 llama llama4_text mamba megatron-bert mellum mimo_v2_flash
    minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mobilebert modernbert
    modernbert-decoder moshi mpt nanochat nemotron nemotron_h nomic_bert olmo olmo2 olmo3 olmo_hybrid olmoe
    openai-gpt opt persimmon phi phi3 phimoe qwen2_moe qwen3 qwen3_moe rembert roformer seed_oss smollm3
    solar_open squeezebert stablelm starcoder2 tapas ultrabert vaultgemma xglm
""".split()  # noqa: SIM905
#: Their positions begin elsewhere.
MASKED = """
    camembert data2vec-text esm longformer mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl
""".split()  # noqa: SIM905
#: Their positions follow no mask, or they know none.
APART = """
    bart bigbird_pegasus blenderbot blenderbot-small convbert fnet funnel marian mbart mra mvp nystromformer
    pegasus plbart rwkv trocr whisper yoso
""".split()  # noqa: SIM905
REFUSED = {
    "bert-generation": "what follows a prompt",
    "prophetnet": "what follows a prompt",
    "xlm": "what follows a prompt",
    "xlnet": "what follows a prompt",
    "ibert": "no linear layers",
}
WAYS = {**dict.fromkeys(PADDED, "positions"), **dict.fromkeys(MASKED, "mask"), **dict.fromkeys(APART, "apart")}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return str(csv_file(tmp_path_factory.mktemp("data") / "data.csv"))


@pytest.mark.filterwarnings("ignore")  # of models, about themselves
@pytest.mark.parametrize("kind", [*WAYS, *REFUSED])
@torch.no_grad()
def test_a_familys_scores_are_right_or_it_is_refused(kind, table, tmp_path):
    folder = tiny_folder(kind, tmp_path)
    if folder is None:
        pytest.skip(f"this version of transformers has no {kind}")
    config = Config(
        model=str(folder), data=table, device="cpu", method="mezo", train_size=60, dev_size=20, test_size=20
    )
    try:
        model, tokenizer, _ = models.load(config.model, torch.float32, torch.device("cpu"))
        mask = tokenizer.mask_token if models.is_masked(model) else None
        if mask is not None:
            config = replace(config, template="{text} It was {mask} .")  # its tokenizer splits at white space alone
        dataset = data.load(config, tokenizer, mask)
        models.check_fits(model, dataset)
        scorer = scorer_of(model, tokenizer, dataset)
        note = padding.choose(scorer, dataset.train)
    except UserError as error:
        assert kind in REFUSED and REFUSED[kind] in str(error)
        return
    assert scorer.padding == WAYS[kind] and (note == padding.APART) == (kind in APART)
    examples = dataset.train[:16]
    together = scorer.logits(scorer.encode(examples))
    scorer.padding = "apart"  # as the model is meant to be called
    alone = torch.cat([scorer.logits(scorer.encode([example])) for example in examples])
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()
