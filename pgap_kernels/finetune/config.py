"""What a fine-tuning run is asked to do: its options, the defaults of each method, and the checks on them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..perturbation import MODES

#: The one table of per-method defaults. An option left out takes the value of its method's row.
METHODS: dict[str, dict[str, float | int]] = {
    "mezo": {"lr": 6e-5, "eps": 1e-3},
    "pgap": {"lr": 1.2e-4, "eps": 1e-3, "rank": 64, "window": 100, "probes": 10, "delta": 2.0},
}

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT = "default"


class UserError(Exception):
    """Something the user can put right; the message is one line that says what and how."""


@dataclass
class Config:
    """Options of one run, as on the command line (`pgap-kernels finetune --help` describes each).

    ``None`` for ``lr`` to ``delta`` means the method's default from :data:`METHODS`; options that the
    method does not have stay ``None``.

    Raises:
        UserError: an option is outside what it accepts; the message names it, the value and the accepted ones.
    """

    model: str = DEFAULT
    data: str = DEFAULT
    method: str = "pgap"
    steps: int = 200
    batch_size: int = 16
    max_length: int = 32
    lr: float | None = None
    eps: float | None = None
    rank: int | None = None
    window: int | None = None
    probes: int | None = None
    delta: float | None = None
    mode: str = "auto"
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    output: str = "runs/finetune"
    save_model: bool = False
    baseline: bool = False
    baseline_steps: int = 3
    baseline_full_refresh: bool = False
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
        if self.method not in METHODS:
            raise UserError(f"--method: got {self.method!r}; accepted: {', '.join(METHODS)}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype: got {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        if self.mode not in MODES:
            raise UserError(f"--mode: got {self.mode!r}; accepted: {', '.join(MODES)}")
        self._fill_in_method_defaults()
        for name in (
            "steps",
            "batch_size",
            "max_length",
            "rank",
            "window",
            "probes",
            "baseline_steps",
            "eval_every",
            "eval_limit",
            "train_size",
            "dev_size",
            "test_size",
        ):
            self._require(name, "an integer of at least 1", lambda value: value >= 1)
        for name in ("seed", "data_seed"):
            self._require(name, "an integer from 0 to 2^64 - 1", lambda value: 0 <= value < 2**64)
        for name in ("lr", "delta"):
            self._require(name, "a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0)
        self._require("eps", "a finite number above 0", lambda value: math.isfinite(value) and value > 0)
        if "{text}" not in self.template:
            raise UserError(f"--template: got {self.template!r}; accepted: a text that contains {{text}}")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise UserError(f"--output: {self.output!r} is a file; accepted: a folder, new or existing")

    def _fill_in_method_defaults(self) -> None:
        defaults = METHODS[self.method]
        for name in {name for row in METHODS.values() for name in row}:
            if getattr(self, name) is None:
                setattr(self, name, defaults.get(name))
            elif name not in defaults:
                accepted = ", ".join(f"--{other}" for other in defaults)
                raise UserError(
                    f"--{name}: got {getattr(self, name)}, which --method {self.method} does not use; "
                    f"accepted with it: {accepted}"
                )

    def _require(self, name: str, accepted: str, test: Any) -> None:
        value = getattr(self, name)
        if value is not None and not test(value):
            raise UserError(f"--{name.replace('_', '-')}: got {value}; accepted: {accepted}")

    def method_options(self) -> dict[str, float | int]:
        """The method's own options with their values, as its optimizer takes them."""
        return {name: getattr(self, name) for name in METHODS[self.method]}

    def as_dict(self) -> dict[str, Any]:
        """All options with the values in force, ready for JSON."""
        return asdict(self)


def field_default(name: str) -> Any:
    """Default of the option called ``name`` (underscores), for help texts."""
    return next(field.default for field in fields(Config) if field.name == name)
