"""What benchmarks.gpu has measured: its rows by visit, the newest of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import kernels, step, targets
from benchmarks.harness.tables import Table
from benchmarks.harness.targets import table as targets_table

_SETTING = ("op", "dtype", "rank", "provider")


def load(folder: Path) -> dict[str, list[dict]]:
    """The rows of parts kernels and step in the folders of a folder: where several have one, the last of them.

    Raises:
        ValueError: they are of several devices.
    """
    found: dict[str, list[dict]] = {}
    devices: set[str] = set()
    for part, setting in (("kernels", _setting), ("step", lambda row: row["contender"])):
        newest: dict[object, dict] = {}
        for file in sorted(folder.glob(f"*/{part}.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            devices |= {row["facts"]["device"] for row in rows if "device" in row.get("facts", ())}
            rows = [row for row in rows if _is_figure(row)]
            ours = {_setting(row)[:-1]: row["seconds"] for row in rows if row.get("provider") == "ours"}
            for row in rows:
                if "provider" in row:
                    row["ours_seconds"] = ours.get(_setting(row)[:-1])
            newest |= {setting(row): row for row in rows}
        if newest:
            found[part] = list(newest.values())
    if len(devices) > 1:
        raise ValueError(f"{folder}: got runs on {', '.join(sorted(devices))}; accepted: one device")
    return found


def _is_figure(row: dict) -> bool:
    """Of kernels or of a step; not the floor, which is the copy but for a per cent."""
    return "total" in row or ("seconds" in row and row.get("provider", "floor") != "floor")


def _setting(row: dict) -> tuple:
    return tuple(row[name] for name in _SETTING)


def parts(folder: Path) -> dict[str, str]:
    """What the template's placeholders stand for."""
    rows = load(folder)
    missing = "Not measured."
    found = {"gpu targets": missing, "gpu kernels": missing, "gpu steps": missing}
    if rows:
        table = targets_table(targets.targets(rows))
        lines = [[line[0], line[3], line[4], line[5].replace("missed", "**missed**")] for line in table.rows]
        found["gpu targets"] = Table(["what", "target", "measured", "verdict"], lines).markdown()
    tables: tuple[tuple[str, Callable], ...] = (("kernels", kernels.tables), ("step", step.tables))
    for part, make in tables:
        if part in rows:
            found[f"gpu {'kernels' if part == 'kernels' else 'steps'}"] = make(rows[part])[0].markdown()
    return found
