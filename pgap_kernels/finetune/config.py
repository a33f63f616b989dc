"""What a fine-tuning run is asked to do, and the checks on it."""

from __future__ import annotations

import copy
import inspect
import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..optim import ZOOptimizer, make_optimizer, method_options
from ..optim.options import number
from ..optim.signal import signal_of
from ..perturbation import MODES
from . import tuned
from .baseline import BASELINES
from .builtin import BUILT_IN
from .errors import UserError
from .options import as_flags, flag, names, numbers_by_name, options_of, refuse_unknown

DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("classification", "choice", "generation")
#: What steps make small, and the tasks that have it.
OBJECTIVES = {"loss": TASKS, "accuracy": TASKS, "f1": ("generation",)}
TOO_LONG = ("drop", "cut")
KEEP = ("last", "best")
#: Of transformers.get_scheduler.
SCHEDULE_NAMES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
DEFAULT = "default"
ADAPTER_FILE = "adapter_config.json"  # that makes a folder one of a PEFT adapter
#: Options of several points in one forward, which plain PyTorch does not have: it takes as many examples two-sided.
POPULATION = ("members", "groups", "directions", "baseline")
INTEGERS = (
    "lora_rank", "max_length", "max_new_tokens", "train_size", "dev_size", "test_size", "data_seed", "steps",
    "batch_size", "warmup", "eval_every", "eval_limit", "patience", "checkpoint_every", "compare_steps",
)  # fmt: skip

#: How many examples the parts have where nobody has said it: fewer, if the data has too few.
SIZES = {"train_size": 1000, "dev_size": 500, "test_size": 1000}

#: Options that a built-in data set has values of its own for, and those of all other data.
OF_DATA: dict[str, Any] = {
    "template": "{text} It was",
    "verbalizers": None,
    "max_length": 128,
    "too_long": "drop",
}


