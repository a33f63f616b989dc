"""TRL's SFTTrainer with forward passes only; its DPOTrainer goes the same way.

python examples/trl_sft.py              about three minutes on two cores
python examples/trl_sft.py --use_peft   LoRA
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from pgap_kernels.finetune import models, records
from pgap_kernels.integrations.transformers import ZOArguments, ZOTrainerMixin


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):
    """SFT's arguments and those of the zeroth-order method."""


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """SFT's trainer with zeroth-order steps."""


@dataclass
class Own:
    model: str = "default"
    train_size: int = 1000
    use_peft: bool = False


def main(given=None):
    parser = HfArgumentParser((Own, ZOSFTConfig))
    parser.set_defaults(
        zo_method="mezo", learning_rate=5e-5, lr_scheduler_type="linear", max_steps=60, max_length=32, bf16=False,
        per_device_train_batch_size=16, logging_steps=10, save_strategy="no", output_dir="runs/trl_sft",
    )  # fmt: skip
    own, arguments = parser.parse_args_into_dataclasses(given)
    model, tokenizer, _ = models.load(own.model, torch.float32, torch.device("cpu"))
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.pad_token
    rows = [{"text": record["text"]} for record in records.read("default")[0][: own.train_size]]
    trainer = ZOSFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if own.use_peft else None,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{trainer.zo.method} in mode {trainer.zo.mode}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
