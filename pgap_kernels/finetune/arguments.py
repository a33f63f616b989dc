"""The options of ``pgap-kernels finetune``, in groups by what one wants to do."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from ..optim import available_methods
from ..perturbation import MODES
from .builtin import BUILT_IN
from .config import DTYPES, KEEP, OBJECTIVES, SCHEDULE_NAMES, SIZES, TASKS, TOO_LONG, field_default
from .options import Option, names, options_of
from .tuned import ADAPTER_FACTORS, FEW, HALVED, OVERRIDES, WITH_ADAPTERS

EPILOG = """\
examples:
  pgap-kernels finetune
      P-GAP on the built-in model and data; look at runs/finetune/report.html.
  pgap-kernels finetune --method lozo --help
      The options of another method. Learning rates were chosen on the built-in model: larger models need smaller ones.
  pgap-kernels finetune --method mezo --lr 3e-5 --steps 500 --compare
      MeZO, and beside a few of its steps MeZO in plain PyTorch, to compare seconds per step.
  pgap-kernels finetune --members 2 --groups 8 --lr-rule signal
      Both signs in one forward, a direction for every two sentences, and a learning rate that follows the signal that
      their losses show: |g|^2, tr Sigma and E |g_i|^2 of every step are in the report, and in a panel of curves.png.

your own model and data:
  pgap-kernels finetune --model ./my-model --data reviews.csv --text-column review --label-column stars \\
      --template "{text} All in all it was" --verbalizers "5= good,1= bad" --save-model
      The words follow the template as they are, hence the leading spaces. Without --verbalizers a label's word is the
      label itself. Any number of labels; words of several tokens are scored by their mean log-likelihood.
  pgap-kernels finetune --task choice --data quiz.jsonl --template "{question} Answer:" --choices options \\
      --label-column answer
      Choices from a column that holds a list, or from several: --choices a,b,c. The answer is one of them, its number
      from 0, or its letter.
  pgap-kernels finetune --task generation --data squad.parquet --template @prompt.txt --label-column answers
      The loss is that of the answer's tokens; evaluations decode greedily and report F1 and exact match as SQuAD does.
      The template is in a file; \\n in one on the command line is a new line.
  pgap-kernels finetune --objective accuracy --steps 1000
      Steps that raise the accuracy itself, which no gradient could.
  pgap-kernels finetune --model ./my-model --lora-rank 8 --save-model --output runs/lora
  pgap-kernels finetune --model ./runs/lora/model
      Train a new LoRA adapter; then continue training it.

interrupting and resuming:
  pgap-kernels finetune --output runs/long --steps 20000 --time-limit 600
  pgap-kernels finetune --output runs/long --steps 20000 --time-limit 600 --resume
      A run that ended early, or ran out of time, continues from its last checkpoint, to the same bits. Ctrl-C, SIGTERM
      and SIGHUP end it with a report and the weights of the last completed step.
  pgap-kernels finetune --seed 0,1,2
      Three runs, and a report on all of them.
  pgap-kernels finetune --json --steps 50 2>/dev/null | jq .test
      The report on stdout and nothing else there.

the built-in model is SmolLM2-135M-Instruct from a Q4_1 GGUF file, dequantised; it is not the published checkpoint.
the cache folder is $PGAP_CACHE, else $XDG_CACHE_HOME/pgap_kernels, else ~/.cache/pgap_kernels.

exit status: 0 completed (--time-limit and --patience included), 1 the loss was not finite or something failed (the
report says what), 2 an error that you can correct (one line on stderr says how), 128 and the signal's number if a
signal ended it: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

#: Options that are another one's value where they are not given: eps and lr.
FOLLOWING = ("eps_probe", "eps_dense", "lr_dense")
METAVARS = {"int": "N", "float": "X", "str": "WORD", "names": "NAME,NAME", "numbers_by_name": "NAME=X,NAME=X"}


def add(parser: argparse.ArgumentParser, method: str) -> None:
    """Add all options to a parser, those of the method among them."""
    _add_task(parser)
    _add_model(parser)
    _add_method(parser)
    _add_options_of(parser, method)
    _add_evaluation(parser)
    _add_output(parser)
    _add_comparison(parser)


