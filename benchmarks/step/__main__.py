"""One whole zeroth-order step against its two forwards, against MeZO's own code, or against another commit's.

    python -m benchmarks.step [--model smollm2] [--tokens 32] [--json FILE]
    python -m benchmarks.step --base REF --model smollm2 --tokens 32

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

All of it takes about 25 minutes on two cores, --quick two minutes. Run it on an idle machine.

"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import compare, machine, options, timer
from benchmarks.harness.tables import Table, shown
from benchmarks.harness.targets import table as targets_table
from benchmarks.step import against, models
from benchmarks.step.contenders import METHODS, OTHERS, Contender, specs
from benchmarks.step.models import Workload
from benchmarks.step.targets import targets

ALL_MODES = ("inplace", "two_pass", "scratch", "folded")
PROVIDERS = ("ours", *OTHERS)
# Timed steps by tokens. On opt13b 128 tokens take a quarter of an hour, and must be asked for.
STEPS = {"smollm2": {8: 5, 32: 5, 128: 2}, "opt13b": {8: 3, 32: 2}}


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each contender, and a table for each group of those that took turns."""
    for run in range(1, args.runs + 1):
        for name, dtype in itertools.product(args.model, args.dtype):
            torch.compiler.reset()  # else the shapes of one model count against the recompilations of the other
            workload = Workload(name, getattr(torch, dtype))
            for threads, tokens in itertools.product(args.threads, args.tokens or STEPS[name]):
                torch.set_num_threads(threads)
                about = {"model": name, "tokens": tokens, "batch": models.BATCH, "dtype": dtype, "threads": threads}
                group = [about | row | {"run": run} for row in _group(args, workload, tokens)]
                _table(group).print()
                yield from group


def _group(args: argparse.Namespace, workload: Workload, tokens: int) -> list[dict]:
    steps = args.steps or STEPS[workload.name].get(tokens, 1)
    contenders = [
        Contender(spec, workload, tokens, args.window, args.probes)
        for spec in specs(args.methods, args.modes, args.providers, args.ranks)
    ]
    with tqdm(
        total=len(contenders) * (1 + steps), desc=f"{workload.name}, {models.BATCH}x{tokens}", unit="step"
    ) as bar:
        for contender in contenders:
            bar.set_postfix_str(f"preparing {contender.spec}")
            contender.prepare(args.refresh_forwards)
            bar.update()
        for i, block in timer.turns([steps] * len(contenders)):
            bar.set_postfix_str(str(contenders[i].spec))
            contenders[i].block(block)
            bar.update(len(block))
    floor = statistics.median(s["total"] for s in contenders[0].seconds)
    return [contender.row(floor) for contender in contenders]


def _table(group: Sequence[dict]) -> Table:
    head = group[0]
    title = f"{head['model']}, {head['dtype']}, {head['batch']}x{head['tokens']} tokens, {head['threads']} threads, "
    title += f"run {head['run']}: seconds of a step; MB beyond the weights"
    columns = ["provider", "forwards", "outside", "step", "x forwards", "x own", "refresh", "of window"]
    columns += ["MB", "tensors", "MB, refresh", "tensors, refresh"]
    lines = []
    for row in group:
        name = " ".join(str(row[part]) for part in ("provider", "method", "mode", "rank") if row[part] is not None)
        line = [name, *(shown(row[part], ".3f", "-") for part in ("forward", "perturb", "total"))]
        line += [shown(row[part], ".2f", "-") for part in ("ratio", "ratio_own", "refresh")]
        line.append(shown(row["refresh_share"], ".1%", "-"))
        peaks = ("peak_memory", "peak_tensors", "refresh_peak_memory", "refresh_peak_tensors")
        lines.append([*line, *(shown(row[part], ".0f", "-") for part in peaks)])
    return Table(columns, lines, title)


def arguments(given: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for refusals to come, and the command line with every setting that it leaves out."""
    parser = options.parser("benchmarks.step", __doc__ + compare.HELP)
    add = parser.add_argument
    dtypes = ("float32", "bfloat16", "float16")
    add("--model", nargs="+", choices=tuple(STEPS), help="default: all")
    add("--tokens", type=int, nargs="+", help="per sentence; default: 8 32 128, of opt13b 8 32")
    add("--dtype", nargs="+", choices=dtypes, default=["float32"], help="default: float32")
    add("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="default: PyTorch's")
    add("--providers", nargs="+", choices=PROVIDERS, help="default: all, against a commit ours")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    modes = "of ours; default: all; folded is with and without a window"
    add("--modes", nargs="+", choices=ALL_MODES, default=ALL_MODES, help=modes)
    add("--ranks", type=int, nargs="+", help="of P-GAP; default: 16 64")
    add("--steps", type=int, help="timed steps of each, or of a round; default: 5 to 1, fewer where they take longer")
    add("--window", type=int, default=100, help="steps between refreshes; default: %(default)s")
    add("--probes", type=int, default=10, help="of a refresh; default: %(default)s")
    refresh = "of a refresh, that are run and timed; default: %(default)s"
    add("--refresh-forwards", type=int, default=2, help=refresh)
    add("--runs", type=int, default=1, help="repeats of it all; default: %(default)s")
    add("--quick", action="store_true", help="smollm2, 8 tokens, rank 16, 2 steps")
    add("--json", type=Path, metavar="FILE", help="write rows, machine and settings there")
    compare.add_options(parser)
    args = parser.parse_args(given)
    other = args.base or args.package
    quick = {"model": ["smollm2"], "tokens": [8], "ranks": [16], "steps": 2} if args.quick else {}
    full = {"model": list(STEPS), "ranks": [16, 64], "providers": ["ours"] if other else list(PROVIDERS)}
    options.fill(args, full | quick | ({"steps": 1} if other else {}))
    counts = ("tokens", "threads", "ranks", "steps", "window", "probes", "refresh_forwards", "runs", "rounds")
    options.check_counts(parser, args, counts)
    options.check_files(parser, args)
    compare.check_options(parser, args)
    return parser, args


def main(given: list[str] | None = None) -> int:
    parser, args = arguments(given)
    if args.base or args.package:
        with compare.workers(parser, args, "benchmarks.step.against") as workers:
            found = against.rows(workers, args, STEPS)
    else:
        found = list(rows(args))
        targets_table(targets(found)).print()
    if args.json:
        machine.write(args.json, machine.facts() | {"arguments": options.settings(args)}, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
