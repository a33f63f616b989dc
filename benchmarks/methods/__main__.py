"""What a step of every method costs in each of its modes: as the optimizer declares it, as measured, and as published.

    python -m benchmarks.methods [--only mezo pgap] [--steps 6] [--json FILE]
    python -m benchmarks.methods --base REF --only pgap

Model     SmolLM2-135M with its 210 linear layers tuned, fetched the first time; batches are 16 sentences of 32 tokens.
          tiny is a random model of two small layers, to try the command out.
Who       ours: the methods of `available_methods()` in the modes inplace, two_pass, scratch and folded, where they have
          them; "folded, window" writes the weights once per window; "folded, members" has several forwards of a step
          as slices of one. published: the logic of the published code in plain PyTorch (benchmarks/methods/published
          says of which), where there is some. Those of a method take turns.
Seconds   means over the timed steps: of a step, of its forwards, and outside them (perturb, update and all else). A
          refresh is spread over its window, and counts to the step only; few of its forwards are run.
Counts    forwards and weight passes of a step as `optimizer.cost()` declares them, and as counted over one period of
          steps with one token a sentence, on which they do not depend. Of long periods four steps are counted: the
          first and the last, and two of the others, which are alike.
Memory    in MB beyond the weights. Declared: state between steps, and scratch. Measured, of tensors: what is kept
          between steps, scratch included; and the peak of a step beyond that of a plain forward of as many rows, which
          state and scratch should account for. C++ scratch and LAPACK's workspaces are no tensors; they are in the
          peak of the process, and so are the forward's activations.

Run it on an idle machine.

"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import compare, machine, options, timer
from benchmarks.harness.tables import Table, shown
from benchmarks.methods import against
from benchmarks.methods.contenders import Contender, Spec, methods, specs
from benchmarks.step import models
from benchmarks.step.models import Workload

PROVIDERS = ("published", "ours")
MODELS = ("smollm2", "tiny")


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each contender, and a table for each method."""
    workload = Workload(args.model, getattr(torch, args.dtype))
    about = {"model": args.model, "dtype": args.dtype, "tokens": args.tokens, "batch": models.BATCH}
    about["threads"] = torch.get_num_threads()
    for method in args.only:
        found = [about | row for row in _group(args, workload, specs(method, args.providers))]
        table(method, found).print()
        yield from found


def _group(args: argparse.Namespace, workload: Workload, group: Sequence[Spec]) -> list[dict]:
    contenders = [Contender(spec, workload, args.tokens) for spec in group]
    with tqdm(total=len(contenders) * (2 + args.steps), desc=group[0].method if group else "", unit="step") as bar:
        for contender in contenders:
            bar.set_postfix_str(f"preparing {contender.spec}")
            contender.prepare()
            bar.update()
        for i, block in timer.turns([args.steps] * len(contenders)):
            bar.set_postfix_str(str(contenders[i].spec))
            contenders[i].block(block)
            bar.update(len(block))
        found = []
        for contender in contenders:
            bar.set_postfix_str(f"counting {contender.spec}")
            found.append(contender.row())
            contender.release()
            bar.update()
    return found


def table(method: str, found: Sequence[dict]) -> Table:
    """A line for each contender of a method; declared figures stand before measured ones."""
    columns = ["", "step, s", "forwards, s", "outside, s", "forwards", "counted", "passes", "counted"]
    columns += ["state, MB", "scratch, MB", "kept, MB", "beyond forward, MB", "process, MB"]
    lines = []
    for row in found:
        seconds = [shown(row[name], ".3f") for name in ("total", "forward", "outside")]
        pairs = itertools.product(("forwards", "passes"), ("_declared", ""))
        counts = [shown(row[name + kind], ".2f", "-") for name, kind in pairs]
        sizes = ("state_declared", "scratch_declared", "kept", "beyond_forward", "process")
        memory = [shown(row[name], ".1f", "-") for name in sizes]
        lines.append([", ".join(filter(None, (row["provider"], row["mode"]))), *seconds, *counts, *memory])
    return Table(columns, lines, method)


def arguments(given: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for refusals to come, and the command line with every setting that it leaves out."""
    parser = options.parser("benchmarks.methods", __doc__ + compare.HELP)
    add = parser.add_argument
    add("--model", choices=MODELS, default="smollm2", help="default: %(default)s")
    add("--only", nargs="+", choices=methods(), metavar="METHOD", help=f"of {', '.join(methods())}; default: all")
    add("--providers", nargs="+", choices=PROVIDERS, help="default: both, against a commit ours")
    add("--tokens", type=int, default=32, help="of a sentence; default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add("--steps", type=int, help="timed steps of each; default: 6, of a round 1")
    add("--json", type=Path, metavar="FILE", help="write rows, machine and settings there")
    compare.add_options(parser)
    args = parser.parse_args(given)
    other = args.base or args.package
    defaults: dict[str, object] = {
        "only": methods(),
        "providers": ["ours"] if other else list(PROVIDERS),
        "steps": 1 if other else 6,
    }
    options.fill(args, defaults)
    options.check_counts(parser, args, ("tokens", "steps", "rounds"))
    options.check_files(parser, args)
    compare.check_options(parser, args)
    return parser, args


def main(given: Sequence[str] | None = None) -> int:
    parser, args = arguments(given)
    if args.base or args.package:
        with compare.workers(parser, args, "benchmarks.methods.against") as workers:
            found = against.rows(workers, args)
    else:
        found = list(rows(args))
    if args.json:
        machine.write(args.json, machine.facts() | {"arguments": options.settings(args)}, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
