"""Launches: what is compiled once is found again by all that it was compiled for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from pgap_kernels.triton import cache, guard, launch
from pgap_kernels.triton.config import Config

CPU = torch.device("cpu")


class Group(NamedTuple):
    size: int
    name: str


class Kernel:
    """Stands in for a kernel: counts what is compiled, and keeps the arguments of later launches."""

    arg_names = ("x_ptr", "scalars", "count", "SHAPE")

    def __init__(self) -> None:
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compiling(**arguments):
            self.compiled.append(arguments)
            return {(n, 1, 1): lambda *values, n=n: self.launched.append((n, values)) for n in range(9)}

        return compiling


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "INTERPRETED", SimpleNamespace(value=False))
    return Kernel()


def run(kernel, programs=3, config=None, **changed):
    """A launch, and the arguments that it was given."""
    scalars = Group(torch.zeros(4), None)
    given = {"SHAPE": Group(4, "a"), "x_ptr": torch.zeros(8), "count": 5, "scalars": scalars} | changed
    launch.launch(kernel, programs, CPU, config or Config(), **given)
    return given


def test_the_second_launch_passes_the_arguments_in_their_order(kernel):
    first, second = run(kernel), run(kernel, programs=7, count=6)
    assert len(kernel.compiled) == 1 and kernel.compiled[0]["x_ptr"] is first["x_ptr"]
    ((programs, values),) = kernel.launched
    assert programs == 7 and values[0] is second["x_ptr"] and values[1] is second["scalars"] and values[2] == 6
    assert [x.value for x in values[3]] == [4, "a"]  # as Triton takes a group of constants


@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": torch.zeros(8, dtype=torch.float64)},
        {"x_ptr": torch.zeros(9)[1:]},  # not at a multiple of 16 bytes
        {"scalars": Group(torch.zeros(5)[1:], None)},
        {"scalars": Group(torch.zeros(4), torch.zeros(4))},
        {"count": 1},
        {"count": 32},
        {"count": 2**31 + 1},
        {"SHAPE": Group(5, "a")},
        {"config": Config(num_warps=8)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_compiled_in_is_compiled_again(kernel, changed):
    run(kernel)
    run(kernel, **changed)
    assert len(kernel.compiled) == 2 and not kernel.launched
    run(kernel, **changed)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 1


def test_offsets_of_32_bits_are_compiled_in_on_rocm(kernel, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    storage = torch.empty(2**31, dtype=torch.uint8)  # no page of it is ever touched
    run(kernel)
    run(kernel, x_ptr=storage[:32].view(torch.float32))
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_tables_are_dropped_by_their_bytes():
    kept = cache.Cache(10, most_bytes=100)
    for n in range(5):
        kept.get(n, lambda: (torch.zeros(10), 1))
    assert list(kept.entries) == [3, 4] and kept.bytes == 80
    kept.get("large", lambda: torch.zeros(100))
    assert list(kept.entries) == ["large"] and kept.bytes == 400


def test_the_flag_of_skipped_launches_is_written_wherever_it_was_made(monkeypatch):
    monkeypatch.setattr(guard, "_sticky", {})
    with torch.inference_mode():
        guard.sticky_flag(CPU)
    guard.sticky_flag(CPU).fill_(1)
    assert guard.take_skipped() == [CPU] and guard.take_skipped() == []


def test_nothing_is_launched_for_nothing(kernel):
    run(kernel, programs=0)
    assert not kernel.compiled
