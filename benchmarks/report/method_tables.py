"""What a step of every method costs: the rows of benchmarks.methods, one file for each method."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness.tables import Table, shown


def parts(folder: Path) -> dict[str, str]:
    """What the template's placeholder stands for."""
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = []
    for row in (row for report in reports for row in report["rows"]):
        seconds = [shown(row[name], ".3f") for name in ("total", "forward", "outside")]
        counts = [shown(row[name], ".2f", "-") for name in ("forwards", "passes")]
        sizes = [shown(row[name], ".1f", "-") for name in ("state_declared", "beyond_forward")]
        who = row["method"] if row["provider"] == "ours" else f"{row['method']}, published logic"
        lines.append([who, row["mode"] or "", *seconds, *counts, *sizes])
    columns = ["method", "mode", "step, s", "forwards, s", "outside, s", "forwards", "passes", "state, MB", "peak, MB"]
    return {"methods": Table(columns, lines).markdown() if lines else "Not measured."}
