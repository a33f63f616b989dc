"""Every Triton kernel against the reference, under Triton's interpreter: in processes of their own.

By default the tests of the noise, the roundings and the host side run, and one call of each op; the rest is slow.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {p.stem.removeprefix("test_triton_"): str(p) for p in sorted((TESTS / "interpreted").glob("test_*.py"))}
QUICK = ("draw", "guard", "host", "rounding")
LOWRANK = ("lowrank", "lowrank_tiles", "factors")
OTHERS = [family for family in FILES if family not in (*QUICK, *LOWRANK, "forward")]
PROPERTIES = str(TESTS / "test_op_properties.py")
SAMPLE = "test_bits and bfloat16 and (shard or forward) or test_bits and assemble and strided"
# Products of matrices have files of their own, and take the interpreter long. What happens to a call before a backend
# has it is the same for all.
REST = (
    "not reference] and not rank and not forward and not threads and not traced and not compiled and not inference "
    "and not surroundings and not version and not opcheck"
)
RUNS = [  # few, as each imports and interprets everything anew
    ("properties", [PROPERTIES, "-k", REST], [pytest.mark.slow(seconds=100)]),
    ("lowrank", [FILES[family] for family in LOWRANK], [pytest.mark.slow(seconds=110)]),
    ("others", [FILES[family] for family in OTHERS], [pytest.mark.slow(seconds=90)]),
    ("forward", [FILES["forward"]], [pytest.mark.slow(seconds=50)]),
    ("quick", [FILES[family] for family in QUICK], []),
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
