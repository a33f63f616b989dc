"""Each op against the memory floor and against what PyTorch code does today.

    python -m benchmarks.kernels [--quick] [--json FILE] [--figure FILE]
    python -m benchmarks.kernels --targets --json FILE            what is to be reached, three runs, met or missed
    python -m benchmarks.kernels --op dense lowrank --dtype float32 --size 2 512 --rank 16 --threads 1 2 --runs 3
    python -m benchmarks.kernels --device cuda [--op dense fast]

A setting is an op, dtype, size, rank and number of threads; at each, everybody takes turns in one run:

    ours            our kernels, on a CPU once per instruction set that it runs
    reference       our op in plain PyTorch: exact, and slow
    idiom           the PyTorch code that people write today (idioms.py): torch.normal and add_, as MeZO;
                    U Z V^T made whole, scaled and added, as SubZero and (without Z) LOZO
    torch.compile   the idiom, compiled
    addmm_, lerp    leaner PyTorch code, where there is some
    two_passes, to_nearest, one_by_one
                    our kernels: two draws in two passes; rounded to nearest; a call per tensor

`x floor` is the time over that of ``W.add_(1.0)``, a read and a write of every weight, and `x idiom` the idiom's time
over it: what is gained over today's code. Times are medians of the turns of a run; --runs repeats everything.
What is too slow for the time that one setting may take (--budget), or does not run, is reported as such.

On a GPU (CUDA or ROCm) times are those of events on the device with cold caches, GB/s are the bytes that a pass has to
move over its time, and `of copy` is that over the same of ``spare.copy_(W)``. `host ms` is how long a call takes to
return; keys and scalars are those of the call before, which the op has on the device by then.

Without options: every op and dtype, from within the caches to far beyond them; fewer than all threads at the largest
size only; about twelve minutes on two cores. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import machine, timing
from benchmarks.kernels import targets
from benchmarks.kernels.ops import ALL, OPS, shape_of
from benchmarks.kernels.sweep import ISAS, PATIENCE, PROVIDERS, Point, Sweep
from pgap_kernels import cpu

CORES = os.cpu_count() or 1
DEFAULT = {
    "dtype": list(ALL),
    "size": [2.0, 32.0, 512.0],
    "shape": [],
    "rank": [8, 16, 64, 128],
    "runs": 1,
    "budget": 0.25,
}
QUICK = DEFAULT | {
    "dtype": ["float32", "bfloat16"],
    "size": [2.0],
    "rank": [16, 64],
    "threads": [CORES],
    "budget": 0.02,
}
TARGETS = DEFAULT | {
    "op": list(dict.fromkeys(t.op for t in targets.TARGETS)),
    "dtype": list(dict.fromkeys(t.dtype for t in targets.TARGETS)),
    "size": [512.0],
    "shape": [[8192, 8192]],
    "rank": sorted({t.rank for t in targets.TARGETS if t.rank}),
    "threads": [1, 2],
    "runs": 3,
    "budget": 2.0,
}


def points(args: argparse.Namespace) -> list[Point]:
    """Every setting, in the order in which they are timed."""
    found = []
    for run in range(1, args.runs + 1):
        for dtype in args.dtype:
            shapes = _shapes(args, dtype)
            for shape in shapes:
                for op in (op for op in args.op if dtype in OPS[op].dtypes):
                    last = shape == shapes[-1]
                    if not OPS[op].sized and not last:
                        continue
                    for rank in args.rank if OPS[op].ranked else [None]:
                        threads = args.threads or ([1, CORES] if last and CORES > 1 else [CORES])
                        found += [Point(run, op, dtype, shape, rank, count) for count in threads]
    if not args.targets:
        return found
    compared = {key[:3] for key in targets.wanted(args.isa or ISAS)}
    return [p for p in found if (p.op, p.dtype, p.rank) in compared]


def _shapes(args: argparse.Namespace, dtype: str) -> list[tuple[int, int]]:
    """From the smallest: what is too slow there is not tried on the larger."""
    given = {shape_of(size, dtype) for size in args.size} | {(rows, columns) for rows, columns in args.shape}
    return sorted(given, key=lambda shape: (shape[0] * shape[1], shape))


def measured(args: argparse.Namespace, sweep: Sweep, console: Console) -> Iterator[dict]:
    """Rows, each point's printed as soon as they are there."""
    plan = points(args)
    with tqdm(total=len(plan), unit="setting", file=sys.stderr, disable=None) as bar:
        for rows in sweep.rows(plan):
            with tqdm.external_write_mode():
                console.print(_table(rows, args.runs))
            bar.update()
            yield from rows


def _table(rows: Sequence[dict], runs: int) -> Table:
    """What one setting came to."""
    first = rows[0]
    parts = [OPS[first["op"]].title, f"rank {first['rank']}" if first["rank"] else "", first["dtype"]]
    parts += [" x ".join(map(str, first["shape"])), f"{first['megabytes']:.3g} MB", f"threads {first['threads']}"]
    parts += [f"run {first['run']}" if runs > 1 else ""]
    table = Table(title=", ".join(x for x in parts if x), title_justify="left", box=None, pad_edge=False)
    on_gpu = "copy_share" in first
    for column in ("provider", "ms", "x floor", "x idiom", "GB/s", *(("of copy", "host ms") if on_gpu else ()), ""):
        table.add_column(column, justify="left" if column in ("provider", "") else "right", min_width=9)
    for row in rows:
        name = " ".join(x for x in (row["provider"], row["isa"]) if x)
        if "unmeasured" in row:
            table.add_row(name, *[""] * (len(table.columns) - 2), row["unmeasured"])
            continue
        speedup = "" if row["speedup_vs_idiom"] is None else f"{row['speedup_vs_idiom']:.2f}"
        cells = [f"{1e3 * row['seconds']:.3f}", f"{row['floor_ratio']:.2f}", speedup, f"{row['gb_per_s']:.1f}"]
        if on_gpu:
            cells += [f"{row['copy_share']:.2f}", f"{1e3 * row['host_seconds']:.3f}"]
        table.add_row(name, *cells)
    return table


