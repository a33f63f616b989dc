"""Options of `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--megabytes", type=float, default=8.0, help="of the weights of benchmarks.kernels; default: 8")
