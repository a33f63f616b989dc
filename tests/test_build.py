"""What the build does where it cannot build, and that it makes one stable-ABI library where it can."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sources(tmp_path):
    """A copy of what the build reads, without anything built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "pgap_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(sources, **env):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=sources, capture_output=True, text=True, env={**os.environ, **env})


def no_torch(folder):
    """Environment in which `import torch` fails."""
    blocker = folder / "blocker"
    (blocker / "torch").mkdir(parents=True)
    (blocker / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    return {"PYTHONPATH": str(blocker)}


# What is missing is told, and whether that is an error: two questions apart.
@pytest.mark.parametrize("missing, force", [("compiler", "0"), ("torch", "1")])
def test_failed_build_warns_or_is_an_error(sources, missing, force):
    env = {"CC": "false", "CXX": "false"} if missing == "compiler" else no_torch(sources)
    done = build(sources, PGAP_FORCE_BUILD=force, **env)
    assert (done.returncode != 0) == (force == "1"), done.stderr
    assert "the C++ extension was not built" in done.stderr or "the extension was not built" in done.stderr
    assert "PGAP_FORCE_BUILD=1" in done.stderr
    if missing == "torch":
        assert "pip install --no-build-isolation ." in done.stderr
    assert not list((sources / "pgap_kernels").glob("*.so"))


def test_library_needs_only_the_stable_interface():
    """The shim of LibTorch, the C and C++ runtimes and nothing of Python or of at:: and c10:: classes."""
    library = ROOT / "pgap_kernels" / "_C.abi3.so"
    assert library.exists(), "run `make setup`"
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = re.findall(r" U (\S+)", symbols.stdout)
    assert any(name.startswith("aoti_torch_") for name in names)
    foreign = [n for n in names if re.match(r"_ZNK?(2at|3c10|5torch)|_?Py", n)]
    assert not foreign
