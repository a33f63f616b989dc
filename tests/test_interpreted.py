"""Every Triton kernel against the reference, under Triton's interpreter: a process for each file of its tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted((TESTS / "interpreted").glob("test_*.py"))

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="tests/interpreted is collected as it is")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PGAP_", "TRITON_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
    summary = (done.stdout.splitlines() or [""])[-1]
    # A file of skipped tests, or one that was not collected, has shown nothing.
    assert done.returncode == 0 and "passed" in summary and "skipped" not in summary, done.stdout + done.stderr
