"""The settings of benchmarks.kernels under pytest-benchmark, on all threads:

pytest benchmarks --benchmark-only [--megabytes 512] [-k "dense and float32"] [--benchmark-json FILE]

Here one provider runs after the other instead of in turns, so ratios are for orientation. Slow ones are left out:
the reference, the generic build.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from benchmarks import timing
from benchmarks.kernels.ops import OPS, shape_of, weights
from benchmarks.kernels.sweep import PROVIDERS, Point, Sweep, make_case
from pgap_kernels import cpu, extension

BUILDS = () if extension.unavailable else cpu.isas()
SWEEP = Sweep(
    torch.device("cpu"),
    timing.on_host,
    [isa for isa in BUILDS if isa != "generic"] or BUILDS,
    [provider for provider in PROVIDERS if provider != "reference"],
)
pytestmark = pytest.mark.skipif(extension.unavailable is not None, reason=str(extension.unavailable))


def _settings() -> Iterator:
    """Every op, dtype, rank and whoever takes part there."""
    for op, dtype in itertools.product(OPS, ("float32", "bfloat16")):
        if "cpu" not in OPS[op].devices or dtype not in OPS[op].dtypes:
            continue
        for rank in (16, 64) if OPS[op].ranked else (None,):
            tiny = Point(1, op, dtype, (64, 64), rank, 1)
            for contender in SWEEP.contenders(tiny, make_case(tiny, weights(tiny.shape, dtype))):
                name = "-".join(str(x) for x in (op, rank, dtype, contender.title) if x)
                yield pytest.param(op, dtype, rank, contender.title, id=name)


@pytest.fixture
def isa():
    """The build in use, put back after the test."""
    used = cpu.isa()[0]
    yield used
    cpu.use_isa(used)


@pytest.mark.parametrize(("op", "dtype", "rank", "title"), _settings())
def test_kernel(benchmark, request, isa, op, dtype, rank, title):
    shape = shape_of(request.config.getoption("--megabytes"), dtype)
    point = Point(1, op, dtype, shape, rank, torch.get_num_threads())
    case = make_case(point, weights(shape, dtype))
    contender = next(c for c in SWEEP.contenders(point, case) if c.title == title)
    benchmark.group = " ".join(str(x) for x in (OPS[op].title, rank, dtype) if x)
    benchmark.extra_info.update(point._asdict(), provider=title, megabytes=case.whole.nbytes / 2**20)
    if contender.before:
        contender.before()
    benchmark.pedantic(contender.call, rounds=7, warmup_rounds=1)
