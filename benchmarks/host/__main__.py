"""Host time of a zeroth-order step: what the optimizer itself does, on tensors too small for kernels to matter.

    python -m benchmarks.host [--base REF | --package PATH] [--json FILE]

Model     112 nn.Linear(8, 8), which are 224 tensors.
Forwards  constant: the closure returns made-up losses, so that only the optimizer's own work remains. real: it runs the
          model, so that what hooks do counts too; two plain forwards are there to compare with. With 16 groups one
          forward of 32 rows has both points of every group.
Figures   milliseconds of a step without a refresh, on one thread: the median of a round's steps, and that of the
          rounds. About 80 seconds a round. Run it on an idle machine.

"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import compare, machine, options
from benchmarks.host.cases import requests


def arguments(given: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for refusals to come, and the command line."""
    parser = options.parser("benchmarks.host", __doc__ + compare.HELP)
    compare.add_options(parser, rounds=3)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of a round; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine there")
    args = parser.parse_args(given)
    options.check_counts(parser, args, ("steps", "rounds"))
    options.check_files(parser, args)
    compare.check_options(parser, args)
    return parser, args


def main(given: Sequence[str] | None = None) -> int:
    parser, args = arguments(given)
    with compare.workers(parser, args, "benchmarks.host.cases") as workers:
        rows = [row for found in compare.rows(workers, requests(args.steps), args.rounds) for row in found]
    compare.table("milliseconds of a step, on the host", rows, {"ms": "seconds"}).print()
    if args.json:
        machine.write(args.json, machine.facts(), rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
