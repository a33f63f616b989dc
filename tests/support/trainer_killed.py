"""Train a tiny model whole, then again, killed with SIGKILL between two checkpoints and resumed; every mode.

    python tests/support/trainer_killed.py MODEL

Prints a line of JSON: the rows whose weights, losses or step differ. Every run has a process of its own, forked from
this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile

import torch
from transformers import TrainerCallback

from support.trainer_tiny import MODES, digest, trainer_of


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:  # two steps after the checkpoint
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind, options, folder, killed, resume, out):
    torch.set_num_threads(1)
    callbacks = [Kill()] if killed else None
    trainer = trainer_of(
        kind, folder, max_steps=8, save_steps=4, save_strategy="steps", zo_dropout=True, disable_tqdm=True,
        lr_scheduler_type="linear", named={"callbacks": callbacks}, **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    out.put((digest(trainer.model), losses, trainer.zo.steps))


def main(kind: str) -> None:
    context, wrong = multiprocessing.get_context("fork"), []

    def run(options, folder, killed=False, resume=None):
        out = context.Queue()
        process = context.Process(target=train, args=(kind, options, folder, killed, resume, out))
        process.start()
        result = None if killed else out.get(timeout=120)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if killed else 0), process.exitcode
        return result

    for number, (name, mode) in enumerate(MODES.items()):
        accumulation = 1 + (number + len(kind)) % 2  # each mode with both, in llama and gpt2
        options = {**mode, "gradient_accumulation_steps": accumulation}
        with tempfile.TemporaryDirectory() as folder:
            run(options, folder + "/killed", killed=True)
            resumed = run(options, folder + "/killed", resume=True)
            if resumed != run(options, folder + "/whole"):
                wrong.append(f"{kind} {name} x {accumulation}")
    print(json.dumps({"wrong": wrong, "rows": len(MODES)}))


if __name__ == "__main__":
    main(sys.argv[1])
