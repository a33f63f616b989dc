"""The ``pgap-kernels`` command: ``finetune`` and ``doctor``."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from .finetune.config import DTYPES, Config, field_default
from .finetune.options import Option, UserError, options_of, refuse_unknown
from .optim import available_methods
from .perturbation import MODES

EPILOG = """\
examples:
  pgap-kernels doctor
      Which kernels run here, and why others do not.
  pgap-kernels finetune --method mezo --steps 100 --output runs/mezo
      The built-in model on the built-in data (about 95 MB fetched once, 0.6 GB of cache).
"""

FINETUNE_EPILOG = """\
examples:
  pgap-kernels finetune
      P-GAP on the built-in model and data; writes runs/finetune/report.json and curves.png.
  pgap-kernels finetune --method lozo --help
      The options of another method. Those of mezo and pgap have defaults that were tried on the built-in model; those
      of the others are their papers', for longer runs of larger models: expect to raise --lr.
  pgap-kernels finetune --method mezo --lr 3e-5 --steps 500 --compare
      MeZO, then a few steps of MeZO in plain PyTorch, to compare seconds per step.
  pgap-kernels finetune --members 2 --groups 8 --lr-rule signal
      Both signs in one forward, a direction for every two sentences, and a learning rate that follows the signal that
      their losses show: |g|^2, tr Sigma and E |g_i|^2 of every step are in the report, and in a panel of curves.png.
  pgap-kernels finetune --model ./my-model --data reviews.csv --text-column review --label-column stars \\
      --template "{text} All in all it was" --verbalizers "5= good,1= bad" --save-model
      Your own model and data; each word must be one token after the template, hence the leading spaces.
  pgap-kernels finetune --json --steps 50 2>/dev/null | jq .test
      The report on stdout and nothing else there.

the built-in model is SmolLM2-135M-Instruct from a Q4_1 GGUF file, dequantised; it is not the published checkpoint.
the cache folder is $PGAP_CACHE, else $XDG_CACHE_HOME/pgap_kernels, else ~/.cache/pgap_kernels.
Ctrl-C ends a run after restoring the weights of the last completed step; the report holds what was measured so far.

