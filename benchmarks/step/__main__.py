"""One whole zeroth-order step against its two forwards, and against MeZO's own code.

    python -m benchmarks.step [--model smollm2] [--tokens 32] [--json FILE]

Models    smollm2: SmolLM2-135M with its 210 linear layers tuned, fetched the first time; opt13b: one decoder layer with
          OPT-13B's shapes, at random. Batches are 16 sentences of 8, 32 or 128 tokens.
Who       forwards: two of the model as it is. published: MeZO as its authors wrote it. torch.compile: each pass of that
          over a parameter compiled. ours: MeZO inplace, two_pass and scratch; P-GAP inplace, scratch, folded and
          "folded, window" (folded, with the weights written once per window: `merge="window"`), at each rank.
Figures   medians over steps that the contenders take in turns, seconds of a step: in forwards, outside them (perturb
          and update), in all. A refresh of P-GAP is apart: its own seconds, and as a share of its window of 100 steps.
          Few of its 20 forwards are run, the others count as the mean of these.
          `x forwards` is the step over two plain forwards, `x own` over the forwards inside it, which ran when it did.
          Peak memory, in MB beyond the weights, activations included: of the process (C++ scratch and the allocator
          are seen), and of tensors alive (exact, but C++ scratch is not seen); of a step, and of a refresh.

All of it takes about 25 minutes on two cores, --quick two minutes. Time on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import machine, turns
from benchmarks.step.contenders import METHODS, OTHERS, Contender, specs
from benchmarks.step.models import BATCH, MODELS, Workload
from benchmarks.step.targets import targets

ALL_MODES = ("inplace", "two_pass", "scratch", "folded")
PROVIDERS = ("ours", *OTHERS)
# Timed steps by tokens. On opt13b 128 tokens take a quarter of an hour, and must be asked for.
STEPS = {"smollm2": {8: 5, 32: 5, 128: 2}, "opt13b": {8: 3, 32: 2}}


def rows(args: argparse.Namespace, console: Console) -> Iterator[dict]:
    """A row for each contender, and a table for each group of those that took turns."""
    for run in range(1, args.runs + 1):
        for name, dtype in itertools.product(args.model, args.dtype):
            torch.compiler.reset()  # else the shapes of one model count against the recompilations of the other
            workload = Workload(name, getattr(torch, dtype))
            for threads, tokens in itertools.product(args.threads, args.tokens or STEPS[name]):
                torch.set_num_threads(threads)
                about = {"model": name, "tokens": tokens, "batch": BATCH, "dtype": dtype, "threads": threads}
                group = [about | row | {"run": run} for row in _group(args, workload, tokens)]
                console.print(_table(group))
                yield from group


def _group(args: argparse.Namespace, workload: Workload, tokens: int) -> list[dict]:
    steps = args.steps or STEPS[workload.name].get(tokens, 1)
    contenders = [
        Contender(spec, workload, tokens, args.window, args.probes)
        for spec in specs(args.methods, args.modes, args.providers, args.ranks)
    ]
    with tqdm(total=len(contenders) * (1 + steps), desc=f"{workload.name}, {BATCH}x{tokens}", unit="step") as bar:
        for contender in contenders:
            bar.set_postfix_str(f"preparing {contender.spec}")
            contender.prepare(args.refresh_forwards)
            bar.update()
        for contender, block in turns.blocks(contenders, steps, 1):
            bar.set_postfix_str(str(contender.spec))
            contender.block(block)
            bar.update(len(block))
    floor = statistics.median(s["total"] for s in contenders[0].seconds)
    return [contender.row(floor) for contender in contenders]


def _table(group: Sequence[dict]) -> Table:
    head = group[0]
    table = Table(
        title=f"{head['model']}, {head['dtype']}, {head['batch']}x{head['tokens']} tokens, {head['threads']} threads, "
        f"run {head['run']}: seconds of a step; MB beyond the weights",
    )
    table.add_column("who", no_wrap=True)
    for name in ("forwards", "outside", "step", "x forwards", "x own", "refresh", "of window"):
        table.add_column(name, justify="right")
    for name in ("MB", "tensors", "MB, refresh", "tensors, refresh"):
        table.add_column(name, justify="right")
    for row in group:
        table.add_row(
            " ".join(str(row[part]) for part in ("provider", "method", "mode", "rank") if row[part] is not None),
            *(_shown(row[name], ".3f") for name in ("forward", "perturb", "total")),
            *(_shown(row[name], ".2f") for name in ("ratio", "ratio_own", "refresh")),
            _shown(row["refresh_share"], ".1%"),
            *(_shown(row[name], ".0f") for name in ("peak_memory", "peak_tensors")),
            *(_shown(row[name], ".0f") for name in ("refresh_peak_memory", "refresh_peak_tensors")),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every setting that it leaves out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", help="per sentence; default: 8 32 128, of opt13b 8 32")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"], help="default: float32")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="default: PyTorch's")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS, help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=ALL_MODES,
        default=ALL_MODES,
        help="of ours; default: all; folded is with and without a window",
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="of P-GAP; default: 16 64")
    parser.add_argument("--steps", type=int, help="timed steps of each; default: 5 to 1, fewer where they take longer")
    parser.add_argument("--window", type=int, default=100, help="steps between refreshes; default: %(default)s")
    parser.add_argument("--probes", type=int, default=10, help="of a refresh; default: %(default)s")
    parser.add_argument(
        "--refresh-forwards", type=int, default=2, help="of a refresh, that are run and timed; default: %(default)s"
    )
    parser.add_argument("--runs", type=int, default=1, help="repeats of it all; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="smollm2, 8 tokens, rank 16, 2 steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and settings there")
    args = parser.parse_args(given)
    for name, full, quick in (
        ("model", list(MODELS), ["smollm2"]),
        ("tokens", None, [8]),
        ("ranks", [16, 64], [16]),
        ("steps", None, 2),
    ):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    for name in ("tokens", "threads", "ranks", "steps", "window", "probes", "refresh_forwards", "runs"):
        value = getattr(args, name)
        least = min(value) if isinstance(value, list) else value
        if least is not None and least < 1:
            parser.error(f"--{name.replace('_', '-')}: got {least}; accepted: integers of at least 1")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {str(args.json.parent)!r}; create it first")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    found = list(rows(args, console))
    for target in targets(found):
        verdict = "[green]met[/]   " if target.met else "[red]missed[/]"
        console.print(f"{verdict} {target.text}: {target}, to reach {target.limit}", highlight=False)
    if args.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        machine.write(args.json, machine.facts() | {"arguments": settings}, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
