"""A pytest plugin for a machine that may be lost at any moment: outcomes are written as they come, the best first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

# By worth: the bits, then what only a device can show, then products, then what is long or about PyTorch.
_FILES = ("test_gpu.py", "test_gpu_launch.py", "test_gpu_modes.py", "test_gpu_lowrank.py", "test_gpu_forward.py")
_LAST = ("2_31", "fast_normals", "compiled_ops")
_FAULT = 3  # exit status of a worker whose device is lost to it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write ids and outcomes of tests there, a line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record")
    if file and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that started them
        config.pluginmanager.register(Record(Path(file)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def worth(item: pytest.Item) -> tuple[bool, int]:
        file = item.path.name
        return any(name in item.nodeid for name in _LAST), _FILES.index(file) if file in _FILES else len(_FILES)

    items.sort(key=worth)


@pytest.fixture(autouse=True)
def _settle() -> Iterator[None]:
    """Errors of kernels appear with their own test. After one the process can do nothing more on the device: it ends,
    and pytest-xdist starts another."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        os.write(2, f"\nCUDA error in {os.environ.get('PYTEST_CURRENT_TEST')}: {error}\n".encode())
        os._exit(_FAULT)


class Record:
    """Writes what was collected, and every outcome."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.collected = False

    def _write(self, **row: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _collected(self, ids: Sequence[str]) -> None:
        if not self.collected:
            self._write(collected=list(ids))
        self.collected = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._collected(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # under pytest-xdist only the workers collect
            self._collected([item.nodeid for item in session.items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # a file that cannot be imported has no tests that could fail
            self._write(test=report.nodeid, outcome="failed", seconds=0.0, message=report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        message = "" if report.passed or report.skipped else report.longreprtext
        self._write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)
