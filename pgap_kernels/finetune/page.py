"""report.html: everything of a report that a person looks at, in one file that needs no other."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import figure
from .timing import PARTS


def render(report: dict[str, Any]) -> str:
    """The page of a run's report, as `report.finite` gives it."""
    drawn = _svg(lambda to: figure.draw(report, to, "svg"))
    return _filled("page.html", report=report, figure=drawn, timings=figure.timings(report), parts=(*PARTS, "total"))


def render_seeds(report: dict[str, Any]) -> str:
    """The page of a report of several seeds."""
    drawn = _svg(lambda to: figure.draw_seeds(report, to))
    return _filled("seeds.html", report=report, figure=drawn, names=["loss", *report["metrics"]])


def number(value: float | None, digits: int) -> str:
    """A number of a report, which has None for one that is not finite."""
    return "–" if value is None else f"{value:.{digits}f}"


def _filled(name: str, **values: Any) -> str:
    import jinja2

    template = Path(__file__).with_name(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(number=number, **values)


def _svg(draw: Callable[[io.BytesIO], object]) -> str:
    """A drawing as an element of a page: without the XML declaration."""
    drawn = io.BytesIO()
    draw(drawn)
    text = drawn.getvalue().decode()
    return text[text.index("<svg") :]
