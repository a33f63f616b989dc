"""A small call of every kernel under compute-sanitizer: accesses out of bounds, then races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence

from benchmarks.gpu import tests
from benchmarks.gpu.part import Part
from benchmarks.harness.tables import Table

# One call of each op whose arguments lie on the device, strided views, every way a forward is served, and the sums.
SMALL = [
    "tests/test_gpu_launch.py::test_version_counters",
    "tests/test_gpu_launch.py::test_sums_do_not_wait_for_the_device",
    "tests/test_gpu.py::test_stages",
    "tests/test_gpu_lowrank.py::test_views_are_written_and_nothing_else",
    "tests/test_gpu_lowrank.py::test_aligned_core_is_the_reference_to_the_bit",
    "tests/test_gpu_forward.py::test_nothing_around_is_read_or_written",
]
TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")


def run(part: Part) -> None:
    command = shutil.which("compute-sanitizer")
    if command is None and not part.rehearse:
        part.write(unavailable="there is no compute-sanitizer on the path")
        return
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # PyTorch's pools would hide what lies between tensors
    seconds = part.seconds
    tools = TOOLS[:1] if part.rehearse else TOOLS
    for number, tool in enumerate(tools):
        part.seconds = seconds - part.left * (len(tools) - number - 1) / (len(tools) - number)
        log = part.out / f"{part.name}.{tool}.log"
        prefix = [command, "--tool", tool, "--log-file", str(log)] if command else []
        code = tests.run(part, SMALL, prefix, workers=0)
        found = SUMMARY.findall(log.read_text()) if log.exists() else []
        errors = sum(int(count) for _, count in found) if found else None
        part.write(tool=tool, errors=errors, ended=code, attached=command is not None)
    part.seconds = seconds


def failures(rows: Sequence[dict]) -> list[str]:
    if any("unavailable" in row for row in rows):
        return []
    found = [f"{row['tool']}: {row['errors']} errors" for row in rows if row.get("errors")]
    # Without a summary nothing was checked, unless the time was over.
    silent = [row for row in rows if row.get("attached") and row["errors"] is None and row["ended"] != "stopped"]
    return [*found, *(f"{row['tool']}: no summary" for row in silent), *tests.failures(rows)]


def tables(rows: Sequence[dict]) -> list[Table]:
    lines = [
        [row["tool"], "no summary" if row["errors"] is None else str(row["errors"])] for row in rows if "tool" in row
    ]
    lines += [[row["unavailable"], ""] for row in rows if "unavailable" in row]
    return [Table(["tool", "errors"], lines, "compute-sanitizer"), *tests.tables(rows)]
