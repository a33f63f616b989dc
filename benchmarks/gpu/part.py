"""What a part of ``benchmarks.gpu`` is given, and the process that it runs in.

``python -m benchmarks.gpu.part NAME OUT SECONDS rehearse|run [MORE ...]`` is how ``benchmarks.gpu`` starts it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine

ROOT = Path(__file__).parents[2]


@dataclass
class Part:
    """Where a part writes, and until when it may run.

    Args:
        out: the folder of results; a part writes ``NAME.jsonl`` there and may add files of its own.
        seconds: its share of the time. What is not over then is stopped from outside, so it stops itself before.
        rehearse: run every line on a CPU, on small tensors.
        given: of part tests, those to run, as pytest takes them; of part learning, the folder of the packed model.
    """

    name: str
    out: Path
    seconds: float
    rehearse: bool = False
    given: tuple[str, ...] = ()
    begin: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearse else torch.device("cuda", torch.cuda.current_device())

    @property
    def left(self) -> float:
        """Seconds."""
        return self.begin + self.seconds - time.monotonic()

    @property
    def file(self) -> Path:
        return self.out / f"{self.name}.jsonl"

    def write(self, **row: Any) -> None:
        """Add a row of results, at once: whatever comes next may crash."""
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        """What was written so far; a line that was cut off is none."""
        found = []
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{self.file}: not a whole line: {line[:80]}", file=sys.stderr)
        return found


def main(name: str, out: str, seconds: str, rehearse: str, *given: str) -> None:
    part = Part(name, Path(out), float(seconds), rehearse == "rehearse", given)
    # In each: parts of one folder may have run on several machines.
    part.write(facts=machine.facts(part.device if part.rehearse or torch.cuda.is_available() else None))
    importlib.import_module(f"benchmarks.gpu.{name}").run(part)


if __name__ == "__main__":
    main(*sys.argv[1:])
