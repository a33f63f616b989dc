"""What many directions in one forward cost: the forward of a population over the plain forward of the same rows.

    python -m benchmarks.populations [--model smollm2] [--tokens 32] [--turns 9] [--threads 1] [--vectors] [--json FILE]

16 sentences, twice over: each of 16 groups has a direction of its own, and both its signs. The forward of a step and a
plain one, on other modules over the same weights, take turns; a ratio is that of two which came one after the other.
Printed are the median and the range of the turns. float32; linear layers tuned, with --vectors norms as well. Run it on
an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import batches, machine, options
from benchmarks.harness.targets import Target
from benchmarks.harness.targets import table as targets_table
from benchmarks.step.models import LABEL_TOKENS, MODELS, Workload
from pgap_kernels.finetune.scoring import Scorer
from pgap_kernels.optim import make_optimizer

# A method with its options, and what the ratio is to be at most.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "cores of rank 64 (P-GAP)": ("pgap", {"rank": 64, "window": 1 << 30, "probes": 1}, 1.20),
    "factors of rank 1 (LOZO)": ("lozo", {"rank": 1, "window": 1 << 30}, 1.15),
}


@torch.no_grad()
def measure(workload: Workload, name: str, tokens: int, turns: int, vectors: bool) -> list[float]:
    """The ratio of each turn."""
    method, given, _ = CASES[name]
    model = workload.fork()
    for parameter in model.parameters() if vectors else ():
        if parameter.dim() < 2:
            parameter.requires_grad_()
    own, plain = (Scorer(m, LABEL_TOKENS, pad_token=0) for m in (model, workload.fork()))
    sentences = workload.batch(tokens, 0)
    batch = batches.stacked(sentences, 2)
    optimizer = make_optimizer(method, model, mode="folded", members=2, groups=len(sentences.labels), **given)
    ratios: list[float] = []

    def seconds(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def closure() -> Tensor:
        losses: list[Tensor] = []
        calls = [lambda: losses.append(own.losses(batch)), lambda: plain.losses(batch)]
        first = len(ratios) % 2  # each goes first in every second turn
        found = {i: seconds(calls[i]) for i in (first, 1 - first)}
        ratios.append(found[0] / found[1])
        return losses[0]

    optimizer.step(lambda: own.losses(batch))  # refreshes, tries slices, and looks for weights that others use
    for _ in tqdm(range(turns), unit="turn", desc=name):
        optimizer.step(closure)
    return ratios


def target(row: dict[str, Any], model: str, threads: int) -> Target:
    """What was to be reached, and was."""
    values = tuple(row["ratios"])
    return Target(row["case"], f"≤ {row['most']:.2f}", row["most"], None, values, model, str(threads))


def main(given: list[str] | None = None) -> None:
    parser = options.parser("benchmarks.populations", __doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="smollm2", help="default: %(default)s")
    add("--tokens", type=int, default=32, metavar="N", help="of each sentence (default: %(default)s)")
    add("--turns", type=int, default=9, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: PyTorch's")
    add("--vectors", action="store_true", help="tune norms and biases, too")
    add("--json", type=Path, metavar="FILE", help="write the ratios there")
    args = parser.parse_args(given)
    options.check_counts(parser, args, ["tokens", "turns", "threads"])
    options.check_files(parser, args)
    torch.set_num_threads(args.threads)
    workload = Workload(args.model, torch.float32)
    rows = [
        {"case": name, "most": most, "ratios": measure(workload, name, args.tokens, args.turns, args.vectors)}
        for name, (_, _, most) in CASES.items()
    ]
    targets_table([target(row, args.model, args.threads) for row in rows]).print()
    if args.json is not None:
        machine.write(args.json, machine.facts(), rows)


if __name__ == "__main__":
    main()
