"""Known answers: what runs on this machine, and whether the GPU draws the noise of the contract, to the bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu.part import ROOT, Part
from benchmarks.harness import machine
from benchmarks.harness.tables import Table
from pgap_kernels import doctor, draw, extension, use_backend

VECTORS = ROOT / "tests" / "data" / "noise_v1.json"
OFFSETS = (0, 5, 4090, 2**31 - 7, 2**33 + 3, 2**62 + 3)
COUNT, FEW = 1 << 24, 1 << 13


def run(part: Part) -> None:
    if extension.unavailable and not part.rehearse:
        _build(part)
    report = doctor.examine()
    part.write(doctor=report)
    for what, holds in report["self_test"].items():
        part.write(check=f"doctor, {what}", holds=holds)
    for vector in json.loads(VECTORS.read_text(encoding="utf-8"))["tensors"]:
        drawn = _draw(part, vector["shape"], int(vector["key"], 16), vector["tensor_id"], vector)
        same = hashlib.sha256(drawn.cpu().numpy().astype("<f4").tobytes()).hexdigest() == vector["sha256"]
        part.write(check=f"stored vector, {vector['distribution']}", holds=same)
    # Without the C++ kernels the other side is the reference, which is slow.
    count = COUNT if extension.unavailable is None and not part.rehearse else FEW
    for distribution, offset in itertools.product(("normal", "rademacher"), OFFSETS):
        how = {"distribution": distribution, "offset": offset}
        drawn = _draw(part, (count,), 7 + offset, 1, how).cpu()
        wrong = (drawn.view(torch.int32) != draw((count,), 7 + offset, 1, **how).view(torch.int32)).sum().item()
        part.write(check=f"{count} of {distribution} from {offset}", holds=wrong == 0, wrong=wrong)


def _draw(part: Part, shape: Sequence[int], key: int, tensor_id: int, how: dict) -> torch.Tensor:
    options = {name: how[name] for name in ("distribution", "offset")}
    with use_backend("triton"):
        return draw(shape, key, tensor_id, device=part.device, **options)


def _build(part: Part) -> None:
    """The C++ kernels, for the CPU's side of the comparisons: here for the next parts, this process goes without."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:  # the answers themselves need the rest of the time
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.left / 2, check=False)
        part.write(build=done.returncode, said=(done.stdout + done.stderr)[-2000:])
    except subprocess.TimeoutExpired:
        part.write(build="stopped: half of the part's time was over")


def failures(rows: Sequence[dict]) -> list[str]:
    return [row["check"] for row in rows if not row.get("holds", True)]


def tables(rows: Sequence[dict]) -> list[Table]:
    checks = [row for row in rows if "check" in row]
    held = sum(row["holds"] for row in checks)
    facts = [["machine", machine.line(row["facts"])] for row in rows if "facts" in row]
    lines = [[f"wrong: {what}", ""] for what in failures(rows)]
    return [
        Table(["what", "value"], [*facts, ["known answers", f"{held} of {len(checks)} hold"], *lines], "Known answers")
    ]
