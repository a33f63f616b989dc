"""What every zeroth-order method shares: keys, directions, and a step that happens whole or not at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import notices
from ..directions import Amounts, Direction, Pass
from ..noise import Role
from ..perturbation import (
    Ambient,
    Autocast,
    ForwardState,
    StateRule,
    Update,
    in_several_processes,
    merge_for,
    modules_of,
    outside_ambient_state,
    uninterrupted,
)
from . import checkpoint
from .accumulation import refuse_accumulation
from .cost import Cost, measure_cost
from .drawing import DirectionOptimizer
from .evaluation import Closure, Evaluation, NonFiniteLossError
from .last import LastStep
from .mode import MERGE
from .model import Params

__all__ = ["Closure", "Cost", "Evaluation", "NonFiniteLossError", "Params", "ZOOptimizer"]


def _unreduced(losses: Tensor) -> Tensor:
    return losses


class ZOOptimizer(DirectionOptimizer):
    """Base of the zeroth-order optimizers: ``step(closure)`` with forward passes only.

    ``closure()`` takes no argument, runs one forward on the step's minibatch and returns the loss (a scalar tensor or
    float, best reduced in float32). It is called several times a step under ``torch.no_grad()``; every call sees the
    same torch RNG state and, if a model was given, the same module buffers. Whatever happens in it, the weights are
    restored and the exception propagates. After ``step`` the parameters are the model, unless ``two_pass`` or
    ``merge="window"`` was asked for. Parameters may be frozen, unfrozen, cast or moved between steps.

    A method overrides ``estimate_and_update``; where its directions are low-rank ``lowrank_indices``; where they are
    fresh in every step ``direction``, for ``two_pass``, ``groups`` and ``estimate``.

    Args:
        params: a module, named parameters, or param groups of either. Plain tensors are named by their flat index,
            with a warning: their noise then depends on their order.
        defaults: of the param groups.
        model: the module whose buffers every forward shall see unchanged; the default is ``params`` if that is one.
        seed: in [0, 2**64); with the step number and the parameter names it determines every draw.
        tensor_ids: overrides of ``noise.tensor_id`` by parameter name.
        on_nonfinite: "raise" ``NonFiniteLossError``, or "skip" the step; the weights are restored either way.
        mode: how perturbations reach the forwards (docs/modes.md). "inplace": weights are written, any closure.
            "scratch": layers run on a perturbed copy in one reused buffer. "folded": low-rank directions act on the
            layers' outputs. "auto": an exact mode where the weights are 16-bit, else by a static table; the attribute
            ``mode`` says which, ``mode_reason`` why. All but "inplace" need a model, whose modules get hooks.
        merge: "step" writes each update into the weights. "window", in mode "folded", lets updates gather and writes
            them when the method's subspace changes, on ``merge()``, and before a state_dict; until then the model's
            forwards show them, its parameters do not.
        two_pass: in place, the last pass of a step is also the first of the next; between steps the weights are then
            perturbed, until ``merge`` (a model's forwards and state_dict call it). For methods that ``plans_ahead``.
        residual: keep a second 16-bit plane beside 16-bit weights, in which no update is lost; else updates of
            16-bit weights round stochastically. Not in place, where the perturbation itself rounds.
        allow_unused: with hooks, accept forwards that never use some weight.
        read_by: with hooks, names of parameters that the forward of another module than their own reads, with that
            module's name ("" for the model itself): {"lm_head.weight": ""} for a loss fused with the head.
        members: with hooks, several points in one forward. The closure runs the step's minibatch stacked so many times
            (``torch.cat([x] * members)``) and returns a loss per row, or the mean of every copy: a tensor. The layers
            must keep the rows in order, and nothing may be drawn (dropout) or averaged over the batch.
        groups: each copy of the minibatch is split into so many equal groups of examples, in order, and each has
            directions of its own; for methods with fresh directions in every step. The closure returns a loss per row,
            or the mean of every group of every copy.
        lr_rule: "signal" lets the step size fall as the gradient's signal gives way to noise (``SignalRule``); it needs
            a loss per row, and two examples or more in a group.

    Attributes:
        steps: number of steps taken.
        skipped: number of steps skipped for a non-finite loss.
        last: what the last step saw: its losses, slopes and more (``LastStep``).
        passes: reads and writes of all the weights so far, counted by elements.
        seconds: accumulated wall seconds by "forward", "perturb" and "refresh" (refreshes with their forwards), as the
            host sees them: work queued on a GPU counts where the host waits for it, and what hooks do inside a compiled
            forward counts to the forward.
    """

    # ---- the step ---------------------------------------------------------------------------------------------------

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        """The method's recipe: directions, losses, and ``apply_update`` at the end. Returns the loss to report."""
        raise NotImplementedError(f"{type(self).__name__} has to define estimate_and_update, the method's recipe")

    def apply_update(
        self,
        terms: Sequence[tuple[Direction, Amounts]],
        *,
        flush: bool = False,
        rule: StateRule | None = None,
        before: Sequence[Pass] = (),
        after: Sequence[Pass] = (),
    ) -> None:
        """The end of a step: W <- (1 - lr wd) W + sum of amount * direction; the step then counts as taken.

        All coefficients are worked out once and checked before the first write, and if a write fails the weights are
        as before.

        Args:
            terms: directions with an amount for each weight.
            flush: the next step shall find everything in the weights, whatever the mode defers.
            rule: makes the update of the sum as a gradient estimate, with state.
            before, after: passes over the state itself, which happen or not with the rest.
        """
        direction = Direction.sum(terms)
        self._refuse_overflow(direction)
        next_point = None
        if self.two_pass and not flush:
            next_point = self.planned(self.steps + 1).scaled(self.radius())

        def rounding_key(n: int) -> int:
            return self.key(Role.ROUNDING, self.perturbation.passes_this_step + n)

        # Until the end of the step: what a method notes after its update belongs to it.
        assert self._held is not None, "apply_update is called by estimate_and_update"
        self._held.enter_context(uninterrupted())
        with self.timed("perturb"):
            self.perturbation.apply(
                Update(direction, self.decay(), rounding_key, flush, next_point, rule, before, after)
            )
            self.steps += 1

    def _refuse_overflow(self, direction: Direction) -> None:
        limit = torch.finfo(torch.float32).max
        for row in (row for part in direction for row in part.coefficients()):
            if not all(abs(value) <= limit for value in row):
                raise NonFiniteLossError(
                    f"the update of step {self.steps} overflows float32 though its losses are finite; the weights "
                    "are restored. Lower lr, raise eps, or pass on_nonfinite='skip'"
                )

    def reduce_losses(self, losses: Tensor) -> Tensor:
        """One set of losses of those of several processes, of any shape; override it to train in parallel.

        The sum has to be taken in the same order everywhere, so that all processes make the same update. The closure is
        no place for it: one process alone may have to repeat a forward, and the others would not wait for it.
        """
        if in_several_processes():
            notices.warn_once(
                "closure: there are several processes, whose losses nobody is known to average, so each of them trains "
                "a model of its own. Let the optimizer average them: optimizer.reduce_losses = "
                "pgap_kernels.integrations.ranks.mean_over_ranks"
            )
        return losses

    def timed(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Add the wall seconds of a block to ``seconds[part]``."""
        return self.clock.timed(part, lambda: self.perturbation.seconds)

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One zeroth-order step.

        Args:
            closure: returns the loss of the step's minibatch; see the class. None after ``step_ahead``.

        Returns:
            Mean of the losses at the perturbed weights; NaN for a step that was skipped.

        Raises:
            NonFiniteLossError: see ``on_nonfinite``.
            TypeError: no closure was given, and no step was taken ahead.
            RuntimeError: a closure was given though a step was taken ahead; or accelerate's ``accumulate`` would let it
                see one batch of several.
        """
        if self._ahead is None:
            refuse_accumulation()
            return self._step(closure)
        if closure is not None:
            raise RuntimeError(
                "step: got a closure, but step_ahead has taken this step already; accepted: step() without one"
            )
        loss, self._ahead = self._ahead, None
        return loss

    def step_ahead(self, closure: Closure) -> float:
        """Take a step now; the next ``step()`` without a closure finds it taken and returns its loss.

        For training loops that call ``step()`` themselves, but have the loss, and so the forwards, at another place.

        Raises:
            RuntimeError: the step before was not taken up yet.
        """
        if self._ahead is not None:
            raise RuntimeError("step_ahead: called twice in a row; accepted: with step() in between")
        self._ahead = self._step(closure)
        return self._ahead

    @property
    def is_ahead(self) -> bool:
        """Whether ``step_ahead`` has taken a step that ``step()`` has not taken up."""
        return self._ahead is not None

    def _step(self, closure: Closure | None) -> float:
        if not callable(closure):
            raise TypeError(
                f"closure: got {closure!r}; accepted: a function that returns the loss of a minibatch. Training loops "
                "that call step() without one need step_ahead(closure) before it, as in "
                "pgap_kernels.integrations.transformers.ZOTrainer"
            )
        self.perturbation.refuse_if_released("step")
        with outside_ambient_state() as ambient, contextlib.ExitStack() as held:
            self.follow_model()
            evaluate = self._begin(closure, ambient)
            self._held = held
            try:
                with evaluate.autocast.outside():
                    loss = self.estimate_and_update(evaluate)
            except BaseException as error:
                self._planned = None  # a step taken again makes its direction of what weights and groups then are
                with uninterrupted():
                    self.perturbation.restore()
                    evaluate.state.restore()
                if not isinstance(error, NonFiniteLossError) or self.on_nonfinite == "raise":
                    raise
                self.skipped += 1
                self.steps += 1
                return self._note(evaluate, math.nan, skipped=True)
            finally:
                self._held = None
                torch.clear_autocast_cache()
                evaluate.state.release()
            if not isinstance(loss, (int, float)):
                raise TypeError(f"estimate_and_update: returned {loss!r}; accepted: a float, the loss to report")
            self._flat.note(evaluate.losses, self.groups)
            return self._note(evaluate, loss)

    def _note(self, evaluate: Evaluation, loss: float, skipped: bool = False) -> float:
        losses, slopes = tuple(evaluate.losses), tuple(evaluate.slopes)
        self.last = LastStep(loss, losses, slopes, evaluate.refreshed, skipped, evaluate.signal)
        return loss

    def _begin(self, closure: Closure, ambient: Ambient) -> Evaluation:
        """What the forwards of this step start from."""
        weights = self.weights()
        self.check_schedule()
        self.perturbation.begin(self.key(Role.ROUNDING, MERGE))
        if self._forward_state is None:
            self._forward_state = ForwardState(modules_of(self.model), [w.tensor for w in weights])
        state = self._forward_state
        state.begin()
        return Evaluation(
            step=self.steps,
            closure=closure,
            perturbation=self.perturbation,
            weights=weights,
            model=self.model,
            eps=self.radius(),
            state=state,
            autocast=Autocast(state.device_types),
            ambient=ambient,
            timed=self.timed,
            reduce=_unreduced if self.perturbation.dry else self.reduce_losses,
            members=self.members,
            groups=self.groups,
            checked_slices=self._checked_slices,
        )

    def cost(self) -> Cost:
        """What a step costs beyond its forwards, counted over one dry period: nothing is computed or written."""
        self.perturbation.refuse_if_released("cost")
        with outside_ambient_state():
            self.follow_model()
            return measure_cost(self)

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with an entry "zo": contract version, method, seed, step.

        Merges first: the weights of the model at this moment go with it. That writes weights, so where several
        processes train one model and something is ``pending``, all of them have to call ``merge`` before.

        Raises:
            RuntimeError: something is pending, in a closure or in one of several processes.
        """
        if self._perturbation is not None:
            merge_for(self._perturbation, "state_dict")
        return checkpoint.with_plain_numbers({**super().state_dict(), "zo": checkpoint.header(self)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; another format, contract version or method is refused.

        State keeps its dtype, and where it fits its memory.
        """
        self.perturbation.refuse_if_released("load_state_dict")
        with outside_ambient_state():
            self.follow_model()
            checkpoint.check(self, state_dict)
            self.merge()
            kept = dict(self.state)
            super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
            self.state.update(kept)
            self._forget_weights()
            checkpoint.load(self, state_dict)
            self._ahead = None
            self._note_model()  # the groups are other dicts now; those of the mode's weights are not read
            self.perturbation.begin(self.key(Role.ROUNDING, MERGE))
            if self.perturbation.residual is not None:
                self.perturbation.residual.left = {}  # as ``Residual.load`` has it
