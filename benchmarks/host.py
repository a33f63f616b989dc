"""Host seconds of a zeroth-order step: what the optimizer itself does, on tensors too small to matter.

    python -m benchmarks.host [--package PATH] [--json FILE]

Model     112 nn.Linear(8, 8), which are 224 tensors.
Forwards  constant: the closure returns a number, so that only the optimizer's own work remains. real: it runs the
          model, so that what hooks do counts too; two plain forwards are there to compare with.
Figures   median milliseconds of a step without a refresh, of all rounds. About 20 seconds a round; on an idle machine.
Package   another checkout to compare with, run in turn with this one, each time in a process of its own. One that is
          too old for `merge=` gathers the updates of mode folded: compare that with "folded, window" here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAYERS, WIDTH = 112, 8
FORWARDS, PLAIN = ("constant", "real"), "two plain forwards"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "MeZO inplace": ("MeZO", {"mode": "inplace"}),
    "MeZO two_pass": ("MeZO", {"mode": "inplace", "two_pass": True}),
    "MeZO scratch": ("MeZO", {"mode": "scratch"}),
    "P-GAP inplace": ("PGAP", {"mode": "inplace"}),
    "P-GAP scratch": ("PGAP", {"mode": "scratch"}),
    "P-GAP folded": ("PGAP", {"mode": "folded"}),
    "P-GAP folded, window": ("PGAP", {"mode": "folded", "merge": "window"}),
}


def measure(steps: int) -> list[dict]:
    """The rows of the package that this process imports, its refreshes before the steps that are timed."""
    import torch

    from pgap_kernels import optim

    rows = []
    for name, forwards in [(PLAIN, "real"), *itertools.product(CASES, FORWARDS)]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        x, made_up = torch.randn(4, WIDTH), itertools.cycle((1.0, 1.001))
        closure = {"constant": lambda: next(made_up), "real": lambda: model(x).square().mean()}[forwards]  # noqa: B023
        if name == PLAIN:
            step = torch.no_grad()(lambda: (closure().item(), closure().item()))  # noqa: B023
        else:
            method, options = CASES[name]
            options = {"rank": 4, "window": 1 << 30, **options} if method == "PGAP" else options
            try:
                optimizer = getattr(optim, method)(model, allow_unused=True, **options)
            except TypeError as error:
                if "merge" not in str(error):
                    raise
                continue
            step = lambda: optimizer.step(closure)  # noqa: B023, E731
        seconds = []
        for _ in range(3 + steps):  # the first refreshes, looks for stray uses of weights, and enters a schedule
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        rows.append({"case": name, "forwards": forwards, "seconds": statistics.median(seconds[3:])})
    return rows


def measured(package: Path, steps: int) -> list[dict]:
    """The rows of a checkout, by a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(package.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(steps), str(package.resolve())]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def main(given: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    from benchmarks import machine

    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__, formatter_class=shape)
    parser.add_argument("--package", type=Path, metavar="PATH", help="another checkout, timed in turns with this one")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine there")
    args = parser.parse_args(given)
    if min(args.steps, args.rounds) < 1:
        parser.error(f"--steps, --rounds: got {args.steps}, {args.rounds}; accepted: integers of at least 1")
    if args.package and not (args.package / "pgap_kernels" / "__init__.py").is_file():
        parser.error(f"--package: {str(args.package)!r} has no folder pgap_kernels; accepted: a checkout that has")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {str(args.json.parent)!r}; create it first")
    packages = {"here": Path(__file__).resolve().parents[1]} | ({"there": args.package} if args.package else {})
    turns = [name for _ in range(args.rounds) for name in packages]
    rows = [{"package": name, **row} for name in turns for row in measured(packages[name], args.steps)]
    columns = list(itertools.product(FORWARDS, packages))
    table = Table("case", *map(", ".join, columns), title="milliseconds of a step, on the host")
    for case in (PLAIN, *CASES):
        own = [[r["seconds"] for r in rows if (r["case"], r["forwards"], r["package"]) == (case, *c)] for c in columns]
        table.add_row(case, *(f"{1e3 * statistics.median(seconds):.2f}" if seconds else "-" for seconds in own))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if args.json:
        machine.write(args.json, machine.facts(), rows)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():  # a process of ``measured``
        import pgap_kernels

        assert Path(sys.argv[2]) in Path(pgap_kernels.__file__).parents, f"imported {pgap_kernels.__file__}"
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        raise SystemExit(main())
