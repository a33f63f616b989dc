"""What an optimizer knows of its model: the weights, their hyper-parameters, and the mode that perturbs them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..directions import Direction, Weight, bucket
from ..noise import Role
from ..perturbation import (
    MERGES,
    MODES,
    ForwardState,
    Perturbation,
    Residual,
    ambient_state_aside,
    build,
    check_options,
    choose,
    unfolded,
    uninterrupted,
)
from .clock import Clock
from .options import near_names, number, positive
from .weights import Seen, collect

_log = logging.getLogger("pgap_kernels")
MERGE = (1 << 24) - 1  # number of the stochastic-rounding key of merges between steps
Params = nn.Module | Iterable[Any]
_NOTHING_TO_TRAIN = "params: got no trainable parameter (requires_grad); accepted: at least one"


class _EnterMode(type):
    """Enters the mode once the outermost ``__init__`` is over, so that a recipe may set its attributes in any order.

    Not later: hooks have to be in a model before it is compiled.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        with ambient_state_aside():
            optimizer = super().__call__(*args, **kwargs)
            optimizer.weights()
            _ = optimizer.perturbation
            optimizer._note_model()
        if any(group.get("param_names") is None for group in optimizer.param_groups):
            warnings.warn(
                "params: parameters without names get their flat index as name, so their noise depends on their "
                "order; pass the model or model.named_parameters()",
                stacklevel=2,
            )
        return optimizer


