"""What fine-tuning adds to a model's memory: peak resident bytes of a process beyond those with the model loaded.

    python -m benchmarks.memory [--tokens 32] [--rows 16] [--only NAME ...] [--json FILE]

SmolLM2-135M in float32 with its 210 linear layers tuned, random tokens, the loss of a language model; each contender in
a process of its own, for three steps. Linux only: it reads and resets the peak in /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import machine, options
from benchmarks.harness.tables import Table
from pgap_kernels.finetune import models
from pgap_kernels.optim import make_optimizer

MIB = 2**20
Step = Callable[[], Any]


def _zeroth_order(method: str, **given: Any) -> Callable[[Any, Step], Step]:
    def begin(model: Any, loss: Step) -> Step:
        optimizer = make_optimizer(method, model, lr=1e-6, **given)
        return lambda: optimizer.step(loss)

    return begin


def _forward(model: Any, loss: Step) -> Step:
    return torch.no_grad()(loss)


def _adamw(model: Any, loss: Step) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _lora_adamw(model: Any, loss: Step) -> Step:
    from peft import LoraConfig, get_peft_model

    return _adamw(get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), loss)


CONTENDERS: dict[str, Callable[[Any, Step], Step]] = {
    "a forward alone": _forward,
    "MeZO, in place": _zeroth_order("mezo", mode="inplace"),
    "MeZO, scratch": _zeroth_order("mezo", mode="scratch"),
    "P-GAP, rank 64, folded": _zeroth_order("pgap", rank=64, mode="folded"),
    "LoRA of rank 8 with AdamW": _lora_adamw,
    "AdamW": _adamw,
}


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def measure(name: str, rows: int, tokens: int) -> dict[str, Any]:
    """A contender's row, measured in this process."""
    model, _, _ = models.load("default", torch.float32, torch.device("cpu"))
    ids = torch.randint(0, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading needed goes back first
    before = _resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is from here on
    step = CONTENDERS[name](model, loss)
    for _ in range(3):
        step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"contender": name, "weights": weights, "before": before, "beyond": _resident("VmHWM:") - before}


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each contender."""
    cells = [[row["contender"], f"{row['beyond'] / MIB:,.0f}", f"{row['beyond'] / row['weights']:.2f}"] for row in rows]
    before, weights = (f"{rows[0][name] / MIB:,.0f}" for name in ("before", "weights"))
    loaded = f"The process with the model loaded has {before} MiB, {weights} of them weights."
    return Table(["", "peak beyond that, MiB", "x the weights"], cells, "memory", loaded)


def main(given: list[str] | None = None) -> None:
    parser = options.parser("benchmarks.memory", __doc__)
    add = parser.add_argument
    add("--rows", type=int, default=16, metavar="N", help="sentences of a step (default: 16)")
    add("--tokens", type=int, default=32, metavar="N", help="of each (default: 32)")
    add("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME", help="contenders")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--here", action="store_true", help=argparse.SUPPRESS)  # the process of one contender
    args = parser.parse_args(given)
    options.check_counts(parser, args, ["rows", "tokens"])
    options.check_files(parser, args)
    if args.here:
        print(json.dumps(measure(args.only[0], args.rows, args.tokens)))
        return
    models.load("default", torch.float32, torch.device("cpu"))  # fetched here, not in a child whose output is read
    sizes = ["--rows", str(args.rows), "--tokens", str(args.tokens)]
    rows = []
    for name in tqdm(args.only, unit="contender"):
        command = [sys.executable, "-m", "benchmarks.memory", "--here", "--only", name, *sizes]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table(rows).print()
    if args.json is not None:
        machine.write(args.json, machine.facts(), rows)


if __name__ == "__main__":
    main()
