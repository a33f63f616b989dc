"""The Trainer of transformers with forward passes only: SmolLM2-135M learns to tell good film reviews from bad ones.

    python examples/trainer.py                                          P-GAP: about three minutes on two cores
    python examples/trainer.py --zo_method mezo --learning_rate 1e-4    any method, any argument of the Trainer

Take your own model, tokenizer and data set instead of what `load` and `read` give, which work offline.
"""

import sys
from dataclasses import dataclass

import torch
from transformers import DataCollatorForSeq2Seq, HfArgumentParser

from pgap_kernels.finetune import models, records
from pgap_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments

WORDS = {"positive": " great", "negative": " terrible"}


@dataclass
class Own:
    model: str = "default"
    train_size: int = 1000
    eval_size: int = 200


def example(record, tokenizer):
    """A sentence and the word that should follow it, which alone counts."""
    words = tokenizer(f"{record['text']} It was", truncation=True, max_length=32)["input_ids"]
    answer = tokenizer(WORDS[record["label"]])["input_ids"]
    return {"input_ids": words + answer, "labels": [-100] * len(words) + answer}


def main(given=None):
    parser = HfArgumentParser((Own, ZOTrainingArguments))
    parser.set_defaults(
        per_device_train_batch_size=4, dataloader_drop_last=True, learning_rate=4.8e-4, lr_scheduler_type="linear",
        max_steps=80, logging_steps=10, eval_strategy="steps", eval_steps=40, save_strategy="no",
        output_dir="runs/trainer",
    )  # fmt: skip
    if "--zo_method" not in (sys.argv if given is None else given):
        # P-GAP with eight directions for each of four sentences, all in one forward.
        parser.set_defaults(zo_members=8, zo_groups=4, zo_directions=8, zo_baseline="loo", zo_rank=64)
    own, arguments = parser.parse_args_into_dataclasses(given)
    model, tokenizer, _ = models.load(own.model, torch.float32, torch.device("cpu"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [example(record, tokenizer) for record in records.read("default")[0]]
    train, rest = rows[: own.train_size], rows[own.train_size :][: own.eval_size]
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = ZOTrainer(model, arguments, train_dataset=train, eval_dataset=rest, data_collator=collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"{trainer.zo.method} in mode {trainer.zo.mode}: loss on other sentences {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
