"""Tables and a figure of what `python -m benchmarks.convergence` has run.

    python -m benchmarks.convergence report DIR [--markdown docs/evidence.md] [--figure FILE]

Times are example-forwards and, where `speed` was run, seconds: up to those of the arm that uses up its forwards first.
To each target: the median over seeds of an arm's best setting, how many of its runs reached the target, and the
ratio to the baseline's time, paired by data order, with a 95 % interval (Student's t of the logarithms). A run that did
not reach the target within the budget is censored: a time beyond the budget, and a bound instead of a ratio.

Each arm's setting is chosen for each target, by the seeds that all its settings have, and shown with all its seeds. The
runs that chose it make it look a little too good, the more so the more settings there are. `(end: lr)` and `(end:
batch)` mark an end of the arm's grid, where a better one may lie beyond. Nothing is run here.

--markdown replaces what stands between the lines `<!-- tables -->` and `<!-- end of tables -->` of a file.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence import figure, speed, times
from benchmarks.convergence.store import Store
from benchmarks.convergence.study import Refused
from benchmarks.convergence.times import AXES, Best, Record, Setting
from benchmarks.harness import machine, options
from benchmarks.harness.tables import Table, shown

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
UNITS = {"forwards": "example-forwards", "seconds": "seconds"}
Arms = Mapping[str, dict[Setting, dict[int, Record]]]


def found_in(store: Store) -> tuple[dict[str, Any], list[Record]]:
    """What the cells of a folder share, with a budget for each axis, and those that are finished, with seconds if there
    are any."""
    study, found = store.study(), store.speed()
    records = [record for record in store.records() if record["status"] != "stopped"]
    if found is None:
        return study | {"seconds": 0}, records
    records = [times.timed(record, found["rows"]) for record in records]
    ends = [record["checkpoints"][-1]["seconds"] for record in records if record["status"] == "completed"]
    end = min(ends, default=0.0)
    return study | {"seconds": math.floor(end) or end, "speed": found}, records


def arms_of(records: Sequence[Record]) -> Arms:
    """The finished runs by arm and setting."""
    names = dict.fromkeys(record["cell"]["arm"] for record in records)
    found = {name: times.settings(records, name) for name in names}
    return {name: settings for name, settings in found.items() if settings}


def tables(study: Mapping[str, Any], arms: Arms) -> Iterator[Table]:
    """All of them."""
    axes = [axis for axis in AXES if study[axis]]
    for axis in axes:
        for name, target in study["targets"].items():
            yield _to_target(study, arms, axis, name, target)
    for axis in axes:
        yield _at_budget(study, arms, axis)
    if study["seconds"]:
        yield speed.table(study["speed"]["rows"])
    yield _signal(study, arms)


def _to_target(study: Mapping[str, Any], arms: Arms, axis: str, name: str, target: float) -> Table:
    budget = study[axis]
    best = {arm: times.fastest(found, target, axis, budget) for arm, found in arms.items()}
    time_of = {
        arm: {seed: times.time_to(run, target, axis, budget) for seed, run in one.runs.items()}
        for arm, one in best.items()
    }
    base = time_of.get(study["baseline"], {})
    lines = []
    for arm, one in best.items():
        own = time_of[arm]
        middle = times.median(list(own.values()))
        reached = sum(time.reached for time in own.values())
        held = sum(time.reached and times.holds(one.runs[seed], target) for seed, time in own.items())
        ratio = None if arm == study["baseline"] else times.ratio([(own[s], base[s]) for s in own if s in base])
        over = "" if arm == study["baseline"] else "none" if ratio is None else f"{ratio}, {_pairs(ratio.pairs)}"
        value = f"{'≤ ' * middle.early}{middle.value:.0f}" if middle.reached else f"> {budget:g}"
        lines.append([arm, value, f"{reached} of {len(own)}", str(held), over, _setting(one)])
    title = f"{UNITS[axis]} to {name} ({target:g})"
    columns = ["arm", UNITS[axis], "reached", "there at the end", f"over {study['baseline']}", "best setting"]
    return Table(columns, lines, title)


def _at_budget(study: Mapping[str, Any], arms: Arms, axis: str) -> Table:
    budget, lines, metric = study[axis], [], ""
    for arm, found in arms.items():
        one = times.lowest(found, axis, budget)
        metric = times.metric_of(next(iter(one.runs.values())))
        points = [times.loss_at(run, axis, budget) for run in one.runs.values()]
        figures = [_spread([point[name] for point in points], digits) for name, digits in (("loss", 4), (metric, 3))]
        lines.append([arm, *figures, str(len(points)), _setting(one)])
    columns = ["arm", f"{study['part']} loss", f"{study['part']} {metric}", "seeds", "best setting"]
    return Table(columns, lines, f"at {budget:g} {UNITS[axis]}: mean (least to most)")


def _signal(study: Mapping[str, Any], arms: Arms) -> Table:
    """|g|^2 and E |g_i|^2 in the first and the last tenth of the budget, of arms whose losses tell."""
    budget, lines = study["forwards"], []
    for arm, found in arms.items():
        one = times.lowest(found, "forwards", budget)
        line = [arm]
        for low, high in ((0.0, 0.1 * budget), (0.9 * budget, budget)):
            for name in ("squared_norm", "second_moment"):
                values = [
                    value
                    for run in one.runs.values()
                    for done, value in zip(run["steps"]["forwards"], run["steps"][name], strict=True)
                    if value is not None and low < done <= high
                ]
                line.append(shown(statistics.fmean(values) if values else None, ".3g"))
        if any(line[1:]):
            lines.append(line)
    columns = ["arm", *(f"{what}, {when} tenth" for when in ("first", "last") for what in ("|g|²", "E |g_i|²"))]
    return Table(columns, lines, "what the losses say of the gradient as the directions see it (no comparison of arms)")


def _setting(best: Best) -> str:
    ends = ", ".join(best.ends)
    return f"{best.setting} (end: {ends})" if ends else str(best.setting)


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count > 1)}"


def _spread(values: Sequence[float], digits: int) -> str:
    mean, low, high = (f"{x:.{digits}f}" for x in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def markdown(study: Mapping[str, Any], records: Sequence[Record], image: str | None) -> str:
    """The tables with headings, after what they are of."""
    arms = arms_of(records)
    parts = [
        f"{len(records)} finished cells; {_about(records[0]['facts'], ('torch', 'pgap_kernels'))}.",
        *([f"Seconds: {_about(study['speed']['facts'], machine.SPEED)}."] if study["seconds"] else []),
        *([f"![{study['part']} loss of each arm]({image})"] if image else []),
    ]
    for table in tables(study, arms):
        if table.rows:
            parts += [f"### {table.title[0].upper()}{table.title[1:]}", table.markdown()]
    return "\n\n".join(parts)


def _about(facts: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {machine.text(facts[name])}" for name in names if facts.get(name) is not None)


def insert(file: Path, text: str) -> None:
    """Put the tables into their place in a file."""
    page = file.read_text()
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise Refused(f"--markdown: {file} has no lines {BEGIN!r} and {END!r}; accepted: a file that has")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main(given: Sequence[str]) -> int:
    parser = options.parser("benchmarks.convergence report", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="of the results")
    add("--markdown", type=Path, metavar="FILE", help="a file with a place for the tables")
    add("--figure", type=Path, metavar="FILE", help="write the curves there")
    args = parser.parse_args(given)
    options.check_files(parser, args, ("markdown", "figure"))
    try:
        study, records = found_in(Store(args.folder))
        arms = arms_of(records)
        if not arms:
            raise Refused(f"{args.folder}: no cell is finished yet")
        for table in tables(study, arms):
            table.print()
        if args.figure:
            figure.draw(study, arms, args.figure)
        if args.markdown:
            image = None if args.figure is None else _relative(args.figure, args.markdown.parent)
            insert(args.markdown, markdown(study, records, image))
    except (Refused, OSError) as error:
        parser.error(str(error))
    return 0


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()
