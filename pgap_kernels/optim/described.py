"""What the docstrings say of methods' options, so that command lines and trainers need no second text."""

from __future__ import annotations

import inspect
import re
from functools import cache

from .registry import method_classes


def described(cls: type, name: str) -> str:
    """What the docstring of a class, or else of its bases, says of an argument of ``__init__``: one sentence."""
    for owner in cls.__mro__:
        text = _arguments(owner).get(name, "")
        other = re.match(r"as in ``(\w+)``", text)
        if other and other[1] in _classes():
            return described(_classes()[other[1]], name)
        if text:
            return re.split(r"(?<=\.)\s+(?=[A-Z])", text.replace("``", ""))[0].removesuffix(".")
    return ""


@cache
def _classes() -> dict[str, type]:
    """The methods of this package and their bases, by name."""
    return {cls.__name__: cls for method in method_classes() for cls in method.__mro__}


@cache
def _arguments(cls: type) -> dict[str, str]:
    """The section "Args" of a docstring, by argument; what is said of several at once starts with their names."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for together, text in re.findall(r"^ {4}([\w*, ]+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        text = " ".join(text.split())
        if ", " in together and not text.startswith("as in "):
            text = f"{together}: {text}"
        found |= dict.fromkeys(together.split(", "), text)
    return found
