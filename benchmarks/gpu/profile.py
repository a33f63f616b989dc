"""What Nsight Compute says of a launch: why a kernel takes as long as it does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu.kernels import LAYER, SHAPE, SMALL, TOKENS
from benchmarks.gpu.part import ROOT, Part
from benchmarks.harness.tables import Table
from benchmarks.kernels.ops import OPS, weights
from pgap_kernels import use_backend

CALLS = (("dense", None), ("rademacher", None), ("lowrank", 16), ("lowrank", 64), ("lowrank", 128), ("forward", 64))
SECTIONS = ("SpeedOfLight", "WarpStateStats", "Occupancy", "SchedulerStats", "MemoryWorkloadAnalysis", "LaunchStats")


def run(part: Part) -> None:
    if part.rehearse:
        with use_backend("triton"):
            calls((("rademacher", None), ("lowrank", 4)), SMALL, SMALL, part.device)
        return
    tool = shutil.which("ncu")
    if tool is None:
        part.write(unavailable="there is no ncu on the path")
        return
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "function"]
    command += ["--kernel-name", "regex:(dense|lowrank|project|mix|expand)_kernel"]
    command += [x for section in SECTIONS for x in ("--section", section)]
    report = part.out / "profile.txt"
    with report.open("w") as file:
        try:
            code: int | str = subprocess.run(
                [*command, sys.executable, "-m", "benchmarks.gpu.profile"],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, part.left - 2), check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "stopped"  # the report has the launches until then
    part.write(report=str(report), exit=code)


def calls(which: Sequence[tuple[str, int | None]], shape: tuple, layer: tuple, device: torch.device) -> None:
    """One call of each op, the only ones that are profiled."""
    profiler = torch.cuda.cudart() if device.type == "cuda" else None
    for op, rank in which:
        w = weights(layer if op == "forward" else shape, "bfloat16", device)
        case = OPS[op].case(w, *(x for x in (rank, TOKENS if op == "forward" else None) if x is not None))
        case.ours()  # compiles
        if profiler:
            torch.cuda.synchronize()
            profiler.cudaProfilerStart()
        case.ours()
        if profiler:
            torch.cuda.synchronize()
            profiler.cudaProfilerStop()


def failures(rows: Sequence[dict]) -> list[str]:
    return [f"ncu: exit status {row['exit']}" for row in rows if row.get("exit") not in (None, 0, "stopped")]


def tables(rows: Sequence[dict]) -> list[Table]:
    lines = [[row.get("unavailable") or row["report"]] for row in rows if "facts" not in row]
    return [Table(["Nsight Compute's report"], lines)]


if __name__ == "__main__":
    calls(CALLS, SHAPE, LAYER, torch.device("cuda", 0))