class ModelOptimizer(torch.optim.Optimizer, metaclass=_EnterMode):
    """The part of ``ZOOptimizer`` that faces the model; see there for arguments and attributes."""

    method: ClassVar[str]  # name in checkpoints
    # Plain attributes that go into a state_dict, with their values before the first step.
    saved_attributes: ClassVar[dict[str, Any]] = {}
    elementwise_state: ClassVar[tuple[str, ...]] = ()  # entries of the state that have their weight's shape
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
        paired: bool = False,
    ) -> None:
        self.seed = noise.check_uint("seed", seed, 64)
        self.on_nonfinite = checks.choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.tensor_ids = dict(tensor_ids or {})
        self.model = params if isinstance(params, nn.Module) else model
        self.steps = self.skipped = 0
        self.two_pass, self.residual = bool(two_pass), bool(residual)
        self.allow_unused, self.paired = bool(allow_unused), bool(paired)
        self.asked_mode = checks.choice("mode", mode, MODES)
        self.merges = checks.choice("merge", merge, MERGES)
        self.clock = Clock()
        self._perturbation: Perturbation | None = None
        self._weights: list[Weight] | None = None
        self._seen: Seen | None = None
        self._copied = False
        self._planned: tuple[int, Direction] | None = None
        self._buckets: list[list[Weight]] | None = None
        self._flat_steps = 0
        self._checked_slices: set[tuple[bool, ...]] = set()
        self._forward_state: ForwardState | None = None
        for name, value in self.saved_attributes.items():
            setattr(self, name, value)
        if isinstance(params, nn.Module):
            params = list(params.named_parameters())
            if not params:
                raise ValueError(_NOTHING_TO_TRAIN)
        super().__init__(params, defaults)
        if not self.weights():
            raise ValueError(_NOTHING_TO_TRAIN)
        unknown = sorted(set(self.tensor_ids) - {w.name for w in self.weights()})
        if unknown:
            near = near_names(unknown[0], [w.name for w in self.weights()])
            raise ValueError(f"tensor_ids: got {unknown[0]!r}; accepted: names of this optimizer's parameters ({near})")

    # ---- weights and hyper-parameters ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        started = self._perturbation is not None
        if started:
            self.perturbation.refuse_if_released("add_param_group")
            self.merge()
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
            with ambient_state_aside():
                if started:
                    self.follow_model()
                else:
                    self._forget_weights()
                    self.weights()
        except Exception:
            self.param_groups.pop()
            self._forget_weights()
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a param group's hyper-parameters; recipes add theirs."""
        positive("lr", group["lr"], zero=True)
        positive("eps", group["eps"])
        positive("weight_decay", group["weight_decay"], zero=True)

    def check_schedule(self) -> None:
        """Check what schedulers and users may have made of the hyper-parameters, before anything is perturbed."""
        for group in self.param_groups:
            number("lr", group["lr"])
            positive("eps", group["eps"])
            number("weight_decay", group["weight_decay"])

    def weights(self) -> list[Weight]:
        """Every trainable tensor once: tied weights under their first name, ids checked to be distinct."""
        if self._weights is None:
            self._weights = collect(self.param_groups, self.tensor_ids, self.model)
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

    def decay(self) -> list[float]:
        """lr * weight_decay of each weight; tensors of one dimension (biases, norm scales) do not decay."""
        if not any(group["weight_decay"] for group in self.param_groups):
            return [0.0] * len(self.weights())
        pairs = zip(self.weights(), self.amounts("lr"), self.amounts("weight_decay"), strict=True)
        return [lr * decay if w.tensor.dim() > 1 else 0.0 for w, lr, decay in pairs]

    def follow_model(self) -> None:
        """Take the parameters as they are now: others may have frozen, unfrozen, cast, moved or replaced them.

        If that raises, the next call looks again.
        """
        if self._copied:
            self._copied = False
            self._note_model()
        if self._seen is not None and self._seen.is_current(self.param_groups, self.model):
            return
        weights = collect(self.param_groups, self.tensor_ids, self.model)
        if not weights:
            raise ValueError(_NOTHING_TO_TRAIN)
        recast = self._seen is None
        if self._seen is not None:
            self._seen.refuse_lost(weights, self.model)
            recast = self._refuse_resized(weights, self._seen)
        self.merge()
        self._forget_weights()
        self._weights = weights
        for w in weights:
            for name, value in self.state.get(w.tensor, {}).items():
                if isinstance(value, Tensor) and value.device != w.tensor.device:
                    self.state[w.tensor][name] = value.to(w.tensor.device)
        choice = choose(self.asked_mode, weights, self.model, self.lowrank_indices())
        if recast or choice.mode != self.mode:
            self._enter_mode(self.asked_mode)
        else:
            self.perturbation.adopt(weights)
            if self.residual:
                self.perturbation.residual = Residual(weights, self.perturbation.residual)
        self._note_model()

    def _note_model(self) -> None:
        self._seen = Seen(self.param_groups, self.model, self.weights())
        self._checked_slices.clear()

    def _refuse_resized(self, weights: Sequence[Weight], seen: Seen) -> bool:
        """Raise if a weight has outgrown its state; else tell whether one is of another dtype or device than before."""
        recast = False
        for w in weights:
            dtype, device, shape = seen.kinds.get(id(w.tensor), (w.tensor.dtype, w.tensor.device, w.tensor.shape))
            if w.tensor.shape != shape and self.state.get(w.tensor):
                raise RuntimeError(
                    f"params: {w.name!r} has the shape {tuple(w.tensor.shape)} and state of the shape {tuple(shape)}; "
                    "accepted: weights that keep their shape. Make a new optimizer"
                )
            if w.tensor.device != device and self.pending:
                raise RuntimeError(
                    f"params: {w.name!r} was moved to {w.tensor.device} while updates or perturbations that are not in "
                    f"the weights lie on {device}; accepted: moves after merge(). Move it back to call that"
                )
            recast |= (w.tensor.dtype, w.tensor.device) != (dtype, device)
        return recast

    # ---- the mode ---------------------------------------------------------------------------------------------------

    def lowrank_indices(self) -> Collection[int] | None:
        """Indices of the weights with low-rank directions, if the method has such directions."""
        return None

    def first_point(self, step: int) -> Direction | None:
        """What the first forward of a step will see added, if that is known before the step."""
        return None

    @property
    def perturbation(self) -> Perturbation:
        """The mode's strategy."""
        if self._perturbation is None:
            self._enter_mode(self.asked_mode)
        assert self._perturbation is not None
        return self._perturbation

    def _enter_mode(self, mode: str) -> None:
        weights = self.weights()
        lowrank = self.lowrank_indices()
        choice = choose(mode, weights, self.model, lowrank)
        check_options(
            choice.mode,
            weights,
            two_pass=self.two_pass,
            knows_first_point=type(self).first_point is not ModelOptimizer.first_point,
            paired=self.paired,
            window=self.merges == "window" and mode != "auto",
            residual=self.residual,
        )
        if choice.mode == "inplace" and any(w.tensor.dtype != torch.float32 for w in weights):
            warnings.warn(
                "16-bit weights are perturbed in place: each step rounds them, so they are not restored exactly "
                f"(fp32 weights are, to rounding); {choice.reason if mode == 'auto' else 'other modes are exact'}",
                stacklevel=4,
            )
        before = self._perturbation
        options = {"two_pass": self.two_pass, "allow_unused": self.allow_unused, "defers": self.merges == "window"}
        after = build(choice, weights, self.model, **options)
        after.merge_key = noise.derive(self.seed, 0, Role.ROUNDING, MERGE)
        if self.residual:
            after.residual = Residual(weights, before.residual if before else None)
        if before is not None:
            before.release("the optimizer has entered another mode")
            after.passes = before.passes
        self._perturbation, self.mode_reason = after, choice.reason
        _log.info("%s runs in mode %s: %s", type(self).__name__, choice.mode, choice.reason)
        if choice.mode == "folded" and self.model is not None:
            rest = unfolded(weights, self.model, lowrank or ())
            if rest:
                _log.info("%d matrices are not folded but take the scratch: %s", len(rest), ", ".join(rest[:3]))

    @property
    def mode(self) -> str:
        """The mode in use; assign another between steps, after ``merge``."""
        return self.perturbation.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        checks.choice("mode", mode, MODES)
        if self.pending:
            raise ValueError(
                f"mode: got {mode!r} while mode {self.mode!r} has updates or perturbations that are not in the "
                "weights; call merge() first"
            )
        self.perturbation.refuse_if_released("mode")
        with ambient_state_aside():
            self.follow_model()
            self._enter_mode(mode)
        self.asked_mode = mode

    @property
    def pending(self) -> bool:
        """Whether the weights are not what the model is: see ``merge``."""
        return self._perturbation is not None and self._perturbation.pending

    @property
    def seconds(self) -> dict[str, float]:
        """Accumulated wall seconds by part of a step."""
        return self.clock.seconds

    @property
    def passes(self) -> float:
        """Reads and writes of all the weights so far, counted by elements."""
        return self.perturbation.passes

    def merge(self) -> None:
        """Write into the weights what a window has gathered, or take off what the two-pass schedule has added.

        Nothing to do otherwise. ``state_dict`` of the optimizer and of a hooked model do it first.
        """
        if self._perturbation is not None:
            with ambient_state_aside(), uninterrupted():
                self._perturbation.merge()

    def detach(self) -> None:
        """Merge, and take the hooks off the model: the optimizer has done its work."""
        with ambient_state_aside(), uninterrupted():
            self.perturbation.release()

    # ---- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # "step" is in there once a scheduler has bound its counter to this very object.
        fresh: dict[str, Any] = dict.fromkeys(("_weights", "_buckets", "_seen", "_planned", "_forward_state"))
        # The copies of parameters lie elsewhere, but are what they were.
        fresh["_copied"] = self._seen is not None and self._seen.is_current(self.param_groups, self.model)
        return {k: v for k, v in self.__dict__.items() if k != "step"} | fresh

    def become_dry(self, weights: list[Weight]) -> None:
        """Forget what was learnt and stand before the first step, on weights without memory; nothing is computed."""
        self._perturbation = self.perturbation.dry_copy(weights)
        self._weights, self._checked_slices = weights, set()
        self._planned = self._buckets = None
        self._note_model()
        self._forward_state, self.clock = None, Clock()
        self.state.clear()
        self.steps = 0
        for name, value in self.saved_attributes.items():
            setattr(self, name, value)

    def check_state(self, weight: Weight, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a weight's saved state does not fit; nothing has been loaded yet."""
        for name in self.elementwise_state:
            tensor = state.get(name)
            if tensor is not None and tensor.shape != weight.tensor.shape:
                raise ValueError(
                    f"state_dict: got {name} of shape {tuple(tensor.shape)} for {weight.name!r} of shape "
                    f"{tuple(weight.tensor.shape)}; accepted: the state of weights of the same shapes"
                )
