"""Budgets of the kernels, compiled without a GPU: of one of each family, and (slow) of every one for every target."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from filelock import FileLock
from support.compiled import FAMILIES, FLOAT32, SAMPLE

RUNS = {
    "sample": [["--kernel", *FAMILIES, *SAMPLE]],
    "all": [
        ["--kernel", *FAMILIES, *FLOAT32, "--dtype", "fp32", "bf16"],
        # Half precision differs by its rounding alone.
        [
            *["--kernel", *FAMILIES, "--dtype", "fp16", "--target", "sm_90,gfx942"],
            *["--config", "J=1", "stochastic", "momentum", "drawn core", "project", "mix", "expand"],
        ],
    ],
}
# Issue slots per bf16 weight (in the forward: per element of x or y) on sm_90, by kernel, configuration and rank.
SLOTS = {
    ("dense", "J=1", None): 42,
    ("dense", "fast", None): 24,
    ("dense", "rademacher", None): 16,
    ("low rank", "drawn core", 16): 7,
    ("low rank", "drawn core", 64): 9,
    ("forward", "project", 16): 6,  # 16 tokens of a program: more slots than with 32, and faster (docs/notebook.md)
    ("forward", "project", 128): 8,
    ("forward", "expand", 16): 10,
}


pytestmark = pytest.mark.xdist_group("compiled")  # in one process, so that no other one waits for the compilation


@pytest.fixture(scope="session", params=["sample", pytest.param("all", marks=pytest.mark.slow(seconds=145))])
def rows(request, tmp_path_factory):
    """Kernels of ours compiled anew: once, whatever the number of pytest's processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(shared / "triton"), "PYTHONWARNINGS": "ignore"}
    found = []
    with FileLock(shared / f"compiled_{request.param}.lock"):
        for i, run in enumerate(RUNS[request.param]):
            path = shared / f"compiled_{request.param}_{i}.json"
            if not path.exists():
                command = [sys.executable, "-m", "tools.compiled", *run, "--json", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                assert path.exists(), done.stderr
            found += json.loads(path.read_text())
    return found


def named(row: dict) -> tuple:
    return tuple(row[x] for x in ("kernel", "config", "rank", "dtype", "target"))


def listed(rows: list[dict], *columns: str) -> str:
    return "\n".join(" ".join(map(str, (*named(row), *(row[x] for x in columns)))) for row in rows)


def test_every_kernel_compiles_for_every_target(rows, request):
    everything = "all" in request.node.callspec.id
    assert {row["target"] for row in rows} == ({"sm_80", "sm_90", "gfx942"} if everything else {"sm_90"})
    assert {row["kernel"] for row in rows} == {*FAMILIES, *(FLOAT32 if everything else [])}
    failed = [row for row in rows if row["error"]]
    assert not failed, listed(failed, "error")


def test_nothing_spills_and_four_programs_fit_on_a_processor(rows):
    """But for the low rank on Hopper, whose configurations are the fastest of those that were timed on a card."""
    compiled = [row for row in rows if not row["error"] and (row["kernel"], row["target"]) != ("low rank", "sm_90")]
    spilled = [row for row in compiled if row["spills"]]
    assert not spilled, listed(spilled, "spills")
    large = [row for row in compiled if row["target"].startswith("sm_") and row["registers"] > 128]
    assert not large, listed(large, "registers")


def width(row: dict) -> int:
    """Bits of the narrowest access allowed."""
    # A thread has 4 elements: of float32 state, of a value between stages, or as AMD's matrix instructions leave them.
    four = row["kernel"] == "preconditioned" or row["config"] == "staged"
    four |= row["kernel"] in ("low rank", "forward") and row["target"] == "gfx942"
    return 64 if four and row["dtype"] != "fp32" else 128


def test_weights_are_read_and_written_128_bits_at_a_time(rows):
    moving = [row for row in rows if not row["error"] and row["bytes_per_weight"]]
    accesses = ([bits for bits in (row["load_bits"], row["store_bits"]) if bits] for row in moving)
    narrow = [row for row, bits in zip(moving, accesses, strict=True) if not bits or min(bits) < width(row)]
    assert moving and not narrow, listed(narrow, "load_bits", "store_bits")


def test_slot_budgets(rows, request):
    """Common path, sm_90, bf16."""
    slots = {named(row): row["slots_per_weight"] for row in rows if not row["error"]}
    budgets = {(*key, "bf16", "sm_90"): budget for key, budget in SLOTS.items()}
    held = {key: budget for key, budget in budgets.items() if key in slots}
    assert len(held) == (len(budgets) if "all" in request.node.callspec.id else 3)
    assert {key: slots[key] for key, budget in held.items() if slots[key] > budget} == {}


@pytest.mark.slow
def test_the_kernel_of_torch_compile_can_still_be_had():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compiled.inductor", "--dtype", "bf16"]
    source = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert source.count("@triton.jit") == source.count("tl.store") == 1 and "randn" in source
