"""LoRA with forward passes only: MeZO moves the adapter's weights, and the base model is only read.

    python examples/lora.py                     about two minutes on two cores
    python examples/lora.py --method pgap --rank 16

The adapter alone is saved, to runs/lora.
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from pgap_kernels.finetune import models, records
from pgap_kernels.optim import make_optimizer

WORDS = {"positive": " great", "negative": " terrible"}


def batches(tokenizer, size, count):
    """Sentences with the word that should follow each, padded on the left so that it comes last."""
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    rows = records.read("default")[0]
    for first in range(0, count * size, size):
        some = [rows[i % len(rows)] for i in range(first, first + size)]
        texts = [f"{row['text']} It was" for row in some]
        words = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        yield words, torch.tensor([tokenizer(WORDS[row["label"]])["input_ids"][0] for row in some])


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="runs/lora")
    args = parser.parse_args(given)
    base, tokenizer, _ = models.load(args.model, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj"])).eval()
    optimizer = make_optimizer(args.method, model, lr=args.lr, eps=1e-2)
    losses = []
    for step, (words, answers) in enumerate(batches(tokenizer, 16, args.steps)):
        loss_of = lambda: torch.nn.functional.cross_entropy(model(**words).logits[:, -1].float(), answers)  # noqa: B023, E731
        losses.append(optimizer.step(loss_of))
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, slope {optimizer.last.rho[0]:+.2f}")
    model.save_pretrained(args.output)  # the adapter alone
    print(f"{optimizer.method} in mode {optimizer.mode}: loss {losses[0]:.3f} -> {sum(losses[-10:]) / 10:.3f}")
    return model, PeftModel.from_pretrained(models.load(args.model, torch.float32, torch.device("cpu"))[0], args.output)


if __name__ == "__main__":
    main()
