"""Every Triton kernel against the reference, under Triton's interpreter: a process for each file of its tests.

By default those of the noise, the roundings and the host side run, and one call of each op; the rest is slow.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
QUICK = ("draw", "guard", "host", "rounding")
FILES = sorted((TESTS / "interpreted").glob("test_triton_*.py"))
PROPERTIES = str(TESTS / "test_op_properties.py")
SAMPLE = "test_bits and bfloat16 and (shard or forward) or test_bits and assemble and strided"
# Products of matrices have files of their own, and take the interpreter long. What happens to a call before a backend
# has it is the same for all.
REST = (
    "not reference] and not rank and not forward and not threads and not traced and not compiled and not inference "
    "and not surroundings and not version and not opcheck"
)
# About, where a file takes long.
SECONDS = {"forward": 55, "lowrank": 50, "factors": 35, "lowrank_tiles": 25, "reduction": 20}


def slow(file: Path) -> list:
    family = file.stem.removeprefix("test_triton_")
    return [] if family in QUICK else [pytest.mark.slow(seconds=SECONDS.get(family, 15))]


RUNS = [
    ("bits", [PROPERTIES, "-k", f"test_bits and {REST}"], [pytest.mark.slow(seconds=60)]),
    ("properties", [PROPERTIES, "-k", f"not test_bits and {REST}"], [pytest.mark.slow(seconds=85)]),
    *((file.stem, [str(file)], slow(file)) for file in FILES),
    ("sample", [PROPERTIES, "-k", SAMPLE], []),
]

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="tests/interpreted is collected as it is")
@pytest.mark.parametrize("chosen", [pytest.param(chosen, id=name, marks=marks) for name, chosen, marks in RUNS])
def test_interpreted(chosen):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PGAP_", "TRITON_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=1800)
    summary = (done.stdout.splitlines() or [""])[-1]
    # A file of skipped tests, or one that was not collected, has shown nothing.
    assert done.returncode == 0 and "passed" in summary and "skipped" not in summary, done.stdout + done.stderr
