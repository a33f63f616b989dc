"""Fit under torchrun in every mode, each process on other batches; write the digests of the weights in each.

torchrun --nproc_per_node 2 tests/support/lightning_ranks.py FOLDER
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from test_lightning import MODES, Tiny, fit
from torch import distributed

from support.trainer_tiny import digest


def main(folder: Path) -> None:
    digests = []
    for mode in MODES:
        module = Tiny(mode)
        if int(os.environ["RANK"]):
            torch.nn.init.normal_(module.layers[0].weight)
        fit(module, folder / mode, steps=4, varied=True, devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
        digests.append(hashlib.sha256(b"".join(digest(module).values())).hexdigest())
    (folder / f"{os.environ['RANK']}.txt").write_text(" ".join(digests))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
