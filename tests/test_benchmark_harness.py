"""What the benchmarks share: turns, tables, targets, refusals, and another commit beside this tree."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks.harness import checkouts, compare, tables, timer
from benchmarks.harness.targets import Target
from benchmarks.host import __main__ as host
from benchmarks.host import cases
from pgap_kernels import extension

ROOT = Path(__file__).parents[1]


# ---- turns ----------------------------------------------------------------------------------------------------------


def test_turns_come_in_blocks_and_each_round_starts_with_the_next():
    found = [(who, *block) for who, block in timer.turns([3, 1, 3], block=2)]
    assert found == [(0, 0, 1), (1, 0), (2, 0, 1), (2, 2), (0, 2)]


def test_medians_leave_warm_ups_out():
    order = []

    def timed(call):
        call()
        return timer.Seconds(len(order), 0.0)

    calls = [lambda: order.append("a"), lambda: order.append("b")]
    times = timer.medians(calls, timed, repeats=3, warmups=2)
    assert "".join(order) == "abbaabbaab"
    assert [t.done for t in times] == [8, 7]  # of 5, 8, 9 and of 6, 7, 10


def test_a_long_call_is_not_warmed_up_and_what_comes_before_a_call_is_not_timed():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    timer.medians(calls, timer.on_host, [3, 1], before=[None, lambda: order.append("-")])
    assert "".join(order) == "a-baaa"


# ---- tables and targets ---------------------------------------------------------------------------------------------


def test_tables_leave_empty_columns_out(capsys):
    table = tables.Table(["a", "b", "c"], [["1", "", "2"]], "title", "caption")
    assert table.markdown() == "| a | c |\n| --- | --- |\n| 1 | 2 |"
    table.print()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["title"], ["a", "c"], ["1", "2"], ["caption"], []
    ]  # fmt: skip
    assert tables.range_of([1.0]) == "1.00" and tables.range_of([3, 1, 2], 1, "x") == "2.0x (1.0 to 3.0)"


@pytest.mark.parametrize(
    ("bounds", "values", "verdict"),
    [
        ({"at_most": 0.9}, (0.8, 1.0, 0.85), "met"),  # by the median of the runs
        ({"at_most": 0.9}, (0.8, 1.0, 0.95), "missed"),
        ({"at_least": 1.2}, (1.1,), "missed"),
        ({"at_least": 1.2}, (), "not measured"),
    ],
)
def test_targets_are_judged_by_the_median(bounds, values, verdict):
    assert Target("what", "bound", values=values, **bounds).verdict == verdict


# ---- command lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("kernels", ["--size", "0"], "--size: got 0.0; accepted: numbers above 0"),
        ("kernels", ["--repeats", "0"], "--repeats: got 0; accepted: integers of at least 1"),
        (
            "kernels",
            ["--shape", "64", "32", "--op", "lowrank", "--rank", "33"],
            "--rank: got 33; accepted with a matrix",
        ),
        ("kernels", ["--op", "fast"], "--op: got fast; accepted with --device cpu:"),
        ("kernels", ["--targets", "--device", "cuda"], "--targets: got --device cuda; accepted: cpu"),
        (
            "kernels",
            ["--package", ".", "--provider", "idiom"],
            "--provider: got idiom; accepted with --base",
        ),
        ("kernels", ["--package", ".", "--targets"], "--figure, --targets: are for one tree"),
        ("kernels", ["--figure", "missing/figure.png"], "--figure: there is no folder 'missing'; create it first"),
        ("step", ["--tokens", "8", "0"], "--tokens: got 0; accepted: integers of at least 1"),
        ("step", ["--refresh-forwards", "0"], "--refresh-forwards: got 0; accepted"),
        ("step", ["--json", "missing/rows.json"], "--json: there is no folder 'missing'; create it first"),
        ("step", ["--base", "a", "--package", "b"], "not allowed with argument"),
        ("exactness", ["--ranks", "16", "0"], "--ranks: got 0; accepted: integers of at least 1"),
        ("exactness", ["--only", "speed"], "invalid choice: 'speed'"),
        ("host", ["--rounds", "0"], "--rounds: got 0; accepted: integers of at least 1"),
        ("host", ["--package", "missing"], "--package: 'missing' has no folder pgap_kernels"),
    ],
)
def test_bad_options(command, given, message, capsys):
    if command == "kernels" and extension.unavailable:
        pytest.skip("the C++ extension is not built")
    with pytest.raises(SystemExit) as ended:
        program(command).arguments(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["kernels", "step", "exactness", "host", "report"])
def test_help_names_defaults(command, capsys):
    with pytest.raises(SystemExit) as ended:
        program(command).main(["--help"])
    assert ended.value.code == 0 and "default" in capsys.readouterr().out


def program(command: str):
    pytest.importorskip("transformers")
    return importlib.import_module(f"benchmarks.{command}.__main__")


# ---- another commit -------------------------------------------------------------------------------------------------


def test_two_packages_take_turns(tmp_path, monkeypatch, capsys):
    report = tmp_path / "host.json"
    asked = cases.requests(1)[:3]
    monkeypatch.setattr(host, "requests", lambda steps: asked)
    assert host.main(["--steps", "1", "--rounds", "2", "--package", str(ROOT), "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    names = [request["case"] for request in asked]
    turns = [("this", 1), ("base", 1), ("base", 2), ("this", 2)]
    assert [(r["case"], r["package"], r["round"]) for r in rows] == [(name, *turn) for name in names for turn in turns]
    assert all(row["seconds"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert "this/base" in shown and names[-1] in shown


def test_ratios_are_of_one_round_and_gaps_say_why():
    def row(case, package, turn, **found):
        return {"case": case, "package": package, "round": turn, **found}

    rows = [row("a", "this", 1, seconds=1e-3), row("a", "base", 1, seconds=2e-3)]
    rows += [row("a", "this", 2, seconds=3e-3), row("a", "base", 2, seconds=2e-3)]
    rows += [row("b", "this", 1, seconds=1e-3), row("b", "base", 1, unmeasured="TypeError: no")]
    assert compare.table("", rows, {"ms": "seconds"}).rows == [
        ["a", "2.000", "2.000", "1.000 (0.500 to 1.500)", ""],
        ["b", "1.000", "", "", "base: TypeError: no"],
    ]


def test_a_worker_has_the_checkouts_package_and_this_trees_benchmarks(tmp_path):
    for file, text in {
        "pgap_kernels/__init__.py": "",
        "pgap_kernels/optim.py": "def MeZO(*a, **b):\n    print('noise')\n    raise TypeError('older')",
        "benchmarks/__init__.py": "raise ImportError('not this one')",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    plain, failing = cases.requests(1)[:2]
    with checkouts.Worker(tmp_path, "benchmarks.host.cases") as worker:
        assert worker.ask(failing) == [{"case": failing["case"], "unmeasured": "TypeError: older"}]
        assert worker.ask(plain)[0]["seconds"] > 0


def test_a_worker_that_ends_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 1"), checkouts.Worker(ROOT, "benchmarks.none") as worker:
        worker.ask({})


def test_a_commit_is_checked_out_and_built_for_a_time(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    built = []
    monkeypatch.setattr(checkouts, "ROOT", tmp_path)
    monkeypatch.setattr(checkouts, "build", built.append)
    with checkouts.checkout("HEAD") as tree:
        assert built == [tree] and (tree / ".git").exists()
    assert not tree.exists() and not list((tmp_path / ".git" / "worktrees").glob("*"))
    with pytest.raises(checkouts.NoCheckout, match=r"git worktree add .* missing"), checkouts.checkout("missing"):
        pass
