"""TRL's trainers with zeroth-order steps, by composition with the mixin."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import trl
from datasets import Dataset
from support.finetune_tiny import tiny_model
from support.trainer_tiny import digest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgap_kernels.integrations.transformers import ZOArguments, ZOTrainerMixin

pytestmark = pytest.mark.slow  # importing TRL takes longer than all else


@dataclass
class ZOSFTConfig(ZOArguments, trl.SFTConfig):
    pass


@dataclass
class ZOKTOConfig(ZOArguments, trl.KTOConfig):
    pass


@dataclass
class ZODPOConfig(ZOArguments, trl.DPOConfig):
    pass


class ZOSFTTrainer(ZOTrainerMixin, trl.SFTTrainer):
    pass


class ZOKTOTrainer(ZOTrainerMixin, trl.KTOTrainer):
    pass


class ZODPOTrainer(ZOTrainerMixin, trl.DPOTrainer):
    pass


SFT = [{"text": f"It was great film plot {'good' if i % 2 else 'bad'}"} for i in range(32)]
DPO = [{"prompt": "It was", "chosen": " great film", "rejected": " terrible plot"}] * 32
REFUSED = {"kto": (ZOKTOTrainer, ZOKTOConfig, DPO)}
KINDS = {"sft": (ZOSFTTrainer, ZOSFTConfig, SFT), "dpo": (ZODPOTrainer, ZODPOConfig, DPO)}
MODES = {
    "inplace": {"zo_method": "lozo", "zo_mode": "inplace", "zo_rank": 1},
    "scratch": {"zo_method": "lozo", "zo_mode": "scratch", "zo_rank": 1},
    "folded": {"zo_method": "lozo", "zo_mode": "folded", "zo_rank": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def trainer_of(folder, kind, lora=False, resume=None, **own):
    cls, config, rows = {**KINDS, **REFUSED}[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[UNK]"
    default = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "use_cpu": True,
               "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3, "bf16": False}  # fmt: skip
    output = own.pop("output", str(folder / "out"))
    arguments = config(output, **{**default, **own})
    adapter = None
    if lora:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = cls(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                  peft_config=adapter)  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_modes_take_the_same_steps(kind, lora, folder):
    """To rounding; also where TRL's fused head reads its weight outside the head's forward."""
    runs = [losses_of(trainer_of(folder, kind, lora, **options)) for options in MODES.values()]
    assert len(runs[0]) == 3 and runs[0] != [runs[0][0]] * 3
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=2e-5)


@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None},
], ids=["accumulation", "packing", "padding free"])  # fmt: skip
def test_options_of_sft(options, folder):
    assert len(losses_of(trainer_of(folder, "sft", **MODES["inplace"], **options))) == 3


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("sft", {"loss_type": "dft"}, r"^loss_type: got 'dft', of which a part is kept out of the gradient"),
    ("kto", {}, r"^loss_type: got 'kto'"),
    ("dpo", {"use_weighting": True}, r"^use_weighting: got True"),
    ("dpo", {"zo_members": 2, "zo_mode": "scratch"}, r"^zo_members, zo_groups: got a \w+ with a compute_loss"),
])  # fmt: skip
def test_losses_that_values_do_not_tell_are_refused(kind, options, message, folder):
    with pytest.raises(ValueError, match=message):
        trainer_of(folder, kind, **options)


def test_metrics_count_the_step_once(folder):
    two, six = (trainer_of(folder, "sft", zo_method="mezo", zo_probes=probes, zo_mode="scratch") for probes in (1, 3))
    first, second = ([entry for entry in t.state.log_history if "num_tokens" in entry] for t in (two, six))
    assert [entry["num_tokens"] for entry in first] == [entry["num_tokens"] for entry in second]
    assert first[0]["num_tokens"] == 4 * 7  # words of four sentences and their end
    assert first[0]["entropy"] > 0 and not any("eval_entropy" in entry for entry in two.state.log_history)


def test_sft_resumes_to_the_same_bits(folder, tmp_path):
    options = {**MODES["folded"], "output": str(tmp_path), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(folder, "sft", **options)
    resumed = trainer_of(folder, "sft", resume=str(tmp_path / "checkpoint-2"), **options)
    assert digest(resumed.model) == digest(whole.model)
