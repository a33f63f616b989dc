"""benchmarks.host: a row for each case, forwards and checkout; what is compared is that checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host

pytest.importorskip("rich")
ROOT = Path(__file__).parents[1]


def test_rows_of_two_checkouts(tmp_path, capsys):
    report = tmp_path / "host.json"
    assert host.main(["--steps", "1", "--rounds", "1", "--package", str(ROOT), "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    cases = [(host.PLAIN, "real"), *((case, forwards) for case in host.CASES for forwards in host.FORWARDS)]
    expected = [(package, *case) for package in ("here", "there") for case in cases]
    assert [(row["package"], row["case"], row["forwards"]) for row in rows] == expected
    assert all(row["seconds"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert "constant, there" in shown and "P-GAP folded, window" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps, --rounds: got 0, 3; accepted: integers of at least 1"),
        (["--package", "missing"], "--package: 'missing' has no folder pgap_kernels"),
        (["--json", "missing/rows.json"], "there is no folder 'missing'; create it first"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        host.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
