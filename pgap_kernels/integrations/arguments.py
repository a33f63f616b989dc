"""The options of all methods as fields of a dataclass, ``zo_`` before each, as argument parsers of trainers take them.

They are read off the methods' signatures and docstrings: there is no second list.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

from ..noise import check_uint
from ..optim import available_methods, method_options
from ..optim.described import described
from ..optim.options import by_name, renamed
from ..optim.registry import did_you_mean, method_class, method_classes, method_name

# What the trainer's own arguments say, or what makes no sense as text.
_OF_THE_TRAINER = ("lr", "weight_decay", "seed", "batch_size", "model", "tensor_ids")
_TYPES: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Sequence[str]": list[str],
    "Mapping[str, float]": str,
}
# Of the base class; each of them would need gradients, or another owner of the weights.
_REFUSED = {
    "deepspeed": "a zeroth-order step has no gradients or optimizer state to shard",
    "fsdp": "sharded weights are not supported yet; launch with torchrun, which trains a whole model in each process",
    "parallelism_config": "sharded weights are not supported yet",
    "optim_target_modules": "it is for optimizers with gradients; freeze parameters instead",
    "optim_args": "the options of the method are zo_ arguments",
}


class _NotGiven:
    """The default of a field that leaves the choice to the method; None once the arguments are made.

    Not None from the start: ``--help`` shows defaults, and argument parsers take a switch's name alone only where it
    has one.
    """

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return self._shown


def _option_fields() -> list[tuple[str, Any, Any]]:
    """A field for each option of this package's methods."""
    owners: dict[str, list[type]] = {}
    types: dict[str, Any] = {}
    for cls in method_classes():
        for name, parameter in method_options(method_name(cls)).items():
            text = inspect.formatannotation(parameter.annotation).strip("'").removesuffix(" | None")
            if name not in _OF_THE_TRAINER and text in _TYPES:
                owners.setdefault(name, []).append(cls)
                types[name] = _TYPES[text] | None
    fields = []
    for name, classes in owners.items():
        metadata = {"help": _help(name, classes).replace("%", "%%")}
        default = _NotGiven(_defaults(name, classes))
        fields.append((f"zo_{name}", types[name], dataclasses.field(default=default, metadata=metadata)))
    return fields


def _defaults(name: str, classes: list[type]) -> str:
    """The defaults of an option in these methods."""
    methods: dict[str, list[str]] = {}
    for cls in classes:
        default = method_options(method_name(cls))[name].default
        text = "none" if default in (None, ()) else "required" if default is inspect.Parameter.empty else str(default)
        methods.setdefault(text, []).append(method_name(cls))
    return _each_once(methods, len(classes))


def _help(name: str, classes: list[type]) -> str:
    """What the methods' docstrings say of an option, each text once with the methods that it is of."""
    methods: dict[str, list[str]] = {}
    for cls in classes:
        methods.setdefault(described(cls, name), []).append(method_name(cls))
    return _each_once(methods, len(method_classes()))


def _each_once(methods: dict[str, list[str]], several: int) -> str:
    """Texts with the methods that they are of; first, without them, the one of more than half of so many."""
    texts = sorted(methods, key=lambda text: 2 * len(methods[text]) <= several)
    common = 2 * len(methods[texts[0]]) > several
    return "; ".join(text if common and text is texts[0] else f"{', '.join(methods[text])}: {text}" for text in texts)


@dataclasses.dataclass
class _Method:
    """First in ``--help``."""

    zo_method: str = dataclasses.field(
        default="pgap",
        metadata={"help": f"Zeroth-order method: {', '.join(available_methods())}. Options of others are refused."},
    )


_OPTIONS = _option_fields()
_Options: Any = dataclasses.make_dataclass("_Options", _OPTIONS, bases=(_Method,), namespace={"__module__": __name__})


