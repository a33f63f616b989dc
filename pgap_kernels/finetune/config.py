"""What a fine-tuning run is asked to do, and the checks on it."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..optim import ZOOptimizer, make_optimizer, method_options
from ..optim.signal import signal_of
from ..perturbation import MODES
from .baseline import BASELINES
from .options import OF_THE_RUN, UserError, as_flags, flag, names, numbers_by_name, options_of, refuse_unknown

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT = "default"


@dataclass
class Config:
    """Options of one run, as on the command line (`pgap-kernels finetune --help` describes each).

    ``options`` are the method's own, as its optimizer takes them; those left out take their defaults.

    Raises:
        UserError: an option is outside what it accepts; the message names it, the value and the accepted ones.
    """

    model: str = DEFAULT
    data: str = DEFAULT
    method: str = "pgap"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 200
    batch_size: int = 16
    max_length: int = 32
    mode: str = "auto"
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    output: str = "runs/finetune"
    save_model: bool = False
    compare: bool = False
    compare_steps: int = 3
    compare_full_refresh: bool = False
    eval_every: int = 50
    eval_limit: int = 200
    train_size: int = 1000
    dev_size: int = 500
    test_size: int = 1000
    data_seed: int = 0
    text_column: str = "text"
    label_column: str = "label"
    template: str = "{text} It was"
    verbalizers: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype: got {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        if self.mode not in MODES:
            raise UserError(f"--mode: got {self.mode!r}; accepted: {', '.join(MODES)}")
        for name in ("batch_size", "compare_steps", "eval_every", "eval_limit", "max_length", "steps"):
            self._require(name, "an integer of at least 1", lambda value: value >= 1)
        for name in ("train_size", "dev_size", "test_size"):
            self._require(name, "an integer of at least 1", lambda value: value >= 1)
        for name in ("seed", "data_seed"):
            self._require(name, "an integer from 0 to 2^64 - 1", lambda value: 0 <= value < 2**64)
        if "{text}" not in self.template:
            raise UserError(f"--template: got {self.template!r}; accepted: a text that contains {{text}}")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise UserError(f"--output: {self.output!r} is a file; accepted: a folder, new or existing")
        for name in self.options:
            refuse_unknown(self.method, name)
        if self.compare:
            self._check_comparison()
        self.options = self._defaults() | self.options
        self._check_options()

    def _defaults(self) -> dict[str, Any]:
        options = options_of(self.method).items()
        found = {name: option.default for name, option in options if option.default is not inspect.Parameter.empty}
        if "merge" in found and self.mode not in ("auto", "folded"):
            found["merge"] = "step"  # other modes have no window
        return found

    def _require(self, name: str, accepted: str, test: Any) -> None:
        value = getattr(self, name)
        if not test(value):
            raise UserError(f"{flag(name)}: got {value}; accepted: {accepted}")

    def _check_comparison(self) -> None:
        """Refuse what the method in plain PyTorch does not have."""
        if self.method not in BASELINES:
            raise UserError(
                f"--compare: got it with --method {self.method}; accepted: with {' and '.join(BASELINES)}, of which "
                "there is a version in plain PyTorch"
            )
        known = inspect.signature(BASELINES[self.method]).parameters
        for name, value in self.options.items():
            if name not in known:
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
        if optimizer.lr_rule and not self._tells_signal(optimizer):
            raise UserError(
                f"--lr-rule: got {optimizer.lr_rule!r}; accepted: with --members or --groups of 2 or more, two "
                "sentences or more in a group, and two directions or more with --baseline clean"
            )

    def _tells_signal(self, optimizer: Any) -> bool:
        """Whether a step's losses will say what the learning rate is to follow."""
        sampling = optimizer.sampling
        signal = signal_of(torch.zeros(sampling.copies, self.batch_size), sampling.groups, sampling.baseline, 1.0)
        return optimizer.members * optimizer.groups > 1 and signal.squared_norm is not None

    def make_optimizer(self, model: torch.nn.Module, options: dict[str, Any] | None = None) -> ZOOptimizer:
        """The method's optimizer of a model.

        Args:
            model: the model.
            options: the method's own; by default those of this run.

        Raises:
            UserError: it refuses an option.
        """
        of_the_run = {name: getattr(self, name) for name in OF_THE_RUN}
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
