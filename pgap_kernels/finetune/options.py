"""The options of a method on the command line, read off its signature and docstrings: there is no second list."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..optim import LowRankOptimizer, ZOOptimizer, method_options
from ..optim.described import described
from ..optim.options import by_name, renamed
from ..optim.registry import did_you_mean, method_class
from .errors import UserError
from .tuned import OVERRIDES

#: The same of every method that has the option: nobody reads the weights before the run's loop has merged.
OF_ALL: dict[str, Any] = {"merge": "window"}

#: Options of methods that are options of the run as well; methods take the run's value.
OF_THE_RUN = ("batch_size", "mode", "seed")


@dataclass(frozen=True)
class Option:
    """An option of a method: its name in Python, what makes a value of its text, its default and one line on it."""

    name: str
    read: Callable[[str], Any]
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def words(self) -> tuple[str, ...]:
        """What it accepts, if its text quotes words; to ask the method would be to make one, and takes seconds."""
        # Those of another option follow its name.
        found = re.findall(r'(?<!=)(?<!mode )"([\w-]+)"', self.help) if self.read is str else []
        return tuple(found) if self.default is None or self.default in found else ()


def names(text: str) -> list[str]:
    """A list from NAME,NAME."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_by_name(text: str) -> dict[str, float]:
    """As ``optim.options.by_name``, with the error that argparse reports."""
    try:
        found = by_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if "" in found:  # there is no =
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: NAME=NUMBER,NAME=NUMBER")
    return found


#: How an optimizer's messages write an argument and its value.
ASSIGNED = re.compile(r"\b(mode|merge|members|groups|baseline|rule|scale|update)=[\"']?([\w-]+)[\"']?")

READERS: dict[str, Callable[[str], Any]] = {
    "bool": bool,  # two flags, --name and --no-name
    "int": int,
    "float": float,
    "str": str,
    "Sequence[str]": names,
    "Mapping[str, float]": numbers_by_name,
}


@cache
def options_of(method: str) -> dict[str, Option]:
    """The options of a method that make sense on the command line, its own before those of every method.

    Raises:
        UserError: there is no such method.
    """
    try:
        cls, parameters = method_class(method), method_options(method)
    except (TypeError, ValueError) as error:
        raise UserError(as_flags(str(error)).replace("--name:", "--method:")) from error
    found = {}
    for name, parameter in parameters.items():
        read = _reader(parameter)
        if read and name not in OF_THE_RUN and _serves(cls, name, parameters):
            default = {name: parameter.default, **OF_ALL, **OVERRIDES.get(method, {})}[name]
            found[name] = Option(name, read, default, described(cls, name))
    return found


def _reader(parameter: inspect.Parameter) -> Callable[[str], Any] | None:
    """What reads a value of a parameter's type, or its default's; None for those of programs only, such as a module."""
    text = parameter.annotation
    if text is parameter.empty:
        text = type(parameter.default)
    if not isinstance(text, str):
        text = inspect.formatannotation(text)
    return READERS.get(text.replace("collections.abc.", "").removesuffix(" | None"))


def _serves(cls: type[ZOOptimizer], name: str, parameters: Any) -> bool:
    """Whether a method can do anything with an option that every method has."""
    needs = {
        "groups": cls.takes_groups,
        "residual": cls.takes_residual,
        "two_pass": cls.plans_ahead,
        "merge": issubclass(cls, LowRankOptimizer),
        "lr_rule": cls.takes_groups,
    }
    return needs.get(name, True)


def refuse_unknown(method: str, given: str, others: Iterable[str] = ()) -> None:
    """Raise UserError if a method has no option of that name; ``others`` may have been meant too."""
    known = options_of(method)
    if given in known:
        return
    hint = did_you_mean(given, [*known, *others], flag)
    accepted = ", ".join(option.flag for option in known.values())
    raise UserError(f"{flag(given)}: --method {method} has no such option{hint}; accepted with it: {accepted}")


# ---- names ----------------------------------------------------------------------------------------------------------


def flag(name: str) -> str:
    """A name in Python as it is on the command line."""
    return "--" + name.replace("_", "-")


def as_flags(message: str) -> str:
    """The error message of an optimizer, with the arguments that it names as they are on the command line."""
    return ASSIGNED.sub(lambda found: f"{flag(found[1])} {found[2]}", renamed(message, flag))
