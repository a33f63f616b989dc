"""Train under torchrun in several modes, eight examples a step over all processes; write what each process found.

torchrun --nproc_per_node 2 tests/support/trainer_ranks.py FILE_PREFIX
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch
from torch import distributed

from pgap_kernels.optim import PGAP
from support.trainer_tiny import MODES, InOrder, digest, examples, model_of, trainer_of


def hashed(model) -> str:
    return hashlib.sha256(b"".join(digest(model).values())).hexdigest()


def main(prefix: str) -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    losses, digests, refused, wrapped = {}, {}, [], False
    members = {"zo_mode": "scratch", "zo_members": 2, "zo_directions": 2, "zo_baseline": "loo"}
    for name, options in {**MODES, "members": members}.items():
        model = model_of("llama")
        if rank:  # as adapters begin at random
            torch.nn.init.normal_(model.lm_head.weight)
        trainer = trainer_of(
            model=model, data=InOrder(examples("llama")), folder=f"{prefix}-{name}", ddp_backend="gloo",
            per_device_train_batch_size=8 // world, save_strategy="steps", save_steps=2, save_total_limit=1,
            eval_strategy="steps", eval_steps=3, named={"eval_dataset": examples("llama", 8)}, **options,
        )  # fmt: skip
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        digests[name] = hashed(model)
        wrapped |= trainer.model_wrapped is not model
    if world > 1:
        layer = torch.nn.Linear(4, 4)
        optimizer = PGAP(layer, rank=2, mode="folded", merge="window")
        optimizer.step(lambda: layer(torch.ones(2, 4)).square().mean())
        try:
            layer.state_dict()
        except RuntimeError as error:
            refused.append(str(error).partition(":")[0])
        optimizer.merge()
        layer.state_dict()
    with open(f"{prefix}-{rank}.json", "w") as file:
        json.dump({"losses": losses, "digests": digests, "refused": refused, "wrapped": wrapped}, file)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
