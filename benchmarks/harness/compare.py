"""This tree against another commit: a process for each, which take turns, and the ratio of their figures."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import timer
from benchmarks.harness.checkouts import ROOT, NoCheckout, Worker, checkout
from benchmarks.harness.tables import Table, range_of

THIS, BASE = "this", "base"
HELP = """\
Against another commit (--base REF, or --package PATH for a checkout that is built already): each of the two packages is
measured in a process of its own by this tree's benchmarks. The two take turns, --rounds times at each case. `this/base`
is the median of the rounds' ratios, with their range; below 1 this tree is the faster one.
"""


def add_options(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """--base, --package and --rounds."""
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--base", metavar="REF", help="a commit to compare with; it is checked out and built for a time")
    other.add_argument("--package", type=Path, metavar="PATH", help="a checkout to compare with, its extension built")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each at a case; default: %(default)s")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A checkout that is none is refused."""
    if args.package and not (args.package / "pgap_kernels" / "__init__.py").is_file():
        parser.error(f"--package: {str(args.package)!r} has no folder pgap_kernels; accepted: a checkout that has")


@contextmanager
def workers(parser: argparse.ArgumentParser, args: argparse.Namespace, module: str) -> Iterator[dict[str, Worker]]:
    """A process for this tree, and one for the other commit if one was named."""
    with ExitStack() as stack:
        packages = {THIS: ROOT}
        if args.package:
            packages[BASE] = args.package
        if args.base:
            try:
                packages[BASE] = stack.enter_context(checkout(args.base))
            except NoCheckout as error:
                parser.error(f"--base: {error}")
        yield {name: stack.enter_context(Worker(package, module)) for name, package in packages.items()}


def rows(workers: dict[str, Worker], requests: Sequence[dict[str, Any]], rounds: int) -> Iterator[list[dict]]:
    """The rows of each request, with the package that they are of and their round."""
    names = list(workers)
    for request in requests:
        found = []
        for i, (turn,) in timer.turns([rounds] * len(names)):
            answer = workers[names[i]].ask(request)
            found += [{"package": names[i], "round": turn + 1, **row} for row in answer]
        yield found


def table(title: str, rows: Sequence[dict], figures: dict[str, str]) -> Table:
    """A line for each case: for each figure this tree's milliseconds, the other's, and their ratio.

    Args:
        figures: headings, and the key under which a row has the seconds.
    """
    columns = ["case"]
    for heading in figures:
        columns += [f"{heading}, {THIS}", f"{heading}, {BASE}", f"{THIS}/{BASE}"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        line = [case]
        for key in figures.values():
            seconds = [_by_round(own, name, key) for name in (THIS, BASE)]
            line += [f"{1e3 * statistics.median(s.values()):.3f}" if s else "" for s in seconds]
            ratios = [s / seconds[1][turn] for turn, s in seconds[0].items() if seconds[1].get(turn)]
            line.append(range_of(ratios, 3) if ratios else "")
        reasons = {f"{row['package']}: {row['unmeasured']}" for row in own if "unmeasured" in row}
        lines.append([*line, "; ".join(sorted(reasons))])
    return Table([*columns, "not measured"], lines, title)


def _by_round(rows: Sequence[dict], package: str, key: str) -> dict[int, float]:
    return {row["round"]: row[key] for row in rows if row["package"] == package and row.get(key) is not None}
