"""Each op against the memory floor and against today's PyTorch code, or against another commit's.

    python -m benchmarks.kernels [--quick] [--json FILE] [--figure FILE]
    python -m benchmarks.kernels --targets --json FILE            what is to be reached, three runs, met or missed
    python -m benchmarks.kernels --op dense lowrank --dtype float32 --size 2 512 --rank 16 --threads 1 2 --runs 3
    python -m benchmarks.kernels --device cuda [--op dense fast]
    python -m benchmarks.kernels --base REF [--op dense]

A setting is an op, dtype, size, rank and number of threads; at each, all providers take turns in one run:

    ours            our kernels, on a CPU once per instruction set that it runs
    reference       our op in plain PyTorch: exact, and slow
    idiom           the PyTorch code that people write today (idioms.py): torch.normal and add_, as MeZO;
                    U Z V^T made whole, scaled and added, as SubZero and (without Z) LOZO
    torch.compile   the idiom, compiled
    addmm_, lerp    leaner PyTorch code, where there is some
    two_passes, to_nearest, one_by_one
                    our kernels: two draws in two passes; rounded to nearest; a call per tensor
    in_place        our kernels: the weight itself moved instead of a layer's output

`x floor` is the time over that of ``W.add_(1.0)``, a read and a write of every weight, and `x idiom` the idiom's time
over it: what is gained over today's code. Times are medians of the turns of a run; --runs repeats everything.
What is too slow for the time that one setting may take (--budget), or does not run, is reported as such.

The op `forward` adds a low-rank direction to a layer's output. Its floor is the layer, F.linear(x, W): `x floor` is the
direction's share of it. Each call comes straight after the layer, as the hooks of mode folded make it, for each number
of --tokens. Without --size and --shape the layers are those of SmolLM2-135M and one of OPT-13B.

On a GPU (CUDA or ROCm) times are those of events on the device with cold caches, GB/s are the bytes that a pass has to
move over its time, and `of copy` is that over the same of ``spare.copy_(W)``. `host ms` is how long a call takes to
return; keys and scalars are those of the call before, which the op has on the device by then.

Without options: every op and dtype, from within the caches to far beyond them; fewer than all threads at the largest
size only. Run it on an idle machine.

"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import compare, machine, options, tables
from benchmarks.harness.tables import Table, shown
from benchmarks.harness.targets import table as targets_table
from benchmarks.kernels import against, targets
from benchmarks.kernels.ops import ALL, LAYERS, OPS, shape_of
from benchmarks.kernels.sweep import ISAS, OWN, PATIENCE, PROVIDERS, Point, Sweep
from pgap_kernels import cpu

CORES = os.cpu_count() or 1
DEFAULT = {
    "dtype": list(ALL),
    "size": [2.0, 32.0, 512.0],
    "shape": [],
    "layers": LAYERS,
    "rank": [8, 16, 64, 128],
    "tokens": [128, 512, 2048],
    "runs": 1,
    "budget": 0.25,
}
QUICK = DEFAULT | {
    "dtype": ["float32", "bfloat16"],
    "size": [2.0],
    "layers": LAYERS[:1],
    "rank": [16, 64],
    "tokens": [128],
    "threads": [CORES],
    "budget": 0.02,
}
TARGETS = DEFAULT | {
    "op": list(dict.fromkeys(t.op for t in targets.COMPARISONS)),
    "dtype": list(dict.fromkeys(t.dtype for t in targets.COMPARISONS)),
    "size": [512.0],
    "shape": [[8192, 8192]],
    "rank": sorted({t.rank for t in targets.COMPARISONS if t.rank}),
    "threads": [1, 2],
    "runs": 3,
    "budget": 2.0,
}


def points(args: argparse.Namespace) -> list[Point]:
    """Every setting, in the order in which they are timed."""
    found = []
    for run in range(1, args.runs + 1):
        for dtype in args.dtype:
            shapes = {op: shapes_of(args, op, dtype) for op in args.op if dtype in OPS[op].dtypes}
            for shape in sorted({x for own in shapes.values() for x in own}, key=_size):
                for op in (op for op, own in shapes.items() if shape in own):
                    last = shape == shapes[op][-1]
                    if not OPS[op].sized and not last:
                        continue
                    threads = args.threads or ([1, CORES] if last and CORES > 1 else [CORES])
                    ranks, tokens = args.rank if OPS[op].ranked else [None], args.tokens if OPS[op].layers else [None]
                    found += [Point(run, op, dtype, shape, r, n, t) for r in ranks for t in tokens for n in threads]
    if not args.targets:
        return found
    compared = {key[:3] for key in targets.wanted(args.isa or ISAS)}
    return [p for p in found if (p.op, p.dtype, p.rank) in compared]


def shapes_of(args: argparse.Namespace, op: str, dtype: str) -> list[tuple[int, int]]:
    """From the smallest: what is too slow there is not tried on the larger."""
    if OPS[op].layers and args.layers:
        return sorted(args.layers, key=_size)
    given = {shape_of(size, dtype) for size in args.size} | {(rows, columns) for rows, columns in args.shape}
    return sorted(given, key=_size)


def _size(shape: tuple[int, int]) -> tuple:
    return shape[0] * shape[1], shape


def measured(args: argparse.Namespace, sweep: Sweep) -> Iterator[dict]:
    """Rows, each point's printed as soon as they are there."""
    plan = points(args)
    console = tables.console()
    with tqdm(total=len(plan), unit="setting", file=sys.stderr, disable=None) as bar:
        for point, rows in zip(plan, sweep.rows(plan), strict=True):
            with tqdm.external_write_mode():
                rows_table(point, rows, args.runs).print(console)
            bar.update()
            yield from rows