def targets_table(rows: Sequence[dict]) -> Table:
    """What was to be reached, and whether it was."""
    table = Table(title="targets (median of the runs, and their range)", title_justify="left", box=None)
    for column in ("what", "weights", "threads", "target", "measured", ""):
        table.add_column(column)
    for outcome in targets.outcomes(rows):
        style = {True: "green", False: "red", None: "dim"}[outcome.met]
        shape = " x ".join(map(str, outcome.shape))
        what, bound = outcome.target.what, outcome.target.bound
        table.add_row(what, shape, str(outcome.threads or ""), bound, str(outcome), f"[{style}]{outcome.verdict}")
    return table


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with every setting that it leaves out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--targets", action="store_true", help="what the targets compare, at 8192 x 8192 and 512 MB, and their table")
    add("--quick", action="store_true", help="2 MB, two dtypes and ranks, few turns: a minute, to see that all runs")
    add("--op", nargs="+", choices=OPS, metavar="OP", help=f"of: {', '.join(OPS)}; default: all of the device")
    add("--dtype", nargs="+", choices=ALL, metavar="DTYPE", help=f"of: {', '.join(ALL)}; default: all")
    add("--size", type=float, nargs="+", metavar="MB", help=f"of near-square matrices; default: {DEFAULT['size']}")
    add(
        "--shape",
        type=int,
        nargs=2,
        action="append",
        metavar=("ROWS", "COLUMNS"),
        help="of a matrix, or more than once",
    )
    add("--rank", type=int, nargs="+", help=f"of the low-rank op; default: {DEFAULT['rank']}")
    add("--threads", type=int, nargs="+", help=f"of the CPU; default: {CORES} and, at the largest size, 1")
    add("--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help="of those above; default: all")
    add("--isa", nargs="+", choices=ISAS, metavar="ISA", help=f"of: {', '.join(ISAS)}; default: all this CPU runs")
    add("--runs", type=int, help="repeats of the whole; default: 1, with --targets 3")
    add("--repeats", type=int, help="turns per figure at most; default: 5 to 101, more where calls are short")
    budget = f"default: {DEFAULT['budget']}, with --targets {TARGETS['budget']}"
    help = f"for one provider at one setting; but for idiom, no turn may take {PATIENCE} times that; {budget}"
    add("--budget", type=float, metavar="SECONDS", help=help)
    add("--json", type=Path, metavar="FILE", help="write the rows, and the facts of the machine, there")
    add("--figure", type=Path, metavar="FILE", help="draw times over the floor there (.png, .svg, .pdf)")
    args = parser.parse_args(given)
    if args.size or args.shape:  # one given alone is not added to the other's default
        args.size, args.shape = args.size or [], args.shape or []
    for name, default in (TARGETS if args.targets else QUICK if args.quick else DEFAULT).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.op = args.op or [op for op in OPS if args.device in OPS[op].devices]
    args.provider = args.provider or list(PROVIDERS)
    if args.device == "cuda":
        args.threads = [torch.get_num_threads()]
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whatever would fail after minutes fails now."""
    if args.targets and args.device != "cpu":
        parser.error(f"--targets: got --device {args.device}; accepted: cpu, which they are for")
    for name in ("rank", "threads", "runs", "repeats", "size", "budget"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not number > 0:
                parser.error(f"--{name}: got {number}; accepted: numbers above 0")
    for shape in args.shape:
        if min(shape) < 1:
            parser.error(f"--shape: got {shape[0]} {shape[1]}; accepted: integers of at least 1")
    for dtype in args.dtype if "lowrank" in args.op else ():
        for shape in _shapes(args, dtype):
            if max(args.rank) > min(shape):
                where = f"a matrix of {shape[0]} x {shape[1]}"
                parser.error(f"--rank: got {max(args.rank)}; accepted with {where}: at most {min(shape)}")
    for op in args.op:
        if args.device not in OPS[op].devices:
            parser.error(f"--op: got {op}; accepted with --device {args.device}: others, it is not one there")
    for name in ("json", "figure"):
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            parser.error(f"--{name}: there is no folder {str(file.parent)!r}; create it first")
    if reason := machine.refusal(args.device, "dense_perturb_"):
        parser.error(reason)
    if args.device == "cpu":
        runs = cpu.isas()[cpu.isas().index(cpu.isa()[0]) :]
        for isa in args.isa or ():
            if isa not in runs:
                parser.error(f"--isa: got {isa}; accepted here: {', '.join(runs)}")
        args.isa = [isa for isa in runs if isa in (args.isa or runs)]


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        sweep = Sweep(device, timing.on_gpu(device), copy=True, warmups=3)
    else:
        device = torch.device("cpu")
        sweep = Sweep(device, timing.on_host, args.isa)
    sweep.providers, sweep.repeats, sweep.budget = args.provider, args.repeats, args.budget
    if args.targets:
        sweep.wanted = targets.wanted(args.isa)
    facts = machine.facts(device)
    console.print(machine.line(facts), highlight=False)
    rows = list(measured(args, sweep, console))
    if args.targets:
        console.print(targets_table(rows))
    if args.json:
        machine.write(args.json, facts, rows)
    if args.figure:
        from benchmarks.kernels import figure

        figure.against_floor(rows).savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
