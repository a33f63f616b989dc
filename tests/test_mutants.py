"""The faults of tools/mutants.py fit the tree, and its verdicts can be trusted."""

from __future__ import annotations

import json

import pytest

from tools import mutants
from tools.mutants import FAULTS, ROOT, Fault

CAUGHT = next(fault for fault in FAULTS if fault.name == "high-word-of-the-step-lost")
HARMLESS = CAUGHT._replace(name="harmless", before="No tensors here.", after="")


def test_every_fault_has_its_text_once_and_tests():
    assert mutants.misplaced(FAULTS, ROOT) == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert not [fault.name for fault in FAULTS if fault.before == fault.after]


def test_what_does_not_fit_is_told(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    rows = [("here", "a = 1", "a = 2"), ("twice", "= 1", "= 2"), ("gone", "c = 1", "c = 2")]
    given = [Fault(name, "code.py", before, after, ("code.py",), "") for name, before, after in rows]
    given += [given[0]._replace(name="moved", file="other.py"), given[0]._replace(name="unseen", tests=("test_*.py",))]
    assert [message.partition(":")[0] for message in mutants.misplaced(given, tmp_path)] == [
        "twice",
        "gone",
        "moved",
        "unseen",
    ]


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        mutants.main(["--only", "no-such-fault"])
    assert "got no-such-fault; accepted: names that --list shows" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fault_is_caught_and_a_harmless_change_survives(monkeypatch, capsys):
    """In this order: the second finds the first repaired."""
    monkeypatch.setattr(mutants, "FAULTS", [CAUGHT, HARMLESS])
    assert mutants.main(["--json"]) == 1
    captured = capsys.readouterr()
    caught, harmless = json.loads(captured.out)
    assert caught["status"] == "caught" and caught["by"].startswith("tests/test_noise.py::test_derive")
    assert harmless["status"] == "survived"
    assert "1 of 2 faults caught; not: harmless" in captured.err
