"""benchmarks.gpu: nothing is lost, whatever a part does; (slow) all of it runs, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import kernels, packed, sanitizer, tests, tuning
from benchmarks.gpu.part import Part
from benchmarks.gpu.targets import targets
from benchmarks.kernels.ops import OPS, weights
from benchmarks.report import gpu_tables
from tools.compiled.launches import recorded

TESTS = """
import pytest, time
pytestmark = pytest.mark.gpu
def test_first(): pass
def test_second(): assert 1 + 1 == 3, "not a sum"
def test_third(): time.sleep(600)
def test_last(): pass
"""


class UntilSecond(Part):
    """Its time is over once ``test_second`` is, however long the machine takes until then."""

    @property
    def left(self):
        ended = any(str(row.get("test", "")).endswith("test_second") for row in self.rows())
        return 0.0 if ended else super().left


def test_tests_that_hang_lose_nothing(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    part = UntilSecond("tests", tmp_path, seconds=120.0)
    tests.run(part, [str(file)], workers=0)
    rows = part.rows()
    assert [len(row["collected"]) for row in rows if "collected" in row] == [4]
    outcomes = {row["test"].split("::")[-1]: row["outcome"] for row in rows if "test" in row}
    assert outcomes == {"test_first": "passed", "test_second": "failed"}
    assert [test.split("::")[-1] for test in rows[-1]["not_run"]] == ["test_third", "test_last"]
    assert rows[-1]["exit"] == "stopped"
    (failure,) = tests.failures(rows)
    assert "test_second" in failure and "not a sum" in failure
    assert [line[1] for line in tests.tables(rows)[0].rows[:3]] == ["1", "1", "2"]


def test_a_row_that_was_cut_off_is_none(tmp_path, capsys):
    part = Part("step", tmp_path, seconds=1.0)
    part.write(contender="a", total=1.0)
    part.file.write_text(part.file.read_text() + '{"contender": "b", "tot')
    assert part.rows() == [{"contender": "a", "total": 1.0}] and "not a whole line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"), [("import nothing_of_this_name", "nothing_of_this_name"), ("", "exit status 5")]
)
def test_files_without_tests_are_failures(tmp_path, text, said):
    file = tmp_path / "test_some.py"
    file.write_text(text)
    part = Part("tests", tmp_path, seconds=120.0)
    tests.run(part, [str(file)], workers=0)
    assert any(said in failure for failure in tests.failures(part.rows()))


def test_a_sanitizer_that_says_nothing_is_a_failure():
    ended = [{"collected": ["a"]}, {"test": "a", "outcome": "passed"}, {"exit": 0, "not_run": []}]
    row = {"tool": "memcheck", "errors": None, "ended": 0, "attached": True}
    assert sanitizer.failures([*ended, row]) == ["memcheck: no summary"]
    assert sanitizer.failures([*ended, row | {"errors": 0}]) == []
    assert sanitizer.failures([{"unavailable": "there is none"}]) == []


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    part = Part("tests", tmp_path, seconds=6.0, given=(str(file),))
    assert gpu.run_part(part).startswith(("stopped", "completed"))
    left = subprocess.run(["pgrep", "-f", str(file)], capture_output=True, text=True, check=False).stdout
    assert left == ""


def test_files_travel_in_pieces(tmp_path):
    files = [tmp_path / name for name in ("a.whl", "b.txt")]
    for number, file in enumerate(files):
        file.write_bytes(bytes(range(256)) * (100 + number))
    pieces = packed.pack(files, tmp_path / "pieces", size=20_000)
    assert len(pieces) > 2 and max(piece.stat().st_size for piece in pieces) == 20_000
    there = packed.unpack(tmp_path / "pieces", tmp_path / "there")
    assert [file.read_bytes() for file in there] == [file.read_bytes() for file in files]
    pieces[1].write_bytes(b"other")
    with pytest.raises(packed.Incomplete, match=r"piece\.001 is not what was packed"):
        packed.unpack(tmp_path / "pieces", tmp_path / "again")
    pieces[1].unlink()
    with pytest.raises(packed.Incomplete, match=r"piece\.001 is missing"):
        packed.unpack(tmp_path / "pieces", tmp_path / "again")
    with pytest.raises(packed.Incomplete, match=r"has no pieces\.json"):
        packed.unpack(tmp_path, tmp_path / "again")
    assert not list((tmp_path / "again").glob("*"))


def test_targets_and_page_of_rows(tmp_path):
    shared = {"op": "dense", "dtype": "bfloat16", "rank": None, "floor_ratio": 1.0, "host_seconds": 1e-4}
    shared |= {"speedup_vs_idiom": None, "copy_share": 0.8}
    newest = [shared | {"provider": "ours", "seconds": 1e-3}, shared | {"provider": "idiom", "seconds": 4e-3}]
    step = {"contender": "MeZO, in place", "total": 0.021, "floor": 0.02, "ratio": 1.05, "forward": 0.02}
    step |= {"outside": 1e-3, "peak_mb": 3.0}
    for visit, rows in (("1", [newest[0] | {"seconds": 9e-3}]), ("2", newest)):
        part = Part("kernels", tmp_path / visit, seconds=1.0)
        part.out.mkdir()
        for row in rows:
            part.write(**row)
    Part("step", tmp_path / "2", seconds=1.0).write(**step)
    rows = gpu_tables.load(tmp_path)
    assert [row["seconds"] for row in rows["kernels"]] == [1e-3, 4e-3]
    met = {(t.what, t.bound): t.met for t in targets(rows)}
    assert met["dense", "≥ 0.75 of the copy's bandwidth"] is True
    assert met["dense", "≥ 5x faster than idiom"] is False
    assert met["MeZO, in place: step / its forwards", "≤ 1.05"] is True
    assert met["fast", "≥ 0.95 of the copy's bandwidth"] is None
    parts = gpu_tables.parts(tmp_path)
    assert "| dense | ≥ 5x faster than idiom | 4.00 | **missed** |" in parts["gpu targets"]
    assert "| dense | bfloat16 | ours | 1.000 |" in parts["gpu kernels"]
    assert "MeZO, in place" in parts["gpu steps"]
    assert set(gpu_tables.parts(tmp_path / "none").values()) == {"Not measured."}


@pytest.mark.parametrize("op", ["dense", "lowrank", "forward"])
def test_alternatives_are_what_is_launched(op):
    """Else all of them take the same time, as that of the usual entry."""
    rank = None if op == "dense" else 16
    found = [a for a in tuning.alternatives() if (a.op, a.rank) == (op, rank)]
    more = [x for x in (rank, 8 if op == "forward" else None) if x is not None]
    case = OPS[op].case(weights((128, 96), "bfloat16"), *more)
    launched = []
    for alternative in found:
        with tuning.instead(alternative):
            launched.append([(repr(x.options), repr(x.arguments.get("TILE"))) for x in recorded(case.ours, "hopper")])
    assert all(launched[0] != other for other in launched[1:])


def test_what_is_too_slow_is_no_failure():
    rows = [{"op": "a", "provider": "ours", "unmeasured": "about 4.5 s a call, too long for --budget 0.1"}]
    rows += [{"op": "b", "provider": "ours", "unmeasured": "RuntimeError: no"}]
    assert kernels.failures(rows) == ["b, ours: RuntimeError: no"]


def test_refusals(capsys):
    for given, message in ((["--minutes", "0"], "--minutes: got 0"), (["--only", "all"], "--only: invalid choice")):
        with pytest.raises(SystemExit):
            gpu.main(given)
        assert message in capsys.readouterr().err


@pytest.mark.slow(seconds=90)
@pytest.mark.model
def test_rehearsal(tmp_path):
    """Every part ends by itself, and has rows."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "8", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", *gpu.SHARES, *gpu.EXTRA], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
    for name in (*gpu.SHARES, *gpu.EXTRA):
        if name != "profile":  # which has nothing to say here
            rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            assert rows and not any("error" in row for row in rows), name
