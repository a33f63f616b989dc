"""The modes on a real model: same losses, passes over the weights as counted, and where the seconds go.

SmolLM2-135M (its decoder's linear layers) in float32 on the built-in data, each contender on a copy of its own, in
turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import timer
from benchmarks.harness.optimizers import mode_options, timed_step
from pgap_kernels.finetune import Config, data, models
from pgap_kernels.finetune.scoring import Encoded, Scorer
from pgap_kernels.finetune.tuned import OVERRIDES
from pgap_kernels.optim import PGAP, MeZO

METHODS = {"pgap": PGAP, "mezo": MeZO}
MODES = {"pgap": ("inplace", "scratch", "folded", "folded, window"), "mezo": ("inplace", "scratch")}


class Contender:
    """A method in a mode with its model; keeps what its steps cost and every loss that it saw."""

    def __init__(self, method: str, mode: str, options: dict[str, Any], dataset_of) -> None:
        self.method, self.mode, self.rank = method, mode, options.get("rank")
        model, tokenizer, _ = models.load("default", torch.float32, torch.device("cpu"))
        self.dataset = dataset_of(tokenizer)
        self.scorer = Scorer(model, self.dataset.label_tokens, tokenizer.pad_token_id)
        self.optimizer: PGAP | MeZO = METHODS[method](model, seed=0, **mode_options(mode), **options)
        self.seconds: list[dict[str, float]] = []
        self.losses: list[list[float]] = []

    def batch(self, size: int, step: int) -> Encoded:
        return self.scorer.encode(data.batch(self.dataset.train, size, 0, step))

    def step(self, batch: Encoded) -> None:
        """One step, noted."""
        seen: list[float] = []

        def closure() -> torch.Tensor:
            loss = self.scorer.loss(batch)
            seen.append(loss.item())
            return loss

        self.seconds.append(timed_step(self.optimizer, closure))
        self.losses.append(seen)

    def row(self, timed: int, steps: int) -> dict:
        """What it showed: medians without the first step, which refreshes and looks for stray uses of weights."""
        usual = self.seconds[1:timed] or self.seconds[:1]
        medians = {part: statistics.median(s[part] for s in usual) for part in ("perturb", "forward", "total")}
        return {
            "section": "smollm2",
            "method": self.method,
            "mode": self.mode,
            "rank": self.rank,
            "window": getattr(self.optimizer, "window", None),
            "probes": getattr(self.optimizer, "probes", 1),
            "passes_per_step": self.optimizer.passes / steps,
            "passes_declared": self.optimizer.cost().weight_passes,
            "passes_over_steps": steps,
            "seconds": {**medians, "refresh": self.seconds[0]["refresh"]},
            "seconds_of_steps": self.seconds[:timed],
            "losses": [seen[-2:] for seen in self.losses[:timed]],
            "probe_losses": self.losses[0][:-2],
        }


def _difference(a: list, b: list) -> float:
    """The largest between two equally nested lists of numbers."""
    if not isinstance(a, list):
        return abs(a - b)
    return max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _basis_difference(optimizer: PGAP | MeZO, contenders: list[Contender]) -> dict:
    """How the subspaces differ from those in place; U Z V^T changes with the signs of singular vectors too."""
    if not isinstance(optimizer, PGAP):
        return {}
    against = next(c.optimizer for c in contenders if isinstance(c.optimizer, PGAP))
    cosines = torch.cat([(b.left * against.bases[name].left).sum(0) for name, b in optimizer.bases.items()])
    return {
        "basis_min_cosine": cosines.abs().min().item(),
        "basis_flipped": int((cosines < 0).sum()),
        "basis_vectors": cosines.numel(),
    }


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each contender; those of one rank are timed against each other, MeZO with the first."""
    for number, rank in enumerate(args.ranks):
        methods = ("pgap", "mezo") if number == 0 else ("pgap",)
        yield from _group(args, rank, methods)


def _options(args: argparse.Namespace, method: str, rank: int) -> dict[str, Any]:
    given = {"rank": rank, "window": args.window, "probes": args.probes} if method == "pgap" else {}
    return OVERRIDES[method] | given


def _group(args: argparse.Namespace, rank: int, methods: tuple[str, ...]) -> Iterator[dict]:
    datasets: list[data.Dataset] = []

    def dataset_of(tokenizer: Any) -> data.Dataset:
        if not datasets:
            datasets.append(data.load(Config(), tokenizer))
        return datasets[0]

    contenders = [Contender(m, mode, _options(args, m, rank), dataset_of) for m in methods for mode in MODES[m]]
    compared, window = args.steps, max(args.window, args.steps)
    rest = sum(window - compared for c in contenders if c.method == "pgap")
    with tqdm(total=compared * len(contenders) + rest, desc=f"smollm2, rank {rank}", unit="step") as bar:
        for i, block in timer.turns([compared] * len(contenders), args.block):
            for step in block:
                contenders[i].step(contenders[i].batch(args.batch, step))
                bar.update()
        references: dict[str, dict] = {}
        for contender in contenders:
            steps = compared
            basis = _basis_difference(contender.optimizer, contenders)
            # Passes do not depend on the batch: one sentence will do for the rest of a window.
            while contender.method == "pgap" and steps < window:
                contender.step(contender.batch(1, steps))
                steps += 1
                bar.update()
            row = contender.row(compared, steps)
            against = references.setdefault(contender.method, row)
            row["max_loss_difference"] = _difference(row["losses"], against["losses"])
            # Its probes and those of folded see the same bits, so that both have one subspace.
            scratch = next(c for c in contenders if (c.method, c.mode) == (contender.method, "scratch"))
            row["max_loss_difference_to_scratch"] = _difference(
                row["losses"], [x[-2:] for x in scratch.losses[:compared]]
            )
            row["max_probe_loss_difference"] = _difference(row["probe_losses"], against["probe_losses"])
            row["perturb_speedup"] = against["seconds"]["perturb"] / row["seconds"]["perturb"]
            row["step_speedup"] = against["seconds"]["total"] / row["seconds"]["total"]
            yield row | basis
