"""benchmarks.convergence on a tiny model: cells run, stop and go on; times are told as the protocol has it."""

from __future__ import annotations

import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from support.finetune_tiny import csv_file, tiny_model

from benchmarks.convergence import __main__ as program
from benchmarks.convergence import figure, report, run, times
from benchmarks.convergence.store import Store
from benchmarks.convergence.study import DEFAULT, SCHEDULES, Refused, Study, load
from benchmarks.convergence.times import Ratio, Setting, Time
from benchmarks.harness import batches
from pgap_kernels.perturbation import Folded, InPlace

STUDY = """
baseline = "MeZO"
forwards = 120
first_checkpoint = 16
targets = {{ early = 0.001 }}
part = "test"
seeds = {{ data = [0], directions = [7] }}
task = {{ model = "{model}", data = "{data}", train_size = 40, dev_size = 10, test_size = 20 }}

[[arms]]
name = "MeZO"
method = "mezo"
batch = [4]
schedule = ["linear"]
lr = [1e-3]
options = {{ mode = "inplace" }}

[[arms]]
name = "P-GAP"
method = "pgap"
batch = [2]
schedule = ["constant"]
lr = [1e-3]

[arms.options]
rank = 4
window = 3
probes = 2
mode = "folded"
merge = "window"
members = 4
groups = 2
directions = 4
baseline = "loo"
"""


@pytest.fixture
def config(tmp_path, set_threads):
    set_threads(1)
    data = csv_file(tmp_path / "data.csv")
    file = tmp_path / "study.toml"
    file.write_text(STUDY.format(model=tiny_model(tmp_path / "llama", "llama"), data=data))
    return file


@pytest.fixture
def study(config) -> Study:
    return load(config)


def go(cell, study, store, over=lambda: False):
    return run.run_cell(cell, study, store, torch.device("cpu"), lambda share: None, over)


def after(steps: int):
    """Is true when asked for the time after so many."""
    asked = iter(range(steps))
    return lambda: next(asked, None) is None


# ---- the study ------------------------------------------------------------------------------------------------------


def test_cells_of_the_study_come_in_the_order_of_interest():
    study = load(DEFAULT)
    arms = list(dict.fromkeys(cell.arm for cell in study.cells))
    repeats = list(dict.fromkeys(cell.data_seed for cell in study.cells))
    assert len(repeats) >= 3
    entries = next(number for number, cell in enumerate(study.cells) if cell.data_seed != repeats[0])
    first = study.cells[: entries * len(repeats)]
    assert {(cell.arm, cell.data_seed) for cell in first} == {(arm, seed) for arm in arms for seed in repeats}
    assert len({(cell.batch, cell.schedule, cell.lr) for cell in first if cell.arm == "P-GAP, K = 8"}) == 1
    mezo = {(c.batch, c.lr) for c in study.cells if c.arm == "MeZO"}
    assert mezo >= {(16, 6e-5), (16, 9.6e-4), (4, 3e-5), (4, 1.2e-4), (1, 7.5e-6), (1, 3e-5)}
    mezo = {(c.batch, c.schedule, c.forwards) for c in study.cells if c.arm == "MeZO"}
    assert {(1, "constant", None), (1, "linear_to_zero", 2400)} < mezo
    for cell in study.cells:
        assert cell.batch % cell.options.get("groups", 1) == 0 and cell.data_seed != cell.direction_seed


