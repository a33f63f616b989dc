"""Results in a folder: the study they belong to, a file for each cell, and where a stopped cell goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.convergence.study import Cell, Refused, Study

STUDY, SPEED = "study.json", "speed.json"


class Store:
    """A folder of results. Every file in it is whole: it takes its name when it has been written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, study: Study) -> None:
        """Note what the cells share; a folder that was begun with something else is refused."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, shared = self.folder / STUDY, json.loads(json.dumps(study.shared()))
        if not file.exists():
            _write(file, lambda to: to.write(json.dumps(shared, indent=1).encode()))
        before = self.study()
        for name, value in shared.items():
            if before.get(name) != value:
                raise Refused(
                    f"{name}: got {value!r}, but {self.folder} was begun with {before.get(name)!r}; accepted: the "
                    "same, or another folder"
                )

    def study(self) -> dict[str, Any]:
        """What the cells share."""
        file = self.folder / STUDY
        if not file.is_file():
            raise Refused(f"{self.folder}: has no {STUDY}; accepted: a folder that benchmarks.convergence has written")
        return json.loads(file.read_text())

    def records(self) -> list[dict[str, Any]]:
        """Those of all cells, finished or not."""
        files = sorted(file for file in self.folder.glob("*.json") if file.name not in (STUDY, SPEED))
        return [json.loads(file.read_text()) for file in files]

    def speed(self) -> dict[str, Any] | None:
        """The facts and rows of ``benchmarks.convergence speed``, if it was run."""
        file = self.folder / SPEED
        return json.loads(file.read_text()) if file.is_file() else None

    def write_speed(self, found: dict[str, Any]) -> None:
        """Keep them."""
        _write(self.folder / SPEED, lambda to: to.write(json.dumps(found, indent=1).encode()))

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell; None if it was not begun.

        Raises:
            Refused: it is of a cell of that name with other options.
        """
        file = self._record(cell)
        if not file.exists():
            return None
        record = json.loads(file.read_text())
        if record["cell"] != json.loads(json.dumps(asdict(cell))):
            raise Refused(f"{file}: is of {record['cell']}, but the study has {asdict(cell)}; accepted: the same")
        return record

    def finished(self, cell: Cell) -> bool:
        """Whether there is nothing left to run."""
        record = self.read(cell)
        return record is not None and record["status"] != "stopped"

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """Keep the record of a cell that is not to go on."""
        _write(self._record(cell), lambda to: to.write(json.dumps(record).encode()))
        self._state(cell).unlink(missing_ok=True)

    def stop(self, cell: Cell, record: dict[str, Any], state: dict[str, Any]) -> None:
        """Keep a record that is to go on, with the state to go on from."""
        whole = {"record": record, "state": state}
        _write(self._state(cell), lambda to: torch.save(whole, to))
        _write(self._record(cell), lambda to: to.write(json.dumps(record).encode()))

    def resume(self, cell: Cell, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The record and the state of a cell that was stopped, if it was."""
        file = self._state(cell)
        if self.read(cell) is None or not file.exists():
            return None
        whole = torch.load(file, map_location=device, weights_only=True)
        return whole["record"], whole["state"]

    def _record(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def _state(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.pt"


def _write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as to:
        write(to)
        to.flush()
        os.fsync(to.fileno())
    partial.replace(file)