def seeds(text: str) -> int | tuple[int, ...]:
    """N, or several as N,N."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: an integer, or several as N,N") from None
    return found[0] if len(found) == 1 else found


def template(text: str) -> str:
    r"""A template, in which \n is a new line."""
    return text.replace("\\n", "\n")


def _add_task(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to learn")
    _option(group, "data", str,
            f"{', '.join(map(repr, BUILT_IN))} (built in), a .csv, .tsv, .jsonl or .parquet file, a folder of the "
            "library datasets, or a data set on the hub: ID, or ID:CONFIGURATION", metavar="DATA")  # fmt: skip
    _option(group, "split", str, "which split to train on, where the data has several", metavar="NAME")
    _option(group, "test-data", str, "other data to test on; else a part of the data is kept for it", metavar="DATA")
    _option(group, "test-split", str, "which split to test on, of --test-data, else of --data", metavar="NAME")
    _option(group, "task", str, "labels that many examples share, choices of every example's own, or free text",
            choices=TASKS)  # fmt: skip
    _option(group, "template", template,
            "the prompt; {text} stands for the text and {other} for any other column; @FILE reads it from a file, and "
            "{mask} is where a masked model fills in (default: that of the built-in data, else '{text} It was')",
            metavar="TEXT")  # fmt: skip
    _option(group, "text-column", str, "column that {text} stands for", metavar="NAME")
    _option(group, "label-column", str, "column of the label, of the right choice, or of the answers", metavar="NAME")
    _option(group, "verbalizers", str,
            "the word that stands for each label, exactly as it follows the template (default: great and terrible for "
            "1 and 0, positive and negative, true and false; else the labels themselves); where labels hold commas, a "
            "JSON object",
            metavar="LABEL=WORD,LABEL=WORD")  # fmt: skip
    _option(group, "choices", names, "column with a list of choices, or several columns with one each")
    _option(group, "objective", str, "what the steps improve: the loss, or the metric itself, which has no gradient",
            choices=OBJECTIVES)  # fmt: skip
    _option(group, "max-length", int,
            "tokens of a prompt with its answer (default: that of the built-in data, else 128)")  # fmt: skip
    _option(group, "too-long", str, "drop longer prompts, or cut their {text} (default: drop; r8: cut)",
            choices=TOO_LONG)  # fmt: skip
    _option(group, "max-new-tokens", int, "tokens of a generated answer at most")
    for name, size in SIZES.items():
        part = name.partition("_")[0]
        _option(
            group,
            f"{part}-size",
            int,
            f"examples in the {part} part (default: {size}, or fewer if the data has too few)",
        )
    _option(group, "data-seed", int, "seed of the split")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to tune")
    _option(group, "model", str,
            "'default', a hub id, a folder with a model in safetensors form or with a PEFT adapter, or a .gguf file",
            metavar="MODEL")  # fmt: skip
    _option(group, "tune", names,
            "linear: the linear layers, experts included, but not the head; all; or patterns of parameter names, such "
            "as '*.mlp.*,*q_proj*'")  # fmt: skip
    _option(
        group,
        "lora-rank",
        int,
        "add a LoRA adapter of this rank to the linear layers that --tune selects, and tune only the adapter",
    )
    _option(group, "device", str, "where to run: auto (CUDA if there is one), cpu, cuda, cuda:1, ...", metavar="DEVICE")
    _option(group, "dtype", str, "type of the weights", choices=DTYPES)


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    _option(group, "method", str, f"one of {', '.join(available_methods())}", metavar="METHOD")
    _option(group, "steps", int, "optimizer steps")
    _option(group, "batch-size", int, "examples per step, and per forward of an evaluation (times --members)")
    _option(group, "schedule", str,
            "learning-rate schedule, as in transformers (default: what was tried with the method, else constant)",
            choices=SCHEDULE_NAMES)  # fmt: skip
    _option(group, "warmup", int, "steps in which the learning rate rises from 0")
    _option(group, "mode", str,
            "how perturbations reach the forwards: in place, on a perturbed copy of each layer (scratch), or beside "
            "the layer's output (folded, methods with low-rank directions only); auto picks",
            choices=MODES)  # fmt: skip
    _option(group, "seed", seeds, "of the noise and of the order of the batches; a list makes one run per seed",
            metavar="N[,N]")  # fmt: skip


def _add_options_of(parser: argparse.ArgumentParser, method: str) -> None:
    group = parser.add_argument_group(f"options of {method}")
    for option in options_of(method).values():
        more: dict[str, Any] = {"type": option.read, "metavar": METAVARS.get(option.read.__name__)}
        if option.words:
            more["metavar"] = f"{{{','.join(option.words)}}}"  # no choices, as the method's own error says more
        if option.read is bool:
            more = {"action": argparse.BooleanOptionalAction}
        # Absent unless given, so that only given ones are the user's.
        group.add_argument(option.flag, default=argparse.SUPPRESS, help=_help(option, method), **more)


def _help(option: Option, method: str) -> str:
    default = option.default
    if default is inspect.Parameter.empty:
        return f"{option.help} (required)".replace("%", "%%")
    # These follow another unless they are given.
    shown = option.name.partition("_")[0] if option.name in FOLLOWING and default is None else _shown(default)
    if option.name == "lr" and method in OVERRIDES:
        shown += f"; half of it with more than {FEW} labels, or --task {' or '.join(HALVED)}"
    if option.name in ADAPTER_FACTORS and method in WITH_ADAPTERS:
        shown += f"; {ADAPTER_FACTORS[option.name]:g} times as much for adapters"
    return f"{option.help} (default: {shown})".replace("%", "%%")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluations, and when to end")
    _option(group, "eval-every", int, "steps between two evaluations on dev")
    _option(group, "eval-limit", int, "dev examples used during the run (test always uses all)")
    _option(group, "keep", str, "which weights the run ends with: the last, or the best on dev", choices=KEEP)
    _option(group, "patience", int, "end after so many evaluations that are no better than the best")
    _option(group, "time-limit", float, "end after so many minutes")
    _flag(group, "evaluate-only", "make no step: score the test part")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is written")
    _option(group, "output", str, "folder for report.html, report.json, curves.png, curve.csv and model/",
            metavar="DIR")  # fmt: skip
    _flag(
        group,
        "overwrite",
        "delete the model and checkpoints of an earlier run in that folder; its report is replaced either way",
    )
    _flag(group, "save-model", "also write the tuned model, or its adapter, to DIR/model (safetensors)")
    _option(group, "checkpoint-every", int,
            "steps between two checkpoints, as large as the tuned weights (default: at every evaluation; 0: none)",
            metavar="N")  # fmt: skip
    _flag(group, "keep-checkpoints", "keep all of them; by default the last, which is deleted when the run is complete")
    _flag(group, "resume", "continue from the last checkpoint in DIR")
    _flag(group, "tensorboard", "also write the curves for TensorBoard to DIR/tensorboard")
    _flag(group, "json", "print the report as JSON on stdout, and nothing else there")
    _flag(group, "quiet", "no progress and no notes on stderr, no table on stdout")
    _flag(group, "fetch-only", "fetch the built-in model, and --data if it is built in, into the cache, then exit")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison with plain PyTorch")
    _flag(group, "compare",
          "mezo, pgap: beside a few steps make the same in plain PyTorch (torch.normal per parameter, elementwise ops) "
          "on a second copy of the model, in turns, and compare the seconds")  # fmt: skip
    _option(group, "compare-steps", int, "steps in plain PyTorch")
    _flag(group, "compare-full-refresh",
          "pgap: run the refresh in plain PyTorch in full (all probes, an SVD per matrix: minutes on a CPU) instead of "
          "estimating it from one probe and one SVD per distinct shape")  # fmt: skip


def _flag(group: Any, name: str, description: str) -> None:
    group.add_argument(f"--{name}", action="store_true", help=description)


def _option(group: Any, name: str, kind: Callable[[str], Any], description: str, **more: Any) -> None:
    """Add an option of the run with its default in the help text."""
    default = field_default(name.replace("-", "_"))
    if default is not None:
        description += f" (default: {_shown(default)})"
    more.setdefault("metavar", None if "choices" in more else METAVARS.get(kind.__name__))
    group.add_argument(f"--{name}", type=kind, default=default, help=description.replace("%", "%%"), **more)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default)) or "none"
    return "none" if default in (None, "") else str(default)
