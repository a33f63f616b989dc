"""Kernels compile on the oldest Triton that is declared supported: one of each family, and (slow) every one.

test_compiled.py has the newest, pinned one.

`make setup` installs the oldest one in a folder of its own, which a child process finds first.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.compiled import FAMILIES, FLOAT32, SAMPLE

from pgap_kernels import backends

ROOT = Path(__file__).parent.parent
OLDEST = Path(sys.prefix) / "triton-oldest"


def run(*command: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env |= {"PYTHONPATH": str(OLDEST), "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.skipif(not OLDEST.is_dir(), reason="`make setup` installs the oldest Triton; this environment has none")
@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        pytest.param(FAMILIES, SAMPLE, id="sample"),
        pytest.param(FLOAT32, ["--dtype", "fp32"], id="fp32", marks=pytest.mark.slow),
        pytest.param(FAMILIES, ["--dtype", "bf16"], id="bf16", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_on_the_oldest_triton(tmp_path, kernels, options):
    version = run("-c", "import triton; print(triton.__version__)").stdout.strip()
    assert tuple(map(int, version.split(".")[:2])) == backends.triton.OLDEST
    rows = tmp_path / "rows.json"
    options = [*options, "--target", "sm_90", "--jobs", "1", "--json", str(rows)]
    done = run("-m", "tools.compiled", "--kernel", *kernels, *options)
    assert rows.exists(), done.stderr
    found = json.loads(rows.read_text())
    assert {row["kernel"] for row in found} == set(kernels)
    assert [(row["kernel"], row["config"], row["error"]) for row in found if row["error"]] == []


def test_the_oldest_triton_is_the_one_that_is_declared():
    declared = re.search(r"triton>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"triton==(\d+)\.(\d+)", (ROOT / "requirements-triton-oldest.txt").read_text())
    assert declared.groups() == pinned.groups() == tuple(map(str, backends.triton.OLDEST))
