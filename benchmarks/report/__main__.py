"""Writes docs/benchmarks.md and its figures from what benchmarks.kernels and benchmarks.step have measured.

    python -m benchmarks.kernels --json benchmarks/data/kernels.json
    python -m benchmarks.kernels --targets --json benchmarks/data/kernels_targets.json
    python -m benchmarks.step --json benchmarks/data/step.json
    python -m benchmarks.report

It reads every kernels*.json and step*.json of --data, which are of one machine, and counts their runs together. The
page is docs/benchmarks.in.md, where the text is written, with tables in place of {{targets}}, {{machine}}, {{kernels}},
{{idioms}} and {{steps}}, and of what benchmarks.gpu wrote to the folders gpu/* of --data in place of {{gpu targets}},
{{gpu kernels}} and {{gpu steps}}, and the reports of benchmarks.methods in methods/* in place of {{methods}}.
Figures go to the folder figures beside the page. Nothing is measured here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import options
from benchmarks.harness.machine import text
from benchmarks.harness.tables import Table
from benchmarks.harness.targets import table as targets_table
from benchmarks.kernels import targets as kernel_targets
from benchmarks.report import gpu_tables, kernel_tables, method_tables, step_tables
from benchmarks.step import targets as step_targets

MACHINE = ("device", "processor", "torch", "python")  # figures of different ones do not go together


class Refused(Exception):
    """What cannot be reported, and why."""


def load(folder: Path) -> dict[str, list[dict]]:
    """Reports of each command, their runs told apart by file."""
    found: dict[str, list[dict]] = {"kernels": [], "step": []}
    first: tuple[str, list] | None = None
    for command, reports in found.items():
        for file in sorted(folder.glob(f"{command}*.json")):
            report = json.loads(file.read_text())
            if not isinstance(report, dict) or not report.keys() >= {"facts", "rows"}:
                raise Refused(f"{file}: got no facts and rows; accepted: files of benchmarks.{command} --json")
            machine = [report["facts"].get(name) for name in MACHINE]
            if first is not None and machine != first[1]:
                raise Refused(
                    f"{file}: measured on {machine}, {first[0]} on {first[1]}; accepted: files of one machine"
                )
            first = first or (str(file), machine)
            for row in report["rows"]:
                row["run"] = (file.name, row["run"])
            reports.append(report)
    if first is None:
        raise Refused(f"--data: {folder} has no kernels*.json or step*.json; accepted: a folder that has")
    return found


def page(template: str, reports: dict[str, list[dict]], more: dict[str, str]) -> str:
    """The template with its placeholders filled.

    Args:
        more: what those stand for that have no part in the reports.
    """
    kernels, steps = (_rows(reports[command]) for command in ("kernels", "step"))
    targets = targets_table([*kernel_targets.targets(kernels), *step_targets.targets(steps)])
    rows = [[*line, verdict.replace("missed", "**missed**")] for *line, verdict in targets.rows]
    parts = {
        "targets": Table(targets.columns, rows).markdown(),
        "machine": _machine([*reports["kernels"], *reports["step"]]),
        "idioms": kernel_tables.idioms(kernels),
        "kernels": "\n\n".join(kernel_tables.tables(kernels)) or "Not measured.",
        "steps": "\n\n".join(step_tables.tables(steps)) or "Not measured.",
        **more,
    }
    unknown = set(re.findall(r"{{(.*?)}}", template)) - set(parts)
    if unknown:
        raise Refused(f"the template has {{{{{unknown.pop()}}}}}; accepted: {', '.join(parts)}")
    return re.sub(r"{{(.*?)}}", lambda found: parts[found[1]], template)


def _rows(reports: Sequence[dict]) -> list[dict]:
    return [row for report in reports for row in report["rows"]]


def _machine(reports: Sequence[dict]) -> str:
    facts = {k: v for k, v in reports[0]["facts"].items() if k not in ("command", "arguments", "threads")}
    commands = [report["facts"].get("command", "") for report in reports]
    lines = Table(["machine", ""], [[name, text(value)] for name, value in facts.items()]).markdown()
    return lines + "\n\n```\n" + "\n".join([*commands, "python -m benchmarks.report"]) + "\n```"


def figures(reports: dict[str, list[dict]], folder: Path) -> None:
    """Draw what there are rows for."""
    from benchmarks.kernels import figure

    kernels, steps = (_rows(reports[command]) for command in ("kernels", "step"))
    folder.mkdir(exist_ok=True)
    if kernels:
        figure.against_floor(kernels).savefig(folder / "kernels.png", dpi=120)
        figure.by_size(kernels).savefig(folder / "kernels_size.png", dpi=120)
    if steps:
        step_tables.figure(steps).savefig(folder / "step.png", dpi=120)


def main(given: Sequence[str] | None = None) -> int:
    parser = options.parser("benchmarks.report", __doc__)
    add = partial(parser.add_argument, type=Path, metavar="FOLDER")
    add("--data", default=Path("benchmarks/data"), help="of the JSON files; default: %(default)s")
    add("--docs", default=Path("docs"), help="of the template and the page; default: %(default)s")
    args = parser.parse_args(given)
    template = args.docs / "benchmarks.in.md"
    if not template.is_file():
        parser.error(f"--docs: {args.docs} has no benchmarks.in.md; accepted: a folder that has")
    try:
        reports = load(args.data)
        more = gpu_tables.parts(args.data / "gpu") | method_tables.parts(args.data / "methods")
        written = page(template.read_text(), reports, more)
    except Refused as error:
        print(f"python -m benchmarks.report: {error}", file=sys.stderr)
        return 2
    (args.docs / "benchmarks.md").write_text(written)
    figures(reports, args.docs / "figures")
    print(f"{args.docs / 'benchmarks.md'}: written, with its figures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
