"""The ``pgap-kernels`` command: ``finetune`` and ``doctor``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .finetune.config import DTYPES, METHODS, Config, UserError, field_default
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
  pgap-kernels finetune --method mezo --lr 3e-5 --steps 500 --baseline
      MeZO, then a few steps of MeZO in plain PyTorch, to compare seconds per step.
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
        arguments = vars(_parser().parse_args(argv))
        return arguments.pop("command")(arguments)
    except UserError as error:
        print(f"pgap-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pgap-kernels: interrupted before anything was measured; no report written", file=sys.stderr)
        return 130


def _doctor(arguments: dict[str, Any]) -> int:
    from . import doctor

    return doctor.main(arguments["json"])


def _finetune(arguments: dict[str, Any]) -> int:
    json_output, fetch_only = arguments.pop("json"), arguments.pop("fetch_only")
    config = Config(**arguments)
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


def _parser() -> argparse.ArgumentParser:
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
    )
    finetune.set_defaults(command=_finetune)
    _add_run_target(finetune)
    _add_method(finetune)
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
    _option(group, "method", str, "the zeroth-order method", choices=tuple(METHODS))
    _option(group, "steps", int, "optimizer steps")
    _option(group, "batch-size", int, "sentences per step, and per forward of an evaluation")
    _option(group, "lr", float, "learning rate")
    _option(group, "eps", float, "size of the perturbation, in units of the weights per unit of noise")
    _option(group, "rank", int, "rank of the subspace of every matrix")
    _option(group, "window", int, "steps between two refreshes of the subspaces")
    _option(group, "probes", int, "probes of a refresh, two forwards each")
    _option(group, "delta", float, "strength of the alignment: squared inner product with the normalised gradient")
    _option(
        group,
        "mode",
        str,
        "how perturbations reach the forwards: in place, on a perturbed copy of each layer (scratch), or beside the "
        "layer's output (folded, pgap only); auto picks",
        choices=MODES,
    )
    _option(group, "seed", int, "seed of the noise and of the order of the batches")


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
        "baseline",
        "afterwards run a few steps of the method in plain PyTorch (torch.normal per parameter, "
        "elementwise ops) from the same weights on the same batches, and compare the seconds",
    )
    _option(group, "baseline-steps", int, "steps of the baseline")
    _flag(
        group,
        "baseline-full-refresh",
        "pgap: run the baseline's refresh in full (all probes, an SVD per matrix: "
        "minutes on a CPU) instead of estimating it from one probe and one SVD per distinct shape",
    )
    _flag(group, "json", "print the report as JSON on stdout, and nothing else there")
    _flag(group, "fetch-only", "fill the cache with the built-in model and data, then end")


def _flag(group: Any, name: str, description: str) -> None:
    group.add_argument(f"--{name}", action="store_true", help=description)


def _option(group: Any, name: str, kind: type, description: str, **more: Any) -> None:
    """Add an option with its default in the help text; a method's own option names the default per method."""
    field = name.replace("-", "_")
    default = field_default(field)
    per_method = [f"{method} {row[field]}" for method, row in METHODS.items() if field in row]
    shown = ", ".join(per_method) if per_method else default
    if shown is not None:
        description += f" (default: {shown})"
    more.setdefault("metavar", None if "choices" in more else {int: "N", float: "X"}.get(kind))
    group.add_argument(f"--{name}", type=kind, default=default, help=description.replace("%", "%%"), **more)
