"""The Trainer's tests under the oldest supported transformers, which `make setup` installs in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OLDEST = Path(sys.prefix) / "transformers-oldest"
PROGRAM = """
import sys, pytest, transformers
assert transformers.__version__ == "4.56.2", transformers.__version__
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow(seconds=65)
@pytest.mark.skipif(not OLDEST.is_dir(), reason="`make setup` installs the oldest transformers; there is none here")
def test_the_trainer_under_the_oldest_transformers():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(OLDEST), str(TESTS)])
    # What is ours alone, or asked of several models, is tested with the newest.
    chosen = ["-k", "not compiled and not every_method and not gpt2 and not opt-", str(TESTS / "test_trainer.py")]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *options]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
