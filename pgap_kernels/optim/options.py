"""Checks of hyper-parameters: each names the argument, what was given and what is accepted."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor


def number(name: str, value: Any) -> float:
    """A finite number as a float: of Python, of NumPy, or a tensor with one element (as schedulers may leave them)."""
    given = value
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and not value.is_meta else None
    elif getattr(value, "size", None) == 1 and hasattr(value, "item"):
        value = value.item()  # an array
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}: got {given!r}; accepted: a finite number")
    return float(value)


def positive(name: str, value: Any, *, zero: bool = False) -> float:
    """A finite number > 0, or >= 0."""
    checked = number(name, value)
    if checked < 0 or (checked == 0 and not zero):
        raise ValueError(f"{name}: got {value}; accepted: a number {'>= 0' if zero else '> 0'}")
    return checked


def fraction(name: str, value: Any) -> float:
    """A number from 0 to below 1, as decay rates of moments are."""
    checked = number(name, value)
    if not 0 <= checked < 1:
        raise ValueError(f"{name}: got {value}; accepted: a number from 0 to below 1")
    return checked


def at_least_one(name: str, value: Any) -> int:
    """An integer >= 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"{name}: got {value!r}; accepted: an integer, 1 or more")
    return value.__index__()


def patterns(name: str, value: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """fnmatch patterns of parameter names, each of which matches some."""
    if isinstance(value, str):
        raise TypeError(f"{name}: got the string {value!r}; accepted: a list of name patterns")
    value = tuple(value)
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"{name}: got {pattern!r}; accepted: name patterns, as strings")
        if not any(fnmatchcase(k, pattern) for k in known):
            raise ValueError(
                f"{name}: {pattern!r} matches no parameter; accepted: fnmatch patterns of whole names "
                f"({near_names(pattern, known)})"
            )
    return value


def near_names(pattern: str, known: Sequence[str]) -> str:
    """What somebody may have meant."""
    core = pattern.strip("*")
    containing = [name for name in known if core and core.lower() in name.lower()]
    if containing:
        begin = containing[0].lower().index(core.lower())
        core = containing[0][begin : begin + len(core)]  # in the case that names have
        return f"'*{core}*' matches {', '.join(map(repr, containing[:3]))}"
    near = get_close_matches(pattern, known, 3, 0.4)
    return f"near names: {', '.join(map(repr, near))}" if near else f"names are like {known[0]!r}"


def renamed(message: str, name: Callable[[str], str]) -> str:
    """An error message, with the arguments that it begins with under the names that its reader knows."""
    return re.sub(r"^\w+(, \w+)*(?=[:\[])", lambda found: ", ".join(map(name, found[0].split(", "))), message)


def by_name(text: str) -> dict[str, float]:
    """Numbers from the text NAME=NUMBER,NAME=NUMBER.

    Raises:
        ValueError: it is of another form.
    """
    try:
        pairs = [entry.rpartition("=") for entry in text.split(",") if entry.strip()]
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise ValueError(f"got {text!r}; accepted: NAME=NUMBER,NAME=NUMBER") from None
