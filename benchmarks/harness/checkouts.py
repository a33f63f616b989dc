"""Another checkout of this repository, and processes that measure with its package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


class NoCheckout(Exception):
    """A commit that is not here or whose extension does not build, and why."""


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A commit in a temporary worktree with its extension built, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="pgap_kernels_") as folder:
        tree = Path(folder) / "base"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(tree), ref], ROOT)
        try:
            build(tree)
            yield tree
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def build(tree: Path) -> None:
    """Build the extension of a checkout in place."""
    _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], tree, PGAP_FORCE_BUILD="1")


def _run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise NoCheckout(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


class Worker:
    """A process that answers requests with rows, measured by this tree's benchmarks on a checkout's package."""

    def __init__(self, package: Path, module: str) -> None:
        self._command = [sys.executable, str(WORKER), str(package.resolve()), module]
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict[str, Any]) -> list[dict]:
        """The rows of a request; one with its case and why, if it cannot be measured."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._command)}: ended with status {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind:
            self._process.kill()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
