"""The ``pgap-kernels`` command: ``finetune``, ``methods`` and ``doctor``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .finetune import arguments as finetune_arguments
from .finetune.config import Config, field_default
from .finetune.errors import UserError
from .finetune.options import options_of, refuse_unknown

EPILOG = """\
examples:
  pgap-kernels doctor
      Which kernels run here, and why others do not.
  pgap-kernels methods
      Every method, and what a step of it costs.
  pgap-kernels finetune --method mezo --steps 100 --output runs/mezo
      The built-in model on the built-in data (about 95 MB fetched once, 0.6 GB of cache).
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other user error: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments without the program's name; those of the process by default.
    """
    try:
        arguments = vars(_parse(sys.argv[1:] if argv is None else argv))
        status = arguments.pop("command")(arguments)
        sys.stdout.flush()  # here, where a closed pipe can be dealt with
        return status
    except BrokenPipeError:  # the reader, such as `head`, has all that it wanted; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"pgap-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("pgap-kernels: interrupted before anything was measured; no report written", file=sys.stderr)
        return 128 + getattr(error, "number", 2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse in two goes: the method says which options there are."""
    first = _Parser(prog="pgap-kernels finetune", add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=field_default("method"))
    method = first.parse_known_args(argv)[0].method
    parser = _parser(method)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        if arguments.command is _finetune and name.startswith("--"):
            refuse_unknown(method, name[2:].replace("-", "_"), (field.name for field in fields(Config)))
        parser.error(f"{unknown[0]}: no such option or command")
    return arguments


def _doctor(arguments: dict[str, Any]) -> int:
    from . import doctor

    return doctor.main(arguments["json"])


def _methods(arguments: dict[str, Any]) -> int:
    from . import methods

    return methods.main(arguments["json"])


def _finetune(arguments: dict[str, Any]) -> int:
    json_output, fetch_only = arguments.pop("json"), arguments.pop("fetch_only")
    own = {name: arguments.pop(name) for name in options_of(arguments["method"]) if name in arguments}
    config = Config(**arguments, options=own)
    begun = time.time()
    # What these libraries tell one another's authors of their next versions; nobody can act on it here.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    try:
        from .finetune import report, run

        if fetch_only:
            return _fetch(config.data)
        result = run(config)
    except ModuleNotFoundError as error:
        raise UserError(f"finetune needs the package {error.name}: pip install 'pgap-kernels[finetune]'") from error
    except UserError:
        raise
    except Exception as error:
        # The report has the traceback; nobody wants to read it in a terminal.
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        # Of this run: an earlier one may have failed in another way. File systems round times, hence the second.
        written = Path(config.output).expanduser().rglob("report.json")
        reports = [file for file in written if file.stat().st_mtime >= begun - 1]
        told = [file for file in reports if '"traceback"' in file.read_text(encoding="utf-8")]
        if not told:
            traceback.print_exc()
        where = f" ({told[-1]} has the traceback)" if told else ""
        print(f"pgap-kernels: failed: {summary}{where}", file=sys.stderr)
        return 1
    if config.quiet and result["status"] == "diverged":  # else a note has said it
        last = result.get("runs", [result])[-1]
        lies = Path(last["config"]["output"], "report.json")
        print(f"pgap-kernels: diverged: {last['error']} ({lies} has the curves)", file=sys.stderr)
    if json_output:
        print(report.to_json(result))
    elif not config.quiet:
        from rich.console import Console

        from .finetune.table import print_table

        print_table(result, Console())
        print(f"{result['status']}; report.html is in {config.output}")
    return {"completed": 0, "interrupted": 128 + result.get("signal", 2)}.get(result["status"], 1)


def _fetch(name: str) -> int:
    from .finetune import fetch, models
    from .finetune.builtin import BUILT_IN

    models.default_model_dir()
    data = BUILT_IN.get(name)
    for file in (data.train, data.test) if data else ():
        if file is not None:
            fetch.fetch_data(file)
    fetched = "the built-in model" if data is None else f"the built-in model and {data.title}"
    print(f"in {fetch.cache_dir()}: {fetched}", file=sys.stderr)
    return 0


def _parser(method: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pgap-kernels",
        description="Zeroth-order fine-tuning with fused kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser.add_argument("--version", action="version", version=f"pgap-kernels {__version__}")
    doctor = commands.add_parser(
        "doctor",
        help="show which kernels run here, and why others do not",
        description="Show which kernels run here, and why others do not.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(command=_doctor)
    methods = commands.add_parser(
        "methods",
        help="list every method and what a step costs",
        description="List every method: forwards, passes over the weights by mode and state of a step, and what it is.",
    )
    methods.add_argument("--json", action="store_true", help="print JSON instead of a table")
    methods.set_defaults(command=_methods)
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a language model on your own data",
        epilog=finetune_arguments.EPILOG,
        description="Fine-tune a language model on labelled text, multiple choice or question and answer, with forward "
        "passes only.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the first go over the arguments knows no other options to tell --meth from
    )
    finetune.set_defaults(command=_finetune)
    finetune_arguments.add(finetune, method)
    return parser