@dataclass
class Config:
    """Options of one run, as on the command line (`pgap-kernels finetune --help` describes each).

    ``options`` are the method's own, as its optimizer takes them; those left out take their defaults. Options that the
    data or the method decide are None where they were not given, and hold the value in force once the object is made.

    Raises:
        UserError: an option is outside what it accepts; the message names it, the value and the accepted ones.
    """

    model: str = DEFAULT
    lora_rank: int | None = None
    tune: Sequence[str] = ("linear",)
    device: str = "auto"
    dtype: str = "float32"
    data: str = DEFAULT
    test_data: str | None = None
    split: str = "train"
    test_split: str | None = None
    task: str = "classification"
    text_column: str = "text"
    label_column: str = "label"
    choices: Sequence[str] = ("choices",)
    template: str = None  # type: ignore[assignment]  # None until the data has its say
    verbalizers: str | None = None
    max_length: int = None  # type: ignore[assignment]
    too_long: str = None  # type: ignore[assignment]
    max_new_tokens: int = 16
    train_size: int = None  # type: ignore[assignment]
    dev_size: int = None  # type: ignore[assignment]
    test_size: int = None  # type: ignore[assignment]
    data_seed: int = 0
    method: str = "pgap"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 100
    batch_size: int = 16
    mode: str = "auto"
    objective: str = "loss"
    schedule: str = None  # type: ignore[assignment]
    warmup: int = 0
    seed: int | Sequence[int] = 0
    evaluate_only: bool = False
    eval_every: int = 25
    eval_limit: int = 200
    patience: int | None = None
    keep: str = "last"
    time_limit: float | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: bool = False
    resume: bool = False
    output: str = "runs/finetune"
    overwrite: bool = False
    save_model: bool = False
    tensorboard: bool = False
    quiet: bool = False
    compare: bool = False
    compare_steps: int = 3
    compare_full_refresh: bool = False

    def __post_init__(self) -> None:
        self._take_plain_types()
        if self.test_split is not None and self.test_data is None:
            self.test_data = self.data
        self.default_sizes = {name for name in SIZES if getattr(self, name) is None}
        for name in self.default_sizes:
            setattr(self, name, SIZES[name])
        self._check_names()
        self._check_numbers()
        self._take_defaults_of_data()
        if not re.search(r"\{[^{}]+\}", self.template):
            open_brace = "; a brace is not closed" if self.template.count("{") > self.template.count("}") else ""
            raise UserError(
                f"--template: got {self.template!r}; accepted: a text that contains {{text}}, or other columns"
                f"{open_brace}"
            )
        if Path(self.output).expanduser().exists() and not Path(self.output).expanduser().is_dir():
            raise UserError(f"--output: {self.output!r} is a file; accepted: a folder, new or existing")
        for name in self.options:
            refuse_unknown(self.method, name)
        if self.compare:
            self._check_comparison()
        self.takes_tuned_rate = self.method in tuned.OVERRIDES and "lr" not in self.options
        self.options = self._defaults() | self.options
        if self.schedule is None:
            self.schedule = tuned.schedule_of(self.method)
        self._check_options()

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _take_plain_types(self) -> None:
        """Paths as text, and numbers of other libraries as Python's, as the report is JSON.

        Raises:
            UserError: a value of another type than the option's.
        """
        for name in ("model", "data", "test_data", "output"):
            value = getattr(self, name)
            if not isinstance(value, (str, os.PathLike, type(None))):
                raise UserError(f"{flag(name)}: got {value!r}; accepted: text or a path")
            if value == "":  # as of a shell's variable that is not set
                raise UserError(f"{flag(name)}: got ''; accepted: a name or a path")
            setattr(self, name, value if value is None else os.fspath(value))
        for name in INTEGERS:
            setattr(self, name, self._integer(name, getattr(self, name)))
        if self.time_limit is not None:
            self.time_limit = self._number("time_limit", self.time_limit)
        try:
            self.seed = operator.index(self.seed)  # type: ignore[arg-type]
        except TypeError:
            several = () if isinstance(self.seed, str) or not isinstance(self.seed, Iterable) else self.seed
            self.seed = tuple(int(self._integer("seed", value) or 0) for value in several)
        if not isinstance(self.options, (Mapping, type(None))):
            raise UserError(f"options: got {self.options!r}; accepted: a dict of the method's own")
        self.options = {name: plain_number(value) for name, value in (self.options or {}).items()}
        for name in ("template", "verbalizers"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise UserError(f"{flag(name)}: got {getattr(self, name)!r}; accepted: text")

    def _integer(self, name: str, value: Any) -> int | None:
        try:
            return None if value is None else operator.index(value)
        except TypeError:
            raise UserError(f"{flag(name)}: got {value!r}; accepted: an integer") from None

    def _number(self, name: str, value: Any) -> float:
        try:
            return number(name, value)
        except ValueError:
            raise UserError(f"{flag(name)}: got {value!r}; accepted: a number") from None

    def _check_names(self) -> None:
        for name, accepted in (
            ("dtype", DTYPES), ("mode", MODES), ("task", TASKS), ("objective", tuple(OBJECTIVES)), ("keep", KEEP)
        ):  # fmt: skip
            self._accept(name, accepted)
        if self.too_long is not None:
            self._accept("too_long", TOO_LONG)
        if self.schedule is not None:
            self._accept("schedule", SCHEDULE_NAMES)
        if self.task not in OBJECTIVES[self.objective]:
            raise UserError(
                f"--objective: got {self.objective!r} with --task {self.task}; accepted: "
                f"{', '.join(name for name, tasks in OBJECTIVES.items() if self.task in tasks)}"
            )
        if self.task != "choice" and tuple(self.choices) != field_default("choices"):
            raise UserError(f"--choices: got {','.join(self.choices)} with --task {self.task}; accepted: with choice")
        if self.task != "classification" and self.verbalizers is not None:
            raise UserError(
                f"--verbalizers: got {self.verbalizers!r} with --task {self.task}; accepted: with classification"
            )
        if self.resume and self.overwrite:
            raise UserError(
                "--resume: got it with --overwrite, which would take away what it goes on from; accepted: one"
            )
        for name in ("tune", "choices"):
            if isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UserError(f"{flag(name)}: got {getattr(self, name)!r}; accepted: a list of names")

    def _accept(self, name: str, accepted: Sequence[str]) -> None:
        if getattr(self, name) not in accepted:
            raise UserError(f"{flag(name)}: got {getattr(self, name)!r}; accepted: {', '.join(accepted)}")

    def _check_numbers(self) -> None:
        for name in (
            "batch_size", "compare_steps", "eval_every", "eval_limit", "steps", "train_size", "dev_size", "test_size",
            "max_new_tokens",
        ):  # fmt: skip
            self._require(name, "an integer of at least 1", lambda value: value >= 1)
        for name in ("max_length", "lora_rank", "patience"):
            self._require(name, "an integer of at least 1", lambda value: value is None or value >= 1)
        self._require("checkpoint_every", "an integer of at least 0", lambda value: value is None or value >= 0)
        self._require("warmup", f"an integer from 0 to --steps {self.steps}", lambda value: 0 <= value <= self.steps)
        self._require("time_limit", "minutes, more than 0", lambda value: value is None or value > 0)
        self._require("data_seed", "an integer from 0 to 2^64 - 1", lambda value: 0 <= value < 2**64)
        for seed in self.seeds:
            if not 0 <= seed < 2**64:
                raise UserError(f"--seed: got {seed}; accepted: an integer from 0 to 2^64 - 1, or several")
        if len({*self.seeds}) < max(1, len(self.seeds)):
            raise UserError(f"--seed: got {self.seed!r}; accepted: one seed, or several different ones")

    def _require(self, name: str, accepted: str, test: Any) -> None:
        value = getattr(self, name)
        if not test(value):
            raise UserError(f"{flag(name)}: got {value}; accepted: {accepted}")

    # ---- what depends on the data and the method --------------------------------------------------------------------

    @property
    def seeds(self) -> tuple[int, ...]:
        """One run for each."""
        return (self.seed,) if isinstance(self.seed, int) else tuple(self.seed)

    def of_seed(self, seed: int, output: str) -> Config:
        """The run of one of several seeds, in a folder of its own."""
        other = copy.copy(self)  # it was checked, and its options are complete
        other.seed, other.output, other.options = seed, output, dict(self.options)
        return other

    def for_labels(self, count: int) -> Config:
        """The run on data with so many labels, which are not known before it is read: many take half the rate."""
        if count <= tuned.FEW or self.task != "classification" or not self.takes_tuned_rate:
            return self
        other = copy.copy(self)
        other.options = self.options | {"lr": self.options["lr"] / 2}
        return other

    def _take_defaults_of_data(self) -> None:
        built_in = BUILT_IN.get(self.data)
        own = built_in.settings if built_in and self.task == "classification" else {}
        for name, value in {**OF_DATA, **own}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.template.startswith("@"):
            try:
                self.template = Path(self.template[1:]).expanduser().read_text(encoding="utf-8-sig").removesuffix("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--template: cannot read the file {self.template[1:]!r} ({error})") from error

    def _defaults(self) -> dict[str, Any]:
        options = options_of(self.method).items()
        found = {name: option.default for name, option in options if option.default is not inspect.Parameter.empty}
        found = tuned.scaled(self.method, found, self.task in tuned.HALVED, self.tunes_adapter)
        if "merge" in found and self.mode not in ("auto", "folded"):
            found["merge"] = "step"  # other modes have no window
        return found

    def _check_comparison(self) -> None:
        """Refuse what the method in plain PyTorch does not have."""
        if self.method not in BASELINES:
            raise UserError(
                f"--compare: got it with --method {self.method}; accepted: with {' and '.join(BASELINES)}, of which "
                "there is a version in plain PyTorch"
            )
        known = inspect.signature(BASELINES[self.method]).parameters
        for name, value in self.options.items():
            if name not in known and name not in POPULATION:
                accepted = ", ".join(flag(other) for other in options_of(self.method) if other in known)
                raise UserError(
                    f"{flag(name)}: got {value} with --compare; the method in plain PyTorch has no more than {accepted}"
                )

    def _check_options(self) -> None:
        """Let the method check its options now, on a weight of its own, as loading a model takes long.

        What it says of names has to wait for the model: here, every pattern matches.
        """
        weight = torch.nn.Linear(2, 2, bias=False, device="meta").to_empty(device="cpu")  # no random number is drawn
        options = dict(self.options)
        for name, option in options_of(self.method).items():
            if option.read is names and options[name]:
                options[name] = ["*"]
            elif option.read is numbers_by_name and options[name]:
                options[name] = {"*" * (i + 1): value for i, value in enumerate(options[name].values())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = self.make_optimizer(weight.to(getattr(torch, self.dtype)), options)
        if self.batch_size % optimizer.groups:
            raise UserError(
                f"--groups: got {optimizer.groups}; accepted: a number that divides --batch-size {self.batch_size}"
            )
        try:
            optimizer.check_schedule()
        except ValueError as error:
            raise UserError(as_flags(str(error))) from error
        if optimizer.lr_rule and not self._tells_signal(optimizer):
            raise UserError(
                f"--lr-rule: got {optimizer.lr_rule!r}; accepted: with --members or --groups of 2 or more, two "
                "examples or more in a group, and two directions or more with --baseline clean"
            )

    def _tells_signal(self, optimizer: Any) -> bool:
        """Whether a step's losses will say what the learning rate is to follow."""
        sampling = optimizer.sampling
        signal = signal_of(torch.zeros(sampling.copies, self.batch_size), sampling.groups, sampling.baseline, 1.0)
        return optimizer.members * optimizer.groups > 1 and signal.squared_norm is not None

    @property
    def tunes_adapter(self) -> bool:
        """Whether an adapter is what is tuned: a new one, or the one that ``model`` is."""
        return self.lora_rank is not None or (Path(self.model).expanduser() / ADAPTER_FILE).is_file()

    @property
    def slices(self) -> int:
        """Points of one forward."""
        return self.options.get("members", 1) * self.options.get("groups", 1)

    def make_optimizer(
        self, model: torch.nn.Module, options: dict[str, Any] | None = None, mode: str | None = None
    ) -> ZOOptimizer:
        """The method's optimizer of a model.

        Args:
            model: the model.
            options: the method's own; by default those of this run.
            mode: likewise.

        Raises:
            UserError: it refuses an option.
        """
        of_the_run = {"batch_size": self.batch_size, "mode": mode or self.mode, "seed": self.seeds[0]}
        accepted = method_options(self.method)
        shared = {name: value for name, value in of_the_run.items() if name in accepted}
        try:
            return make_optimizer(self.method, model, **shared, **(self.options if options is None else options))
        except (TypeError, ValueError) as error:
            raise UserError(as_flags(str(error))) from error

    def as_dict(self) -> dict[str, Any]:
        """All options with the values in force, the method's own among them, ready for JSON."""
        everything = asdict(self)
        own = everything.pop("options")
        return everything | own


def field_default(name: str) -> Any:
    """Default of the option called ``name`` (underscores), for help texts."""
    return next(field.default for field in fields(Config) if field.name == name)


def plain_number(value: Any) -> Any:
    """A number of NumPy or a tensor of one element as Python's; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    return value.item() if hasattr(value, "item") else value