def rows_table(point: Point, rows: Sequence[dict], runs: int) -> Table:
    """What one setting came to."""
    first = rows[0]
    shape = " x ".join(map(str, first["shape"]))
    title = f"{point.title}, {shape}, {first['megabytes']:.3g} MB, threads {point.threads}"
    columns = ["provider", "ms", "x floor", "x idiom", "GB/s", "of copy", "host ms", "not measured"]
    lines = []
    for row in rows:
        name = " ".join(x for x in (row["provider"], row["isa"]) if x)
        if "unmeasured" in row:
            lines.append([name, *[""] * 6, row["unmeasured"]])
            continue
        line = [name, f"{1e3 * row['seconds']:.3f}", f"{row['floor_ratio']:.2f}"]
        line += [shown(row["speedup_vs_idiom"], ".2f"), f"{row['gb_per_s']:.1f}"]
        on_gpu = "copy_share" in row
        line += [f"{row['copy_share']:.2f}", f"{1e3 * row['host_seconds']:.3f}"] if on_gpu else ["", ""]
        lines.append([*line, ""])
    return Table(columns, lines, title + (f", run {first['run']}" if runs > 1 else ""))


def arguments(given: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for refusals to come, and the command line with every setting that it leaves out."""
    parser = options.parser("benchmarks.kernels", __doc__ + compare.HELP)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--targets", action="store_true", help="what the targets compare, at 8192 x 8192 and 512 MB, and their table")
    add("--quick", action="store_true", help="2 MB, two dtypes and ranks, few turns: a minute, to see that all runs")
    add("--op", nargs="+", choices=OPS, metavar="OP", help=f"of: {', '.join(OPS)}; default: all of the device")
    add("--dtype", nargs="+", choices=ALL, metavar="DTYPE", help=f"of: {', '.join(ALL)}; default: all")
    add("--size", type=float, nargs="+", metavar="MB", help=f"of near-square matrices; default: {DEFAULT['size']}")
    help = "of a matrix or layer (OUT, IN); give it again for more"
    add("--shape", type=int, nargs=2, action="append", metavar=("ROWS", "COLUMNS"), help=help)
    add("--rank", type=int, nargs="+", help=f"of the low-rank ops; default: {DEFAULT['rank']}")
    add("--tokens", type=int, nargs="+", help=f"through a layer; default: {DEFAULT['tokens']}")
    add("--threads", type=int, nargs="+", help=f"of the CPU; default: {CORES} and, at the largest size, 1")
    add(
        "--provider",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help="of those above; default: all, with --base ours",
    )
    add("--isa", nargs="+", choices=ISAS, metavar="ISA", help=f"of: {', '.join(ISAS)}; default: all this CPU runs")
    add("--runs", type=int, help="repeats of the whole; default: 1, with --targets 3")
    add("--repeats", type=int, help="turns per figure at most; default: 5 to 101, more where calls are short")
    budget = f"default: {DEFAULT['budget']}, with --targets {TARGETS['budget']}"
    help = f"for one provider at one setting; but for idiom, no turn may take {PATIENCE} times that; {budget}"
    add("--budget", type=float, metavar="SECONDS", help=help)
    add("--json", type=Path, metavar="FILE", help="write the rows, and the facts of the machine, there")
    add("--figure", type=Path, metavar="FILE", help="draw times over the floor there (.png, .svg, .pdf)")
    compare.add_options(parser)
    args = parser.parse_args(given)
    args.layers = [] if args.size or args.shape else None
    if args.size or args.shape:  # one given alone is not added to the other's default
        args.size, args.shape = args.size or [], args.shape or []
    options.fill(args, TARGETS if args.targets else QUICK if args.quick else DEFAULT)
    args.op = args.op or [op for op in OPS if args.device in OPS[op].devices]
    other = args.base or args.package
    args.provider = args.provider or (["ours"] if other else list(PROVIDERS))
    if args.device == "cuda":
        args.threads = [torch.get_num_threads()]
    _check(parser, args)
    if other:
        if args.figure or args.targets:
            parser.error("--figure, --targets: are for one tree; leave them out, or --base and --package")
        if others := [name for name in args.provider if name not in OWN]:
            parser.error(f"--provider: got {others[0]}; accepted with --base and --package: {', '.join(OWN)}")
        args.runs = 1
    return parser, args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whatever would fail after minutes fails now."""
    if args.targets and args.device != "cpu":
        parser.error(f"--targets: got --device {args.device}; accepted: cpu, which they are for")
    options.check_counts(parser, args, ("rank", "tokens", "threads", "runs", "repeats", "rounds"))
    for name in ("size", "budget"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if not number > 0:
                parser.error(f"--{name}: got {number}; accepted: numbers above 0")
    for shape in args.shape:
        if min(shape) < 1:
            parser.error(f"--shape: got {shape[0]} {shape[1]}; accepted: integers of at least 1")
    for op in args.op:
        if args.device not in OPS[op].devices:
            parser.error(f"--op: got {op}; accepted with --device {args.device}: others, it is not one there")
        for dtype in args.dtype if OPS[op].ranked else ():
            for shape in shapes_of(args, op, dtype):
                if max(args.rank) > min(shape):
                    where = f"a matrix of {shape[0]} x {shape[1]}"
                    parser.error(f"--rank: got {max(args.rank)}; accepted with {where}: at most {min(shape)}")
    options.check_files(parser, args, ("json", "figure"))
    compare.check_options(parser, args)
    if reason := machine.refusal(args.device, "dense_perturb_"):
        parser.error(reason)
    if args.device == "cpu":
        runs = cpu.isas()[cpu.isas().index(cpu.isa()[0]) :]
        for isa in args.isa or ():
            if isa not in runs:
                parser.error(f"--isa: got {isa}; accepted here: {', '.join(runs)}")
        args.isa = [isa for isa in runs if isa in (args.isa or runs)]


def main(given: Sequence[str] | None = None) -> int:
    parser, args = arguments(given)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    facts = machine.facts(device)
    print(machine.line(facts))
    if args.base or args.package:
        with compare.workers(parser, args, "benchmarks.kernels.against") as workers:
            rows = against.rows(workers, args, points(args))
    else:
        sweep = Sweep.of(device, args.isa)
        sweep.providers, sweep.repeats, sweep.budget = args.provider, args.repeats, args.budget
        if args.targets:
            sweep.wanted = targets.wanted(args.isa)
        rows = list(measured(args, sweep))
    if args.targets:
        targets_table(targets.targets(rows)).print()
    if args.json:
        machine.write(args.json, facts, rows)
    if args.figure:
        from benchmarks.kernels import figure

        figure.against_floor(rows).savefig(args.figure, dpi=150)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
