"""How an optimizer stands to its model: the mode that perturbs it, and what others do to it meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, noise, notices
from ..directions import Direction, Weight
from ..noise import Role
from ..perturbation import (
    MODES,
    Perturbation,
    Residual,
    build,
    check_options,
    choose,
    outside_ambient_state,
    unfolded,
    uninterrupted,
)
from .clock import Clock
from .evaluation import FlatLosses
from .model import NOTHING_TO_TRAIN, ModelOptimizer
from .signal import SignalRule
from .weights import ModelSnapshot, collect

_log = logging.getLogger("pgap_kernels")
MERGE = (1 << 24) - 1  # number of the stochastic-rounding key of merges between steps


class _EnterMode(type):
    """Enters the mode once the outermost ``__init__`` is over, so that a recipe may set its attributes in any order.

    Not later: hooks have to be in a model before it is compiled.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        with outside_ambient_state():
            optimizer = super().__call__(*args, **kwargs)
            optimizer.weights()
            _ = optimizer.perturbation
            optimizer._note_model()
        if any(group.get("param_names") is None for group in optimizer.param_groups):
            notices.warn(
                "params: parameters without names get their flat index as name, so their noise depends on their "
                "order; pass the model or model.named_parameters()"
            )
        return optimizer


class ModeOptimizer(ModelOptimizer, metaclass=_EnterMode):
    """The part of ``ZOOptimizer`` that faces the model; see there for arguments and attributes."""

    # ---- the mode ---------------------------------------------------------------------------------------------------

    def lowrank_indices(self) -> Collection[int] | None:
        """Indices of the weights with low-rank directions, if the method has such directions."""
        return None

    def direction(self, step: int, number: int = 0) -> Direction:
        """The fresh direction of a step with a number, if the method knows it before the step; the first forward sees
        that with number 0."""
        raise NotImplementedError

    @property
    def perturbation(self) -> Perturbation:
        """The mode's strategy."""
        if self._perturbation is None:
            self._enter_mode(self.requested_mode)
        assert self._perturbation is not None
        return self._perturbation

    def _enter_mode(self, mode: str) -> None:
        weights = self.weights()
        lowrank = self.lowrank_indices()
        choice = choose(mode, weights, self.model, lowrank, self.members * self.groups)
        check_options(
            choice.mode,
            weights,
            two_pass=self.two_pass,
            plans_ahead=self.plans_ahead,
            members=self.members * self.groups,
            window=self.merge_policy == "window" and mode != "auto",
            residual=self.residual,
        )
        if choice.mode == "inplace" and any(w.tensor.dtype != torch.float32 for w in weights):
            notices.warn(
                "16-bit weights are perturbed in place: each step rounds them, so they are not restored exactly "
                f"(fp32 weights are, up to rounding); {choice.reason if mode == 'auto' else 'other modes are exact'}"
            )
        before = self._perturbation
        options = {
            "two_pass": self.two_pass,
            "allow_unused": self.allow_unused,
            "defers": self.merge_policy == "window",
        }
        after = build(choice, weights, self.model, **options)
        after.merge_key = noise.derive(self.seed, 0, Role.ROUNDING, MERGE)
        if self.residual:
            after.residual = Residual(weights, before.residual if before else None)
        if before is not None:
            before.release("the optimizer has entered another mode")
            after.passes = before.passes
        self._perturbation, self.mode_reason, self._planned = after, choice.reason, None
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
        self.perturbation.refuse_if_released("mode")
        if self.pending:
            raise ValueError(
                f"mode: got {mode!r} while mode {self.mode!r} has updates or perturbations that are not in the "
                "weights; call merge() first"
            )
        # First: the model may have become one that the mode until now cannot serve.
        before, self.requested_mode = self.requested_mode, mode
        try:
            with outside_ambient_state():
                self.follow_model()
                self._enter_mode(mode)
        except BaseException:
            self.requested_mode = before
            raise

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
            if self.pending:
                self._perturbation.refuse_inside_forward("merge")
            with outside_ambient_state(), uninterrupted():
                self._perturbation.merge()

    def detach(self) -> None:
        """Merge, and take the hooks off the model: the optimizer has done its work."""
        self.perturbation.refuse_inside_forward("detach")
        with outside_ambient_state(), uninterrupted():
            self.perturbation.release()

    # ---- what others do to the model --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        started = self._perturbation is not None
        if started:
            self.perturbation.refuse_if_released("add_param_group")
            self.merge()
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
            with outside_ambient_state():
                if started:
                    self.follow_model()
                else:
                    self._forget_weights()
                    self.weights()
        except Exception:
            self.param_groups.pop()
            self._forget_weights()
            raise

    def follow_model(self) -> None:
        """Take the parameters as they are now: others may have frozen, unfrozen, cast, moved or replaced them.

        If that raises, the next call looks again.
        """
        if self._copied:
            self._follow_after_copy()
        unchanged = self._seen is not None and self._seen.is_current(self.param_groups, self.model)
        if unchanged and self.perturbation.is_current():
            return
        weights = collect(self.param_groups, self.tensor_ids, self.model, self.read_by)
        if not weights:
            raise ValueError(NOTHING_TO_TRAIN)
        recast = self._seen is None
        if self._seen is not None:
            self._seen.check_weights_remain(weights, self.model)
            recast = self._refuse_resized(weights, self._seen)
        self.merge()
        self._forget_weights()
        self._weights = weights
        try:
            self._serve(weights, recast)
        except BaseException:
            # The mode still serves the weights from before, so even if they come back all of it has to be done again.
            self._forget_weights()
            self._seen = None
            raise
        self._note_model()
        self._say_who_is_left_out()

    def _say_who_is_left_out(self) -> None:
        """Warn of trainable parameters that the model got after the optimizer was made of all that it had."""
        if not self._takes_all or self.model is None:
            return
        ours = {id(p) for group in self.param_groups for p in group["params"]}
        left = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in ours]
        if left:
            others = f" and {len(left) - 1} more trainable parameters" if len(left) > 1 else ""
            notices.warn(
                f"params: {left[0]!r}{others} came to the model after the optimizer was made, and will not be trained; "
                "add them with add_param_group, or make a new optimizer"
            )

    def _serve(self, weights: Sequence[Weight], recast: bool) -> None:
        """Give the mode these weights, or enter another mode with them, and move their state to where they are."""
        for w in weights:
            for name, value in self.state.get(w.tensor, {}).items():
                if isinstance(value, Tensor) and value.device != w.tensor.device:
                    self.state[w.tensor][name] = value.to(w.tensor.device)
        slices = self.members * self.groups
        choice = choose(self.requested_mode, weights, self.model, self.lowrank_indices(), slices)
        if recast or choice.mode != self.mode:
            self._enter_mode(self.requested_mode)
        else:
            self.perturbation.set_weights(weights)
            if self.residual:
                self.perturbation.residual = Residual(weights, self.perturbation.residual)

    def _follow_after_copy(self) -> None:
        """In a copy, whose parameters lie elsewhere: note them if they are what they were, else follow the changes."""
        before, now = self._copied or [], self.kinds()
        had = {kind.name for kind in before if kind.is_of_model}
        for kind in now:
            if kind.name in had and not kind.is_of_model:
                raise RuntimeError(
                    f"model: {kind.name!r} is not one of its parameters any more, as it was when the optimizer was "
                    "copied; accepted: the Parameter objects that were copied with it. Make a new optimizer"
                )
        self._copied = None
        if before == now:
            self._note_model()

    def _note_model(self) -> None:
        self._seen = ModelSnapshot(self.param_groups, self.model, self.weights())
        self._checked_slices.clear()

    def _refuse_resized(self, weights: Sequence[Weight], seen: ModelSnapshot) -> bool:
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

    def become_dry(self, weights: list[Weight]) -> None:
        """Forget what was learnt and stand before the first step, on weights without memory; nothing is computed."""
        self._perturbation = self.perturbation.dry_copy(weights)
        self._weights, self._checked_slices = weights, {}
        self._planned = self._buckets = None
        self._note_model()
        self._forward_state, self.clock = None, Clock()
        self._copied, self._ahead, self._flat = None, None, FlatLosses()
        self.state.clear()
        self.steps, self.signal_rule = 0, SignalRule()
        for name, value in self.saved_attributes.items():
            setattr(self, name, value)