exit status: 0 completed, 1 the loss was not finite, 2 an error that you can correct (one line on stderr says how),
130 interrupted.
"""


METAVARS = {"int": "N", "float": "X", "str": "WORD", "names": "NAME,NAME", "numbers_by_name": "NAME=X,NAME=X"}


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
        return arguments.pop("command")(arguments)
    except UserError as error:
        print(f"pgap-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pgap-kernels: interrupted before anything was measured; no report written", file=sys.stderr)
        return 130


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


def _finetune(arguments: dict[str, Any]) -> int:
    json_output, fetch_only = arguments.pop("json"), arguments.pop("fetch_only")
    own = {name: arguments.pop(name) for name in options_of(arguments["method"]) if name in arguments}
    config = Config(**arguments, options=own)
    try:
        from .finetune import report, run

        if fetch_only:
            return _fetch()
        result = run(config)
    except ModuleNotFoundError as error:
        raise UserError(f"finetune needs the package {error.name}: pip install 'pgap-kernels[finetune]'") from error
    if json_output:
        print(report.to_json(result))
    else:
        from rich.console import Console

        report.print_table(result, Console())
        print(f"{result['status']}; report.json and curves.png are in {config.output}")
    return {"completed": 0, "interrupted": 130}.get(result["status"], 1)


def _fetch() -> int:
    from .finetune import fetch, models

    models.default_model_dir()
    fetch.fetch_data()
    print(f"the built-in model and data are in {fetch.cache_dir()}", file=sys.stderr)
    return 0


def _parser(method: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pgap-kernels",
        description="Zeroth-order fine-tuning with fused kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="show which kernels run here, and why others do not",
        description="Show which kernels run here, and why others do not.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(command=_doctor)
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model on two-label text",
        epilog=FINETUNE_EPILOG,
        description="Fine-tune a causal language model on two-label text, with forward passes only.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the first go over the arguments knows no other options to tell --meth from
    )
    finetune.set_defaults(command=_finetune)
    _add_run_target(finetune)
    _add_method(finetune)
    _add_options_of(finetune, method)
    _add_data(finetune)
    _add_run(finetune)
    return parser


def _add_run_target(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to tune")
    _option(
        group,
        "model",
        str,
        "'default', a hub id, a folder with a model in safetensors form, or a .gguf file",
        metavar="MODEL",
    )
    _option(group, "data", str, "'default', or a .csv or .jsonl file with a text and a label column", metavar="DATA")
    _option(group, "device", str, "where to run: auto (CUDA if there is one), cpu, cuda, cuda:1, ...", metavar="DEVICE")
    _option(group, "dtype", str, "type of the weights", choices=DTYPES)


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    _option(group, "method", str, f"one of {', '.join(available_methods())}", metavar="METHOD")
    _option(group, "steps", int, "optimizer steps")
    _option(group, "batch-size", int, "sentences per step, and per forward of an evaluation")
    _option(
        group,
        "mode",
        str,
        "how perturbations reach the forwards: in place, on a perturbed copy of each layer (scratch), or beside the "
        "layer's output (folded, methods with low-rank directions only); auto picks",
        choices=MODES,
    )
    _option(group, "seed", int, "seed of the noise and of the order of the batches")


def _add_options_of(parser: argparse.ArgumentParser, method: str) -> None:
    group = parser.add_argument_group(f"options of {method}")
    for option in options_of(method).values():
        more: dict[str, Any] = {"type": option.read, "metavar": METAVARS.get(option.read.__name__)}
        if option.read is bool:
            more = {"action": argparse.BooleanOptionalAction}
        # Absent unless given, so that only given ones are the user's.
        group.add_argument(option.flag, default=argparse.SUPPRESS, help=_help(option), **more)


def _help(option: Option) -> str:
    default = option.default
    if default is inspect.Parameter.empty:
        return f"{option.help} (required)".replace("%", "%%")
    if isinstance(default, bool):
        default = "yes" if default else "no"
    elif isinstance(default, (list, tuple)):
        default = ",".join(default)
    return f"{option.help} (default: {'none' if default in (None, '') else default})".replace("%", "%%")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    _option(group, "max-length", int, "tokens, template included; longer sentences are dropped")
    for part in ("train", "dev", "test"):
        _option(group, f"{part}-size", int, f"sentences in the {part} part; scaled down if the data has too few")
    _option(group, "data-seed", int, "seed of the split")
    _option(group, "text-column", str, "column of the text in your own data", metavar="NAME")
    _option(group, "label-column", str, "column of the label in your own data", metavar="NAME")
    _option(group, "template", str, "the prompt; {text} stands for the text", metavar="TEXT")
    _option(
        group,
        "verbalizers",
        str,
        "the word that stands for each label, exactly as it follows the template "
        '(default: "1= great,0= terrible", same for positive and negative)',
        metavar="LABEL=WORD,LABEL=WORD",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run and report")
    _option(group, "output", str, "folder for report.json, curves.png and model/", metavar="DIR")
    _flag(group, "save-model", "also write the tuned model to DIR/model (safetensors)")
    _option(group, "eval-every", int, "steps between two evaluations on dev")
    _option(group, "eval-limit", int, "dev sentences used during the run (test always uses all)")
    _flag(
        group,
        "compare",
        "afterwards run a few steps of the method in plain PyTorch (torch.normal per parameter, "
        "elementwise ops) from the same weights on the same batches, and compare the seconds",
    )
    _option(group, "compare-steps", int, "steps in plain PyTorch")
    _flag(
        group,
        "compare-full-refresh",
        "pgap: run the refresh in plain PyTorch in full (all probes, an SVD per matrix: "
        "minutes on a CPU) instead of estimating it from one probe and one SVD per distinct shape",
    )
    _flag(group, "json", "print the report as JSON on stdout, and nothing else there")
    _flag(group, "fetch-only", "fill the cache with the built-in model and data, then end")


def _flag(group: Any, name: str, description: str) -> None:
    group.add_argument(f"--{name}", action="store_true", help=description)


def _option(group: Any, name: str, kind: type, description: str, **more: Any) -> None:
    """Add an option of the run with its default in the help text."""
    default = field_default(name.replace("-", "_"))
    if default is not None:
        description += f" (default: {default})"
    more.setdefault("metavar", None if "choices" in more else METAVARS.get(kind.__name__))
    group.add_argument(f"--{name}", type=kind, default=default, help=description.replace("%", "%%"), **more)
