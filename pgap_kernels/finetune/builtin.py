"""Data sets that come with package wheels and work offline, by name, with the settings that suit them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import fetch

Record = dict[str, Any]


@dataclass(frozen=True)
class BuiltIn:
    """A data set by name.

    Attributes:
        title: for reports.
        train, test: its files; without ``test`` the test part is split off ``train``.
        read: the records of a file.
        settings: what options of the run are by default on it.
    """

    title: str
    train: fetch.DataFile
    read: Callable[[Path], list[Record]]
    settings: Mapping[str, Any]
    test: fetch.DataFile | None = None


def _rated(path: Path) -> list[Record]:
    """Sentences rated clearly positive or negative (mean above 1 or below -1 on a scale of -4 to 4)."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) > 1:
            rows.append({"text": text, "label": "positive" if float(rating) > 0 else "negative"})
    return rows


def _topics(path: Path) -> list[Record]:
    """Newswire with its topic, after three lines of heading."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if row]
    return [{"text": text, "label": topic} for topic, text in rows]


_SENTIMENT = {"template": "{text} It was", "verbalizers": "positive= great,negative= terrible", "max_length": 32}

BUILT_IN = {
    "default": BuiltIn("Rotten-Tomatoes snippets (VADER ratings)", fetch.MOVIES, _rated, _SENTIMENT),
    "amazon": BuiltIn("Amazon review snippets (VADER ratings)", fetch.PRODUCTS, _rated, _SENTIMENT),
    "r8": BuiltIn(
        "Reuters R8",
        fetch.REUTERS_TRAIN,
        _topics,
        {
            "template": "{text}\nTopic:",
            "verbalizers": (
                "acq= acquisition,crude= oil,earn= profit,grain= grain,interest= interest,money-fx= currency,"
                "ship= shipping,trade= trade"
            ),
            "max_length": 64,
            "too_long": "cut",
        },
        fetch.REUTERS_TEST,
    ),
}
