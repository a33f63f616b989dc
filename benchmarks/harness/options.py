"""Options that the command lines share. Whatever would fail after minutes is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m COMMAND``, whose help is the module's docstring as it stands."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {command}", description=description, formatter_class=shape)


def fill(args: argparse.Namespace, defaults: dict[str, object]) -> None:
    """Settings that the command line leaves out."""
    for name, default in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Integers, or lists of them, of at least 1; None is one that was left out."""
    for name in names:
        value = getattr(args, name)
        least = min(value, default=None) if isinstance(value, list) else value
        if least is not None and least < 1:
            parser.error(f"--{name.replace('_', '-')}: got {least}; accepted: integers of at least 1")


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str] = ("json",)) -> None:
    """Files to write, in folders that exist."""
    for name in names:
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            parser.error(f"--{name}: there is no folder {str(file.parent)!r}; create it first")


def settings(args: argparse.Namespace) -> dict[str, object]:
    """All of them, for a report."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
