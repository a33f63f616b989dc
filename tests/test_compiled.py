"""Budgets of the kernels, compiled without a GPU: of one of each family, and (slow) of every one for sm_90 in bf16.

`python -m tools.compiled` compiles every one for every target, in every dtype.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from support.compiled import CONFIGS, FAMILIES, FLOAT32, SAMPLE

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
RUNS = {
    "sample": [["--kernel", *FAMILIES, *SAMPLE, "--target", "sm_90"]],
    "all": [
        ["--kernel", *FAMILIES, "--dtype", "bf16", "--target", "sm_90"],
        ["--kernel", *FAMILIES, *SAMPLE, "--target", "sm_80,gfx942"],
        ["--kernel", *FLOAT32, "--dtype", "fp32"],
        ["--kernel", *FAMILIES, "--dtype", "fp32", "--target", "sm_90", "--config", *CONFIGS],
        # Half precision differs by its rounding alone.
        [
            *["--kernel", *FAMILIES, "--dtype", "fp16", "--target", "sm_90"],
            *["--config", "J=1", "stochastic", "momentum", "drawn core", "project", "mix", "expand"],
        ],
    ],
}


def compiled(chosen: str, folder: Path) -> list[dict]:
    """Kernels of ours compiled anew."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONWARNINGS": "ignore"}
    found = []
    for i, run in enumerate(RUNS[chosen]):
        path = folder / f"{i}.json"
        command = [sys.executable, "-m", "tools.compiled", *run, "--jobs", "1", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert path.exists(), done.stderr
        found += json.loads(path.read_text())
    return found


def named(row: dict) -> tuple:
    return tuple(row[x] for x in ("kernel", "config", "rank", "dtype", "target"))


def listed(rows: list[dict], *columns: str) -> str:
    return "\n".join(" ".join(map(str, (*named(row), *(row[x] for x in columns)))) for row in rows)


def width(row: dict) -> int:
    """Bits of the narrowest access allowed."""
    # A thread has 4 elements: of float32 state, of a value between stages, or as AMD's matrix instructions leave them.
    four = row["kernel"] == "preconditioned" or row["config"] == "staged"
    four |= row["kernel"] in ("low rank", "forward") and row["target"] == "gfx942"
    return 64 if four and row["dtype"] != "fp32" else 128


def is_narrow(row: dict) -> bool:
    """Whether weights are read or written in less than the width that a thread's elements have."""
    accesses = [bits for bits in (row["load_bits"], row["store_bits"]) if bits]
    return not accesses or min(accesses) < width(row)


# One test, so that one process compiles and the other has time for something else.
@pytest.mark.parametrize("chosen", ["sample", pytest.param("all", marks=pytest.mark.slow(seconds=110))])
def test_kernels_compile_within_their_budgets(chosen, tmp_path):
    """Every target compiles; nothing spills, and four programs fit on a processor; weights move 128 bits at a time; and
    on the common path, on sm_90 in bf16, no kernel has more slots than its budget.

    Spills and registers of the low rank on Hopper do not count: its configurations are the fastest of those that were
    timed on a card.
    """
    rows, everything = compiled(chosen, tmp_path), chosen == "all"
    assert {row["target"] for row in rows} == ({"sm_80", "sm_90", "gfx942"} if everything else {"sm_90"})
    assert {row["kernel"] for row in rows} == {*FAMILIES, *(FLOAT32 if everything else [])}
    good = [row for row in rows if not row["error"]]
    counted = [row for row in good if (row["kernel"], row["target"]) != ("low rank", "sm_90")]
    moving = [row for row in good if row["bytes_per_weight"]]
    slots = {named(row): row["slots_per_weight"] for row in good}
    budgets = {(*key, "bf16", "sm_90"): budget for key, budget in SLOTS.items()}
    held = {key: budget for key, budget in budgets.items() if key in slots}
    assert moving and len(held) == (len(budgets) if everything else 3)
    faults = {
        "not compiled": listed([row for row in rows if row["error"]], "error"),
        "spills": listed([row for row in counted if row["spills"]], "spills"),
        "registers": listed(
            [row for row in counted if row["target"].startswith("sm_") and row["registers"] > 128], "registers"
        ),
        "narrow accesses": listed([row for row in moving if is_narrow(row)], "load_bits", "store_bits"),
        "slots": {key: slots[key] for key, budget in held.items() if slots[key] > budget},
    }
    assert not any(faults.values()), "\n".join(f"{name}:\n{rows}" for name, rows in faults.items() if rows)


@pytest.mark.slow
def test_the_kernel_of_torch_compile_can_still_be_had():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compiled.inductor", "--dtype", "bf16"]
    source = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert source.count("@triton.jit") == source.count("tl.store") == 1 and "randn" in source
