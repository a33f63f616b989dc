"""Tables and a figure of what `python -m benchmarks.convergence` has run.

    python -m benchmarks.convergence report DIR [--beside DIR] [--markdown docs/evidence.md] [--figure FILE]

Times are example-forwards and, where `speed` was run, seconds: up to those of the arm that uses up its forwards first.
To each target: the median over seeds of an arm's best setting, how many of its runs reached the target, and the
ratio to the baseline's time, paired by data order, with a 95 % interval (Student's t of the logarithms). A run that did
not reach the target within the budget is censored: a time beyond the budget, and a bound instead of a ratio.

Each arm's setting is chosen for each target, by the seeds that all its settings have, and shown with all its seeds. The
runs that chose it make it look a little too good, the more so the more settings there are. `(end: lr)` and `(end:
batch)` mark an end of the arm's grid, where a better one may lie beyond. Nothing is run here.

--beside names another folder of the study, run on another machine: the cells that both have are compared by what they
came to. Forwards are rounded otherwise there, so the difference is what rounding alone makes of a run.

--markdown replaces what stands between the lines `<!-- tables -->` and `<!-- end of tables -->` of a file.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
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
    whole = [r for r in records if r["status"] == "completed" and r["cell"]["forwards"] is None]
    ends = [record["checkpoints"][-1]["seconds"] for record in whole]
    end = min(ends, default=0.0)
    return study | {"seconds": math.floor(end) or end, "speed": found}, records


def arms_of(records: Sequence[Record]) -> Arms:
    """The finished runs by arm and setting."""
    names = dict.fromkeys(record["cell"]["arm"] for record in records)
    found = {name: times.settings(records, name) for name in names}
    return {name: settings for name, settings in found.items() if settings}


def tables(study: Mapping[str, Any], arms: Arms) -> Iterator[Table]:
    """All of them; arms come in the order of their loss at the end, after the baseline."""
    at = "forwards", study["forwards"]
    ends = {arm: times.mean_loss(times.lowest(found, *at).runs, *at) for arm, found in arms.items()}
    arms = {arm: arms[arm] for arm in sorted(arms, key=lambda arm: (arm != study["baseline"], ends[arm]))}
    for axis in AXES:
        if study[axis]:
            yield from _of_axis(study, arms, axis)
    if study["seconds"]:
        yield speed.table(study["speed"]["rows"])
    yield _signal(study, arms)


def _of_axis(study: Mapping[str, Any], arms: Arms, axis: str) -> Iterator[Table]:
    """Times and the loss at the budget; ratios of times; the settings that they are of."""
    budget, baseline, targets = study[axis], study["baseline"], study["targets"]
    measured, ratios, settings, metric = [], [], [], ""
    best = {
        (arm, name): times.fastest(found, target, axis, budget)
        for arm, found in arms.items()
        for name, target in targets.items()
    }
    time_of = {
        key: {seed: times.time_to(run, targets[key[1]], axis, budget) for seed, run in one.runs.items()}
        for key, one in best.items()
    }
    for arm, found in arms.items():
        last = times.lowest(found, axis, budget)
        metric = times.metric_of(next(iter(last.runs.values())))
        points = [times.loss_at(run, axis, budget) for run in last.runs.values()]
        figures = [_spread([point[name] for point in points], digits) for name, digits in (("loss", 4), (metric, 3))]
        reached = [_time(time_of[arm, name], best[arm, name], targets[name], budget) for name in targets]
        measured.append([arm, *reached, *figures, str(len(points))])
        settings.append([arm, *(_setting(best[arm, name]) for name in targets), _setting(last)])
        if arm != baseline and baseline in arms:
            ratios.append([arm, *(_ratio(time_of[arm, name], time_of[baseline, name]) for name in targets)])
    unit, to = UNITS[axis], [f"to {target:g} ({name})" for name, target in targets.items()]
    what, at = study["part"], f"at {budget:g} {unit}"
    heads = ["arm", *to, f"{what} loss {at}", f"{what} {metric} {at}", "seeds of these two"]
    yield Table(heads, measured, f"{unit} to a {what} loss, and what is reached {at}", MEASURED)
    yield Table(["arm", *to], ratios, f"{unit}, over those of {baseline}", RATIOS)
    yield Table(["arm", *to, at], settings, f"settings that these {unit} are of", SETTINGS)


MEASURED = (
    "Less is better, except for the metric. Times: the median over all runs; one that never reached the target counts "
    "as later than any. (2 of 3, 1 ↗): two of three reached it, and one of these was above it again at its end. "
    "Losses and metric: the mean, and least to most."
)
RATIOS = (
    "0.50×: in half of what the baseline takes, with the same order of the data; in parentheses a 95 % interval over "
    "seeds, for these test examples. ≤ and ≥: bounds, as some run was there before it was first evaluated, or never."
)
SETTINGS = (
    "Chosen by the seeds that all settings of the arm have. (end: lr), (end: batch): an end of the arm's grid, beyond "
    "which a better one may lie."
)


def _time(own: Mapping[int, times.Time], best: Best, target: float, budget: float) -> str:
    """The median, how many runs are there, and how many of these were there only for a while."""
    middle = times.median(list(own.values()))
    reached = [seed for seed, time in own.items() if time.reached]
    left = sum(not times.holds(best.runs[seed], target) for seed in reached)
    value = f"{'≤ ' * middle.early}{middle.value:.0f}" if middle.reached else f"> {budget:g}"
    return f"{value} ({len(reached)} of {len(own)}{f', {left} ↗' if left else ''})"


def _ratio(own: Mapping[int, times.Time], base: Mapping[int, times.Time]) -> str:
    """With the number of pairs, where a run of either has no partner in the other."""
    seeds = [seed for seed in own if seed in base]
    ratio = times.ratio([(own[seed], base[seed]) for seed in seeds])
    most = max(len(own), len(base))
    pairs = f"{len(seeds)} of {most} pairs" if len(seeds) < most else f"{most} pair{'s' * (most > 1)}"
    return f"{'none' if ratio is None else ratio}, {pairs}"


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
    columns = ["arm", *(f"{what}, {when} tenth" for when in ("first", "last") for what in ("‖g‖²", "E ‖g_i‖²"))]
    return Table(columns, lines, "what the losses say of the gradient as the directions see it (no comparison of arms)")


def _setting(best: Best) -> str:
    ends = ", ".join(best.ends)
    return f"{best.setting} (end: {ends})" if ends else str(best.setting)


def _spread(values: Sequence[float], digits: int) -> str:
    mean, low, high = (f"{x:.{digits}f}" for x in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def twice(records: Sequence[Record], others: Sequence[Record]) -> Table:
    """The loss that each cell came to, in both of its runs."""
    found = {_key(record): record for record in others}
    pairs = [(record, found[_key(record)]) for record in records if _key(record) in found]
    lines = []
    for one, other in pairs:
        here, there = (run["checkpoints"][-1]["loss"] for run in (one, other))
        values = [f"{here:.4f}", f"{there:.4f}", f"{there - here:+.4f}"]
        lines.append([one["cell"]["arm"], str(times.setting_of(one)), str(one["cell"]["data_seed"]), *values])
    where = ["; ".join(dict.fromkeys(_machine(run["facts"]) for run in runs)) for runs in zip(*pairs, strict=True)]
    columns = ["arm", "setting", "seed", *(f"loss at the end, {text}" for text in where), "difference"]
    return Table(columns, lines, "the same cells on two machines")


def _key(record: Record) -> str:
    return json.dumps(record["cell"], sort_keys=True)


def _machine(facts: Mapping[str, Any]) -> str:
    """What a cell ran on, and by which torch."""
    return f"{facts.get('device') or facts.get('processor')}, torch {facts['torch']}"


def markdown(
    study: Mapping[str, Any], records: Sequence[Record], image: str | None, others: Sequence[Record] = ()
) -> str:
    """The tables with headings, after what they are of."""
    arms = arms_of(records)
    machines = Counter(_machine(record["facts"]) for record in records)
    parts = [
        f"{len(records)} finished cells ({_seeds(records)}).",
        f"Run on: {'; '.join(f'{name} ({count})' for name, count in machines.most_common())}.",
        *([f"Seconds: {_about(study['speed']['facts'], machine.SPEED)}."] if study["seconds"] else []),
        *([f"![{study['part']} loss of each arm]({image})"] if image else []),
    ]
    for table in (*tables(study, arms), twice(records, others)):
        if table.rows:
            parts += [f"### {table.title[0].upper()}{table.title[1:]}", table.markdown()]
            parts += [table.caption] if table.caption else []
    return "\n\n".join(parts)


def _seeds(records: Sequence[Record]) -> str:
    counts = Counter(record["cell"]["data_seed"] for record in records)
    return ", ".join(f"{count} with seed {seed}" for seed, count in sorted(counts.items()))


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
    add("--beside", type=Path, metavar="DIR", help="cells that ran on another machine, too")
    add("--markdown", type=Path, metavar="FILE", help="a file with a place for the tables")
    add("--figure", type=Path, metavar="FILE", help="write the curves there")
    args = parser.parse_args(given)
    options.check_files(parser, args, ("markdown", "figure"))
    try:
        study, records = found_in(Store(args.folder))
        arms = arms_of(records)
        if not arms:
            raise Refused(f"{args.folder}: no cell is finished yet")
        others = Store(args.beside).records() if args.beside else []
        for table in (*tables(study, arms), twice(records, others)):
            if table.rows:
                table.print()
        if args.figure:
            figure.draw(study, arms, args.figure)
        if args.markdown:
            image = None if args.figure is None else _relative(args.figure, args.markdown.parent)
            insert(args.markdown, markdown(study, records, image, others))
    except (Refused, OSError) as error:
        parser.error(str(error))
    return 0


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()
