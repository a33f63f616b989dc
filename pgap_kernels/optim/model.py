"""What an optimizer knows of its weights: which they are, their hyper-parameters, and all that it is made with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..directions import Direction, Weight, bucket
from ..perturbation import MERGES, MODES, ForwardState, Perturbation
from .clock import Clock
from .evaluation import FlatLosses
from .last import LastStep
from .options import at_least_one, near_names, number, positive
from .signal import SignalRule
from .weights import Kind, ModelSnapshot, collect

Params = nn.Module | Iterable[Any]
_ROUNDING = 1e-12  # schedules that end at 0 may end below it by this much
NOTHING_TO_TRAIN = "params: got no trainable parameter (requires_grad); accepted: at least one"


class ModelOptimizer(torch.optim.Optimizer):
    """The part of ``ZOOptimizer`` that has the weights; see there for arguments and attributes."""

    method: ClassVar[str]  # name in checkpoints
    # Plain attributes that go into a state_dict, with their values before the first step.
    saved_attributes: ClassVar[dict[str, Any]] = {}
    elementwise_state: ClassVar[tuple[str, ...]] = ()  # entries of the state that have their weight's shape
    # Whether updates are passes along a direction and nothing else, which is what residual planes can add to.
    takes_residual: ClassVar[bool] = True
    plans_ahead: ClassVar[bool] = (
        False  # whether the first forward of a step sees ``direction(step)``, as two_pass needs
    )
    sees_inputs: ClassVar[bool] = False  # whether updates depend on more of a batch than its losses
    takes_groups: ClassVar[bool] = False  # whether it moves by ``estimate``: groups may have their own directions
    period: int = 1  # steps after which what a step does repeats; ``cost`` counts one period

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        seed: int = 0,
        tensor_ids: Mapping[str, int] | None = None,
        on_nonfinite: str = "raise",
        mode: str = "auto",
        merge: str = "step",
        two_pass: bool = False,
        residual: bool = False,
        allow_unused: bool = False,
        read_by: Mapping[str, str] | None = None,
        members: int = 1,
        groups: int = 1,
        lr_rule: str | None = None,
    ) -> None:
        self.seed = noise.check_uint("seed", seed, 64)
        self.on_nonfinite = checks.choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.tensor_ids = dict(tensor_ids or {})
        self.model = params if isinstance(params, nn.Module) else model
        self.steps = self.skipped = 0
        self.two_pass, self.residual = bool(two_pass), bool(residual)
        self.allow_unused = bool(allow_unused)
        self.read_by = self._checked_readers(read_by)
        self.members, self.groups = at_least_one("members", members), at_least_one("groups", groups)
        if self.groups > 1 and not self.takes_groups:
            raise ValueError(
                f"groups: got {groups}; accepted: 1 with {self.method}, whose directions all examples share"
            )
        self.lr_rule = None if lr_rule is None else checks.choice("lr_rule", lr_rule, ("signal",))
        if self.lr_rule and not self.takes_groups:
            raise ValueError(
                f"lr_rule: got {lr_rule!r}; accepted: None with {self.method}, whose losses do not show the signal"
            )
        self.signal_rule, self.last = SignalRule(), LastStep()
        self._held: contextlib.ExitStack | None = None  # holds signals from a step's update to its end
        self._ahead: float | None = None  # the loss of a step that the next call of ``step`` takes up
        if self.residual and not self.takes_residual:
            raise ValueError(
                f"residual: got True; accepted: False with {self.method}, whose updates depend on state or on the "
                "stored weights, not on a direction alone"
            )
        self.requested_mode = checks.choice("mode", mode, MODES)
        self.merge_policy = checks.choice("merge", merge, MERGES)
        self.clock = Clock()
        self._perturbation: Perturbation | None = None
        self._weights: list[Weight] | None = None
        self._seen: ModelSnapshot | None = None
        self._copied: list[Kind] | None = None  # in a copy, what its weights were when it was made
        self._planned: tuple[int, Direction] | None = None
        self._buckets: list[list[Weight]] | None = None
        self._flat = FlatLosses()
        self._checked_slices: dict[tuple[bool, ...], set[int]] = {}
        self._forward_state: ForwardState | None = None
        for name, value in self.saved_attributes.items():
            setattr(self, name, value)
        self._takes_all = isinstance(params, nn.Module)
        if isinstance(params, nn.Module):
            params = list(params.named_parameters())
            if not params:
                raise ValueError(NOTHING_TO_TRAIN)
        if isinstance(params, (str, Mapping, Tensor, type)) or not isinstance(params, Iterable):
            raise TypeError(
                f"params: got {params if isinstance(params, str) else type(params).__name__!r}; accepted: a model, its "
                "named_parameters(), a list of tensors, or param groups"
            )
        for name in ("lr", "eps"):
            if name not in defaults:
                raise ValueError(f"defaults: got no {name!r}; accepted: lr and eps, and what else the method has")
        super().__init__(params, {"weight_decay": 0.0, **defaults})
        if not self.weights():
            raise ValueError(NOTHING_TO_TRAIN)
        unknown = sorted(set(self.tensor_ids) - {w.name for w in self.weights()})
        if unknown:
            near = near_names(unknown[0], [w.name for w in self.weights()])
            raise ValueError(f"tensor_ids: got {unknown[0]!r}; accepted: names of this optimizer's parameters ({near})")

    def _checked_readers(self, read_by: Mapping[str, str] | None) -> dict[str, str]:
        if not read_by:
            return {}
        if self.model is None:
            raise ValueError("read_by: got names without a model; accepted: a model as params or model=")
        parameters = {noise.canonical_name(name) for name, _ in self.model.named_parameters(remove_duplicate=False)}
        modules = [name for name, _ in self.model.named_modules()]
        for parameter, module in read_by.items():
            if parameter not in parameters:
                near = near_names(parameter, list(parameters))
                raise ValueError(f"read_by: got {parameter!r}; accepted: names of the model's parameters ({near})")
            if module not in modules:
                near = near_names(module, modules)
                raise ValueError(f"read_by: got {module!r} for {parameter!r}; accepted: names of modules ({near})")
        return dict(read_by)

    # ---- weights and hyper-parameters ------------------------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a param group's hyper-parameters; recipes add theirs."""
        positive("lr", group["lr"], zero=True)
        positive("eps", group["eps"])
        positive("weight_decay", group["weight_decay"], zero=True)

    def check_schedule(self) -> None:
        """Check what schedulers and users may have made of the hyper-parameters, before anything is perturbed."""
        for group in self.param_groups:
            for name in ("lr", "weight_decay"):
                if not number(name, group[name]) >= -_ROUNDING:
                    raise ValueError(f"{name}: got {group[name]}; accepted: a number >= 0")
            positive("eps", group["eps"])
        if self.lr_rule and len({*self.radius()}) > 1:
            raise ValueError(
                f"lr_rule: got {self.lr_rule!r} with weights of several eps; accepted: one eps for all, as the signal "
                "is that of slopes along one direction"
            )

    def weights(self) -> list[Weight]:
        """Every trainable tensor once: tied weights under their first name, ids checked to be distinct."""
        if self._weights is None:
            self._weights = collect(self.param_groups, self.tensor_ids, self.model, self.read_by)
        return self._weights

    def buckets(self) -> list[list[Weight]]:
        """All weights in lists that can share an op call."""
        if self._buckets is None:
            self._buckets = bucket(self.weights())
        return self._buckets

    def _forget_weights(self) -> None:
        self._weights, self._buckets, self._planned, self._forward_state = None, None, None, None

    def amounts(self, name: str) -> list[float]:
        """A hyper-parameter of each weight, as its param group has it now."""
        weights = self.weights()
        if len(self.param_groups) == 1:
            return [number(name, self.param_groups[0][name])] * len(weights)
        values = {id(group): number(name, group[name]) for group in self.param_groups}
        return [values[id(w.group)] for w in weights]

    def moment(self, weight: Weight, name: str = "momentum") -> Tensor:
        """An entry of a weight's state of its size, float32; zeros that are not stored yet where there is none."""
        found = self.state[weight.tensor].get(name)
        return torch.zeros_like(weight.tensor, dtype=torch.float32) if found is None else found

    def radius(self) -> list[float]:
        """The smoothing radius of each weight."""
        return self.amounts("eps")

    def rates(self) -> list[float]:
        """The learning rate of each weight."""
        return self._group_rates()

    def _group_rates(self) -> list[float]:
        factor = 1.0 if self.lr_rule is None else self.signal_rule.factor
        return [lr * factor for lr in self.amounts("lr")]

    def decay(self) -> list[float]:
        """lr * weight_decay of each weight; tensors of one dimension (biases, norm scales) do not decay.

        The lr is the group's, under ``lr_rule`` as it is now; a rate of its own for dense noise does not count.
        """
        if not any(group["weight_decay"] for group in self.param_groups):
            return [0.0] * len(self.weights())
        pairs = zip(self.weights(), self._group_rates(), self.amounts("weight_decay"), strict=True)
        return [lr * decay if w.tensor.dim() > 1 else 0.0 for w, lr, decay in pairs]

    def kinds(self) -> list[Kind]:
        """What others may change about the weights."""
        parameters = () if self.model is None else self.model.parameters()
        of_model = {id(p) for p in parameters}
        return [
            Kind(w.name, w.tensor.dtype, w.tensor.device, tuple(w.tensor.shape), id(w.tensor) in of_model)
            for w in self.weights()
        ]

    # ---- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # "step" is in there once a scheduler has bound its counter to this very object.
        fresh: dict[str, Any] = dict.fromkeys(("_weights", "_buckets", "_seen", "_planned", "_forward_state"))
        # The copies of parameters lie elsewhere, but are what they were, if nobody changes them before the next step.
        current = self._seen is not None and self._seen.is_current(self.param_groups, self.model)
        fresh["_copied"] = self._copied or (self.kinds() if current else None)
        fresh["_held"] = None
        return {k: v for k, v in self.__dict__.items() if k != "step"} | fresh

    def check_state(self, weight: Weight, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a weight's saved state does not fit; nothing has been loaded yet."""
        for name in self.elementwise_state:
            tensor = state.get(name)
            if tensor is not None and tensor.shape != weight.tensor.shape:
                raise ValueError(
                    f"state_dict: got {name} of shape {tuple(tensor.shape)} for {weight.name!r} of shape "
                    f"{tuple(weight.tensor.shape)}; accepted: the state of weights of the same shapes"
                )
