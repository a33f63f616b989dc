"""The tests that need a GPU, as many as the time allows."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.gpu.part import ROOT, Part
from benchmarks.harness.tables import Table

SHUTDOWN = 4.0  # seconds for what is left to do at the end
POLL = 0.2  # seconds
# To collect the others, in every worker, takes as long as many of these.
FILES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/test_gpu*.py"))
HANGS = 60  # seconds after which a test counts as hanging
REHEARSED = ["tests/test_gpu.py", "-k", "test_stages or test_sums"]
# One thread for each worker: the CPU's side of the comparisons is done by all of them at once.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def run(part: Part, tests: Sequence[str] = (), prefix: Sequence[str] = (), workers: int | None = None) -> int | str:
    """Run pytest, and write which tests were not over when the time was; returns its exit status, or "stopped".

    Args:
        tests: files, ids and options; default: ``FILES``.
        prefix: a command to run pytest under.
        workers: processes; default: two fewer than there are cores. 0: pytest itself.
    """
    workers = max(1, (os.cpu_count() or 1) - 2) if workers is None else workers
    given = list(tests or part.given) or (REHEARSED if part.rehearse else FILES)
    command = [*prefix, sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.plugin", "--record", str(part.file)]
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "30"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(HANGS)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    before = len(part.rows())
    process = subprocess.Popen([*command, *given], cwd=ROOT, env=os.environ | THREADS | {"PYTHONPATH": paths})
    while process.poll() is None and part.left > SHUTDOWN:
        time.sleep(POLL)
    code: int | str = "stopped" if process.poll() is None else process.returncode
    if code == "stopped":
        process.terminate()  # its workers end with it
        try:
            process.wait(SHUTDOWN / 2)  # before its rows are read, and others want the device
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    rows = part.rows()[before:]
    ids = next((row["collected"] for row in rows if "collected" in row), [])
    over = {row["test"] for row in rows if "test" in row}
    part.write(exit=code, not_run=[test for test in ids if test not in over])
    return code


def failures(rows: Sequence[dict]) -> list[str]:
    found = [f"{row['test']}: {_reason(row['message'])}" for row in rows if row.get("outcome") == "failed"]
    usual = (0, "stopped", *[1] * bool(found))  # 1: some test failed
    found += [f"pytest: exit status {row['exit']}" for row in rows if row.get("exit", 0) not in usual]
    return found if any("collected" in row for row in rows) else [*found, "no test was collected"]


def _reason(message: str) -> str:
    """The line of a report that says what was wrong."""
    lines = [line[1:].strip() for line in message.splitlines() if line.startswith("E ")]
    return (lines or message.splitlines() or ["no message"])[0][:200]


def tables(rows: Sequence[dict]) -> list[Table]:
    outcomes = Counter(row["outcome"] for row in rows if "outcome" in row)
    outcomes["not run"] = sum(len(row["not_run"]) for row in rows if "not_run" in row)
    lines = [[name, str(count)] for name, count in outcomes.items()]
    shown = failures(rows)
    lines += [[line, ""] for line in shown[:30]] + [[f"and {len(shown) - 30} more", ""]] * (len(shown) > 30)
    return [Table(["tests", "count"], lines, "Tests on the GPU")]