@dataclasses.dataclass
class ZOArguments(_Options):
    """Fields to put before any ``TrainingArguments``: ``class ZOSFTConfig(ZOArguments, SFTConfig)``.

    Beside those below there is one for every option of every method, named ``zo_`` and the option
    (``pgap-kernels methods`` and docs/methods.md list them); None, or an option that is not given, stands for the
    method's default. What belongs to another method, or to training with gradients, is refused by name before anything
    else happens.

    Args:
        zo_method: one of ``pgap_kernels.optim.available_methods()``.
        zo_options: more options of the method, as a dict or JSON, for methods of other packages.
        zo_seed: of the noise, in [0, 2**64); ``seed`` by default.
        zo_dropout: whether dropout acts in the forwards; by default not, as in MeZO.
        learning_rate: by default the method's.
        max_grad_norm: only 0 is accepted.

    Attributes:
        uses_default_rate: whether ``learning_rate`` is the method's, as none was given.

    Raises:
        ValueError, TypeError: an argument cannot be served.
    """

    zo_options: str | None = dataclasses.field(
        default=None, metadata={"help": "More options of the method as JSON, for methods of other packages."}
    )
    zo_seed: int | None = dataclasses.field(default=None, metadata={"help": "Of the noise; --seed by default."})
    zo_dropout: bool = dataclasses.field(
        default=False, metadata={"help": "Let dropout act in the forwards; by default it does not, as in MeZO."}
    )
    learning_rate: float | None = dataclasses.field(
        default=_NotGiven(_defaults("lr", method_classes())),  # type: ignore[assignment]
        metadata={"help": "By default the method's, which is meant for tuning whole models."},
    )
    max_grad_norm: float = dataclasses.field(
        default=0.0, metadata={"help": "There are no gradients to clip: only 0 is accepted."}
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), _NotGiven):
                setattr(self, field.name, None)
        # Before the base class, which changes the environment for some of what is refused here.
        for name, reason in _REFUSED.items():
            value = getattr(self, name, None)
            if value:
                raise ValueError(f"{name}: got {value!r}; accepted: unset, as {reason}")
        if self.max_grad_norm:
            raise ValueError(f"max_grad_norm: got {self.max_grad_norm}; accepted: 0, as there are no gradients to clip")
        if getattr(self, "use_liger_kernel", False) and self.zo_mode != "inplace":
            raise ValueError(
                f"use_liger_kernel: got True with zo_mode={self.zo_mode!r}; accepted: with zo_mode='inplace', as it "
                "reads the head's weight outside the head's forward"
            )
        options = self.method_options()
        self.uses_default_rate = self.learning_rate is None
        if self.uses_default_rate:
            self.learning_rate = method_options(self.zo_method)["lr"].default
        if getattr(self, "weight_decay", 0.0) and "weight_decay" not in method_options(self.zo_method):
            raise ValueError(f"weight_decay: got {self.weight_decay}; accepted: 0 with zo_method={self.zo_method!r}")
        if not isinstance(self.zo_dropout, bool):
            raise TypeError(f"zo_dropout: got {self.zo_dropout!r}; accepted: True or False")
        if self.zo_seed is not None:
            check_uint("zo_seed", self.zo_seed, 64)
        if self.zo_dropout and options.get("members", 1) * options.get("groups", 1) > 1:
            raise ValueError(
                "zo_dropout: got True; accepted: False with zo_members or zo_groups, whose slices share rows"
            )
        getattr(super(), "__post_init__", lambda: None)()

    def method_options(self) -> dict[str, Any]:
        """The options of the method that were given.

        Raises:
            ValueError, TypeError: there is no such method, or one is no option of it.
        """
        try:
            accepted = method_options(self.zo_method)
        except ValueError as error:
            raise ValueError(str(error).replace("name:", "zo_method:", 1)) from None
        given = {
            name.removeprefix("zo_"): getattr(self, name) for name, *_ in _OPTIONS if getattr(self, name) is not None
        }
        if self.zo_options is not None:
            try:
                more = json.loads(self.zo_options) if isinstance(self.zo_options, str) else self.zo_options
            except json.JSONDecodeError:
                more = None
            if not isinstance(more, dict):
                raise TypeError(f"zo_options: got {self.zo_options!r}; accepted: a dict, or a JSON object")
            given |= more
        for name in given:
            if name not in accepted or name in _OF_THE_TRAINER:
                own = [other for other in accepted if other not in _OF_THE_TRAINER]
                hint = did_you_mean(name, own, "zo_{}".format)
                argument = f"zo_{name}:" if hasattr(self, f"zo_{name}") else f"zo_options: got {name!r}, but"
                raise ValueError(
                    f"{argument} zo_method={self.zo_method!r} has no such option{hint}; accepted with it: "
                    + ", ".join(f"zo_{other}" for other in sorted(own))
                )
        if isinstance(given.get("floors"), str):
            try:
                given["floors"] = by_name(given["floors"])
            except ValueError as error:
                raise ValueError(f"zo_floors: {error}") from None
        return given

    def make_optimizer(self, model: Any, batch_size: int, **more: Any) -> Any:
        """The method's optimizer for a model, as these arguments and the trainer's say.

        Args:
            model: a module.
            batch_size: examples of a step, for methods that scale by it.
            **more: options of every method that are no arguments of a command line.
        """
        accepted = method_options(self.zo_method)
        own: dict[str, Any] = {
            "lr": self.learning_rate,
            "weight_decay": getattr(self, "weight_decay", 0.0),
            "seed": getattr(self, "seed", 0) if self.zo_seed is None else self.zo_seed,
            "batch_size": batch_size,
        }
        own = {name: value for name, value in own.items() if name in accepted}
        try:
            return method_class(self.zo_method)(model, **own, **self.method_options(), **more)
        except (TypeError, ValueError) as error:
            ours = {"lr": "learning_rate", **{name.removeprefix("zo_"): name for name, *_ in _OPTIONS}}
            raise type(error)(renamed(str(error), lambda name: ours.get(name, name))) from error