def test_a_study_that_cannot_be_run_is_refused(config):
    text = config.read_text()
    for old, new, message in (
        ('method = "mezo"', 'method = "meso"', "got method 'meso'"),
        ('"linear"', '"cosine"', "got schedule 'cosine'"),
        ('baseline = "MeZO"', 'baseline = "SGD"', "baseline: got 'SGD'"),
        ("first_checkpoint = 16", "", "'first_checkpoint' is unknown or missing"),
        ("lr = [1e-3]", "lr = [1e-3, 1e-3]", "several cells"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(Refused, match=message):
            load(config)
    config.write_text(text)
    assert [cell.arm for cell in load(config, only=["P-GAP"]).cells] == ["P-GAP"]


def test_schedules_start_at_one_and_do_not_rise():
    for schedule in SCHEDULES.values():
        values = [schedule(used / 10) for used in range(30)]
        assert values[0] == 1 and values == sorted(values, reverse=True) and values[9] > 0


# ---- cells ----------------------------------------------------------------------------------------------------------


def test_the_program_from_cells_to_report(config, tmp_path, capsys, monkeypatch):
    folder, page = tmp_path / "results", tmp_path / "page.md"
    command = ["--config", str(config), "--json", str(folder)]
    assert program.main([*command, "--max-minutes", "0"]) == 0
    assert "stopped; 2 of 2 cells are left" in capsys.readouterr().out
    assert program.main(command) == 0
    records = {record["cell"]["arm"]: record for record in Store(folder).records()}
    for arm, rows, first in (("MeZO", 8, 8), ("P-GAP", 8, 16)):  # a refresh is four points, and so is a step
        steps, points = records[arm]["steps"], records[arm]["checkpoints"]
        assert records[arm]["status"] == "completed" and steps["forwards"][0] == first
        assert steps["forwards"][-1] >= 120 > steps["forwards"][-2]
        assert all((b - a) % rows == 0 for a, b in zip(steps["forwards"], steps["forwards"][1:], strict=False))
        assert points[0]["forwards"] == 0 and points[-1]["forwards"] == steps["forwards"][-1]
        assert {p["forwards"] for p in points[1:]} <= {*steps["forwards"]} and 5 < len(points) < 15
        assert (steps["second_moment"][0] is not None) == (arm == "P-GAP")
    # What is finished is not run again.
    monkeypatch.setattr(run, "Run", None)
    capsys.readouterr()
    assert program.main(command) == 0
    assert "all cells are finished" in capsys.readouterr().out
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter")
    given = ["report", str(folder), "--markdown", str(page), "--figure", str(tmp_path / "curves.png")]
    assert program.main(given) == 0
    assert "(0 of 1)" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert "| P-GAP | > 120 (0 of 1) | " in text and "| P-GAP | none, 1 pair |" in text
    assert "| P-GAP | batch 2, constant, lr 0.001 (end: lr) | batch 2, " in text
    assert "(curves.png)" in text and (tmp_path / "curves.png").stat().st_size > 10_000
    assert "seconds" not in text, "nobody has measured any"
    # Seconds of each kind of step, taken in turns.
    monkeypatch.undo()
    assert program.main(["speed", str(folder), "--config", str(config), "--turns", "6"]) == 0
    rows = {(row["arm"], row["forwards"]): row for row in Store(folder).speed()["rows"]}
    assert {key: row["turns"] for key, row in rows.items()} == {("MeZO", 8): 5, ("P-GAP", 16): 1, ("P-GAP", 8): 4}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert program.main(given) == 0
    assert "### Seconds to a test loss" in page.read_text() and "Seconds: processor" in page.read_text()


def test_a_cell_of_generated_answers_reports_their_metric(config, tmp_path):
    config.write_text(config.read_text().replace("test_size", 'task = "generation", max_new_tokens = 2, test_size'))
    study, store = load(config, only=["P-GAP"]), Store(tmp_path / "results")
    store.begin(study)
    record = go(study.cells[0], study, store)
    assert record["status"] == "completed" and {"f1", "exact_match"} < set(record["checkpoints"][-1])
    assert "test f1" in report.markdown(*report.found_in(store), None)


@pytest.mark.parametrize("arm", ["MeZO", "P-GAP"])
def test_captured_forwards_read_the_batch_of_their_step(study, arm, monkeypatch):
    """On a GPU a graph reads the tensors that it was captured with. Here the forward runs, on the same tensors."""
    cell = next(cell for cell in study.cells if cell.arm == arm)
    plain, captured = (run.Run(cell, study, torch.device("cpu")) for _ in range(2))
    shapes = []

    def stand_in(optimizer, closure):
        shapes.append(captured.batch(len(captured.record["steps"]["losses"])).inputs["input_ids"].shape)
        return closure

    monkeypatch.setattr(run, "CapturedClosure", stand_in)
    captured._captures = True
    for one in (plain, captured):
        for _ in range(8):
            one.step()
    assert captured.record["steps"] == plain.record["steps"]
    assert len(shapes) == len({*shapes}) == len({plain.batch(n).inputs["input_ids"].shape for n in range(8)}) < 8


def test_cells_at_a_time_are_those_in_turn(config, study, tmp_path, capsys):
    folder = tmp_path / "results"
    assert program.main(["--config", str(config), "--json", str(folder), "--parallel", "2"]) == 0
    for cell in study.cells:
        found, straight = Store(folder).read(cell), go(cell, study, Store(tmp_path))
        assert found["status"] == "completed"
        losses = straight["steps"]["losses"][: len(found["steps"]["losses"])]
        assert found["steps"]["losses"] == pytest.approx(losses, rel=1e-4)  # not by as many threads


@pytest.mark.parametrize("arm", ["MeZO", "P-GAP"])
@pytest.mark.parametrize("how", ["time", "ctrl-c", "ctrl-c in an update"])
def test_a_stopped_cell_goes_on_where_it_was(study, tmp_path, arm, how, monkeypatch):
    cell = next(cell for cell in study.cells if cell.arm == arm)
    straight = go(cell, study, Store(tmp_path))
    store = Store(tmp_path / "stopped")
    store.begin(study)
    if how == "time":
        assert go(cell, study, store, after(2))["status"] == "stopped"
    elif how == "ctrl-c in an update":
        update, left = InPlace.apply if arm == "MeZO" else Folded.apply, iter(range(2))

        def killed(*args):
            if next(left, None) is None:
                signal.raise_signal(signal.SIGINT)  # noted, and raised when the step is over
            return update(*args)

        with monkeypatch.context() as patched:
            patched.setattr(InPlace if arm == "MeZO" else Folded, "apply", killed)
            taken = go(cell, study, store)
            assert taken["status"] == "stopped" and len(taken["steps"]["losses"]) == 3
    else:
        losses = batches.loss
        calls = iter(range(4))  # three forwards are tries; then one refreshes, and the step is undone

        def interrupted(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return losses(*args)

        with monkeypatch.context() as patched:
            patched.setattr(batches, "loss", interrupted)
            assert go(cell, study, store)["status"] == "stopped"
    assert not store.finished(cell)
    record = go(cell, study, store)
    assert store.finished(cell) and record["status"] == "completed"
    assert [file.name for file in store.folder.glob("*.pt")] == []
    assert record["steps"]["forwards"] == straight["steps"]["forwards"]
    if (arm, how) == ("MeZO", "time"):
        assert record["steps"]["losses"] == straight["steps"]["losses"]
        assert [p["loss"] for p in record["checkpoints"]] == [p["loss"] for p in straight["checkpoints"]]
    else:  # Weights were rounded once more, by a merge or a restore: 2^-24 of them, over eps in the slope.
        assert record["steps"]["losses"] == pytest.approx(straight["steps"]["losses"], rel=1e-4)


def test_a_run_that_diverges_is_finished(config, tmp_path):
    config.write_text(config.read_text().replace("lr = [1e-3]", "lr = [1e30]", 1))
    study, store = load(config, only=["MeZO"]), Store(tmp_path)
    record = go(study.cells[0], study, store)
    assert record["status"] == "diverged" and "lr" in record["error"] and store.finished(study.cells[0])
    assert times.time_to(record, 0.001, "forwards", 120) == Time(120, False)
    assert times.loss_at(record, "forwards", 120)["loss"] == math.inf


def test_a_folder_keeps_the_study_that_it_was_begun_with(config, study, tmp_path):
    store = Store(tmp_path / "results")
    store.begin(study)
    store.begin(load(config, only=["MeZO"]))
    config.write_text(config.read_text().replace("early = 0.001", "early = 0.5"))
    with pytest.raises(Refused, match="targets: got"):
        store.begin(load(config))
    go(study.cells[0], study, store)
    config.write_text(config.read_text().replace('mode = "inplace"', 'mode = "scratch"'))
    with pytest.raises(Refused, match="accepted: the same"):
        store.finished(load(config).cells[0])


def test_no_file_is_half_written(study, tmp_path, monkeypatch):
    store, cell = Store(tmp_path / "results"), study.cells[0]
    store.begin(study)
    store.stop(cell, {"cell": None, "status": "stopped"}, {})
    before = {file.name: file.read_bytes() for file in store.folder.iterdir()}
    monkeypatch.setattr(torch, "save", lambda value, to: to.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.stop(cell, {}, {})
    assert before.items() <= {file.name: file.read_bytes() for file in store.folder.iterdir()}.items()


# ---- times ----------------------------------------------------------------------------------------------------------


def record(losses, arm="A", seed=0, lr=1.0, batch=1, schedule="constant", step=10, forwards=None) -> dict:
    """A run whose checkpoints are ``step`` forwards, and half as many seconds, apart."""
    points = [{"step": i, "forwards": step * i, "loss": y, "accuracy": 0.5} for i, y in enumerate(losses)]
    points = [point | {"seconds": point["forwards"] / 2} for point in points]
    cell = {"arm": arm, "data_seed": seed, "lr": lr, "batch": batch, "schedule": schedule, "forwards": forwards}
    count = len(losses) - 1
    steps = {"forwards": [step * (i + 1) for i in range(count)]}
    steps |= {"squared_norm": [None] * count, "second_moment": [4.0] * count}
    return {
        "cell": cell,
        "status": "completed",
        "checkpoints": points,
        "steps": steps,
        "facts": {"processor": "one", "torch": "2"},
    }


def test_times_interpolate_and_are_censored_at_the_budget():
    curve = record([1.0, 0.8, 0.4, 0.6])
    assert times.time_to(curve, 0.6, "forwards", 30) == pytest.approx((15.0, True, False))
    assert times.time_to(curve, 0.6, "seconds", 15) == pytest.approx((7.5, True, False))
    assert times.time_to(curve, 0.6, "forwards", 14) == (14, False, False)
    assert times.time_to(curve, 0.3, "forwards", 30) == (30, False, False)
    assert times.time_to(curve, 0.9, "forwards", 30) == (10.0, True, True), "where before that, nobody saw"
    assert times.time_to(curve, 0.9, "forwards", 9) == (9, False, False), "nobody saw it within the budget"
    assert times.loss_at(record([1.0, math.nan]), "forwards", 10)["loss"] == math.inf
    assert times.loss_at(curve, "seconds", 8.0) == {"loss": pytest.approx(0.56), "accuracy": 0.5}
    assert times.loss_at(curve, "forwards", 40)["loss"] == 0.6, "a run that has ended stays as it is"
    assert times.loss_at(curve | {"status": "diverged"}, "forwards", 30)["loss"] == 0.6
    assert times.loss_at(curve | {"status": "diverged"}, "forwards", 31)["loss"] == math.inf
    assert times.holds(curve, 0.6) and not times.holds(curve, 0.5)
    assert not times.holds(curve | {"status": "diverged"}, 0.6)
    with pytest.raises(Refused, match="the loss starts at 1"):
        times.time_to(curve, 1.0, "forwards", 30)


def test_the_best_setting_reaches_the_target_most_often_then_first():
    often = [record([1.0, 0.9, 0.4], seed=s, lr=2.0) for s in range(3)]
    fast = [record([1.0, 0.4, 0.4], seed=s, lr=4.0) for s in range(2)] + [record([1.0, 1.0, 1.0], seed=2, lr=4.0)]
    stopped = [record([1.0, 0.1], seed=s, lr=8.0) | {"status": "stopped"} for s in range(3)]
    found = times.settings([*often, *fast, *stopped], "A")
    assert set(found) == {Setting(1, "constant", 2.0), Setting(1, "constant", 4.0)}
    best = times.fastest(found, 0.5, "forwards", 20)
    assert best.setting.lr == 2.0 and best.ends == ("lr",) and sorted(best.runs) == [0, 1, 2]
    inner = [record([1.0, 0.9, 0.9], seed=s, lr=1.0) for s in range(3)]
    found = times.settings([*often, *fast, *inner], "A")
    assert times.fastest(found, 0.5, "forwards", 20).ends == ()
    assert times.fastest(found, 0.2, "forwards", 20).setting.lr == 2.0, "none is there: the least loss"
    large = [record([1.0, 0.9, 0.3], seed=s, lr=2.0, batch=4) for s in range(3)]
    assert times.fastest(times.settings([*often, *large], "A"), 0.5, "forwards", 20).ends == ("lr", "batch")
    larger = [record([1.0, 0.9, 0.45], seed=s, lr=2.0, batch=8) for s in range(3)]
    assert times.fastest(times.settings([*large, *larger], "A"), 0.4, "forwards", 20).ends == ("lr", "batch")
    assert times.fastest(times.settings([*often, *larger], "A"), 0.5, "forwards", 20).ends == ("lr",), "none below 1"
    assert times.lowest(found, "forwards", 20).setting.lr == 2.0


def test_settings_are_compared_by_the_seeds_that_all_have():
    three = [record([1.0, 0.9, y], seed=s, lr=2.0) for s, y in enumerate((0.4, 0.1, 0.1))]
    one = [record([1.0, 0.9, 0.3], seed=0, lr=1.0), record([1.0, 0.9, 0.5], seed=0, lr=4.0)]
    other = [record([1.0, 0.0, 0.0], seed=2, lr=8.0)]
    best = times.lowest(times.settings([*three, *one, *other], "A"), "forwards", 20)
    assert best.setting.lr == 1.0 and best.ends == ("lr",), "by seed 0; the setting without it is not compared"
    best = times.lowest(times.settings([*three, *one[1:]], "A"), "forwards", 20)
    assert best.setting.lr == 2.0 and sorted(best.runs) == [0, 1, 2], "shown with all its seeds"


def test_ratios_are_geometric_means_over_pairs_with_an_interval():
    pairs = [(Time(2.0, True), Time(4.0, True)), (Time(8.0, True), Time(8.0, True)), (Time(1.0, True), Time(4.0, True))]
    found = times.ratio(pairs)
    # Logarithms -1, 0 and -2 of base 2: mean -1, s = 1, and t = 4.3027 for two degrees of freedom.
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 2 ** (-1 - half), 2 ** (-1 + half)))
    assert times.ratio(pairs[:1]) == Ratio(pytest.approx(0.5), "", 1)


def test_censored_times_give_bounds_and_are_not_dropped():
    both, early = (Time(2.0, True), Time(4.0, True)), (Time(9.0, True), Time(9.0, True))
    late, lost, neither = (
        (Time(8.0, False), Time(4.0, True)),
        (Time(2.0, True), Time(8.0, False)),
        (Time(8, False),) * 2,
    )
    assert times.ratio([both, late]) == Ratio(pytest.approx(1.0), "≥", 2)
    assert times.ratio([early, lost]) == Ratio(pytest.approx(0.5), "≤", 2)
    assert times.ratio([both, neither]) is times.ratio([late, lost]) is times.ratio([]) is None
    assert times.median([Time(5.0, True), Time(8.0, False), Time(8.0, False)]) == (8.0, False, False)
    assert times.median([Time(5.0, True), Time(8.0, False)]) == (8.0, False, False), "of two the later"


def test_times_before_the_first_evaluation_give_bounds():
    exact, early = Time(4.0, True), Time(2.0, True, early=True)
    assert times.ratio([(early, exact)]) == Ratio(pytest.approx(0.5), "≤", 1)
    assert times.ratio([(exact, early)]) == Ratio(pytest.approx(2.0), "≥", 1)
    assert times.ratio([(early, early)]) is times.ratio([(early, exact), (exact, early)]) is None
    assert times.ratio([(Time(8.0, False), early)]) == Ratio(pytest.approx(4.0), "≥", 1)


def test_seconds_are_those_of_the_steps_that_a_run_took():
    refreshed = record([1.0, 0.9, 0.8, 0.7])
    refreshed["steps"]["forwards"] = [30, 40, 50]
    rows = [
        {"arm": "A", "batch": 1, "forwards": 10, "seconds": 2.0},
        {"arm": "B", "batch": 1, "forwards": 30, "seconds": 9},
    ]
    with pytest.raises(Refused, match="no step of A with 1 examples and 30 example-forwards"):
        times.timed(refreshed, rows)
    rows.append({"arm": "A", "batch": 1, "forwards": 30, "seconds": 7.0})
    assert [point["seconds"] for point in times.timed(refreshed, rows)["checkpoints"]] == [0.0, 7.0, 9.0, 11.0]


def test_mean_curves_are_of_the_same_places():
    mean = figure.mean_curve([[(1.0, 1.0), (3.0, 0.0)], [(1.0, 2.0), (2.0, 1.0), (4.0, 1.0)]])
    assert mean == [(1.0, 1.5), (2.0, 0.75), (3.0, 0.5)]


def test_tables_say_what_the_protocol_asks_for():
    study = {"baseline": "A", "forwards": 20, "seconds": 10, "targets": {"late": 0.5}, "part": "dev"}
    study["speed"] = {"facts": {"processor": "one"}, "rows": []}
    slow = [record([1.0, 1.0, 0.4], "A", seed) for seed in range(2)]
    fast = [record([1.0, 0.9, 0.3], "B", seed) for seed in range(3)]
    left = record([1.0, 0.4, 0.6], "C")
    text = report.markdown(study, [*fast, left, *slow], None)
    slow_time, fast_time = 10 + 10 * 5 / 6, 10 + 10 * 4 / 6
    ratio = f"{fast_time / slow_time:.2f}"
    assert "6 finished cells (3 with seed 0, 2 with seed 1, 1 with seed 2)." in text
    assert "Run on: one, torch 2 (6)." in text and "on two machines" not in text
    assert "### Example-forwards to a dev loss, and what is reached at 20 example-forwards" in text
    assert "Seconds: processor one." in text
    lines = text.splitlines()
    first = lines.index("| arm | to 0.5 (late) | dev loss at 20 example-forwards | dev accuracy at 20 example-forwards "
                        "| seeds of these two |")  # fmt: skip
    assert [line.partition(" | ")[0] for line in lines[first + 2 : first + 5]] == ["| A", "| B", "| C"]
    assert f"| A | {slow_time:.0f} (2 of 2) | 0.4000 (0.4000 to 0.4000) | 0.500 (0.500 to 0.500) | 2 |" in text
    assert f"| B | {fast_time:.0f} (3 of 3) | 0.3000 " in text
    assert "| C | ≤ 10 (1 of 1, 1 ↗) | 0.6000 |" in text
    assert f"| B | {ratio}× ({ratio} to {ratio}), 2 of 3 pairs |" in text
    assert f"| C | ≤ {10 / slow_time:.2f}×, 1 of 2 pairs |" in text
    assert "| A | batch 1, constant, lr 1 (end: lr) | batch 1, constant, lr 1 (end: lr) |" in text
    assert "| A | 4 |" in text, "columns without anything are left out"
    again = record([1.0, 1.0, 0.45], "A", 1) | {"facts": {"device": "GPU", "torch": "3"}}
    text = report.markdown(study, [*fast, *slow], None, [again, record([1.0], "D")])
    assert "| loss at the end, one, torch 2 | loss at the end, GPU, torch 3 | difference |" in text
    assert "| A | batch 1, constant, lr 1 | 1 | 0.4000 | 0.4500 | +0.0500 |" in text and "| D |" not in text
    for head, dashes in itertools.pairwise(lines):
        assert not dashes.startswith("| ---") or head.count("|") == dashes.count("|"), "a bar in a heading"


def test_the_page_is_of_the_results_that_are_kept():
    root = Path(__file__).parents[1]
    study, records = report.found_in(Store(root / "benchmarks/data/convergence"))
    others = Store(root / "benchmarks/data/convergence_h200").records()
    assert report.markdown(study, records, "figures/convergence.png", others) in (root / "docs/evidence.md").read_text()


def test_a_setting_may_have_a_budget_of_its_own():
    """Up to which its rate falls; then it stays as it is, and it does not shorten the seconds that all have."""
    short = record([1.0, 0.6, 0.5], lr=2.0, forwards=20)
    other = [record([1.0, 0.9, 0.8, 0.7, 0.6], lr=lr) for lr in (1.0, 2.0)]
    best = times.lowest(times.settings([short, *other], "A"), "forwards", 40)
    assert best.setting == Setting(1, "constant", 2.0, 20) and best.ends == ("lr",)
    assert "in 20 forwards" in str(best.setting)


def test_a_cell_ends_with_its_own_budget(config, tmp_path):
    config.write_text(config.read_text().replace("batch = [4]", "batch = [4]\nforwards = 32"))
    with pytest.raises(Refused, match=r"got forwards with .*linear.*; accepted: schedules that end at 0"):
        load(config)
    config.write_text(config.read_text().replace('"linear"', '"linear_to_zero"'))
    study, store = load(config, only=["MeZO"]), Store(tmp_path / "results")
    store.begin(study)
    (cell,) = study.cells
    assert cell.name == "MeZO_b4_linear_to_zero_0.001_f32_d0_z7"
    assert go(cell, study, store)["checkpoints"][-1]["forwards"] == 32


@pytest.mark.parametrize(
    "arm, steps",
    [("MeZO", (32, 32)), ("P-GAP", (352, 32)), ("P-GAP, groups", (352, 32)), ("P-GAP, K = 4", (192, 32)),
     ("P-GAP, K = 8", (128, 32)), ("EGGROLL", (32, 32))],
)  # fmt: skip
def test_example_forwards_of_a_step(config, tmp_path, arm, steps):
    """Of the study's arms, with and without a refresh, which fills up its forwards with points that are not needed."""
    first = next(cell for cell in load(DEFAULT).cells if cell.arm == arm)
    options = {name: value if name != "rank" else 2 for name, value in first.options.items()}
    one = run.Run(replace(first, options=options), load(config), torch.device("cpu"))
    for _ in range(2):
        one.step()
    assert one.record["steps"]["forwards"] == [steps[0], sum(steps)]
    one.optimizer.detach()
