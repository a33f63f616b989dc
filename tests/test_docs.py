"""The documentation builds, without a link that leads nowhere, and every public object has a page."""

import subprocess
import sys
from pathlib import Path

import pytest

import pgap_kernels
from pgap_kernels import optim

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_documentation_builds(tmp_path):
    pytest.importorskip("properdocs")
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {f"pgap_kernels.{name}" for name in pgap_kernels.__all__ if name not in ("noise", "__version__")}
    wanted |= {f"pgap_kernels.optim.{name}" for name in optim.__all__}
    pages = {page.name for page in (tmp_path / "reference").iterdir() if page.is_dir()}
    assert wanted <= pages
    assert "tensor_ids" in (tmp_path / "reference" / "pgap_kernels.dense_perturb_" / "index.html").read_text()
