"""The interface of the modes: how a direction reaches a forward, and how an update reaches the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..directions import Amounts, Direction, Part, Pass, RulePass, Weight, bytes_of, concatenated, run_all_or_none
from .residual import Residual

T = TypeVar("T")


class StateRule(NamedTuple):
    """A rule with state: what the op needs for the weights of one pass.

    Attributes:
        make: the rule, its scalars one for each weight where they differ.
        state: the rule's states.
        indices: of the weights that it updates; None for all. The others move along their direction.
        takes_off: whether the rule takes off what is in the weights, given that part and the states, though it is of
            another kind than its gradient estimate.
    """

    make: Callable[[Sequence[Weight]], ops.Rule]
    state: Callable[[Sequence[Weight]], list[list[Tensor]]]
    indices: Collection[int] | None = None
    takes_off: Callable[[Part, list[list[Tensor]]], bool] | None = None

    def undoes(self, before: Part, part: Part) -> bool:
        """Whether an update along a part takes off what is in the weights, though it is of another kind."""
        if self.takes_off is None or before.indices != part.indices:
            return False
        return self.takes_off(before, self.state(part.weights))

    def serves(self, part: Part) -> bool:
        """Whether it updates the weights of a part by it; beside a rule for some weights other kinds of part may be."""
        return self.indices is None or (part.indices[0] in self.indices and part.plain_draws() is not None)


@dataclass(frozen=True)
class Update:
    """W <- (1 - decay) W + direction, or what a rule makes of the direction as a gradient estimate.

    Attributes:
        direction: coefficients included.
        decay: of each weight; it acts on the weights that the direction moves.
        rounding_key: gives the n-th key of stochastic rounding of this update.
        flush: leave everything that was learnt in the weights, whatever the mode defers otherwise.
        next_point: what the next step's first forward adds to the weights, if that is known.
        rule: for updates with state.
        before, after: passes over the state itself.
    """

    direction: Direction
    decay: Amounts
    rounding_key: Callable[[int], int]
    flush: bool = True
    next_point: Direction | None = None
    rule: StateRule | None = None
    before: Sequence[Pass] = ()
    after: Sequence[Pass] = ()

    def keep(self) -> list[float]:
        """1 - decay of the weights that move, 1 of the others."""
        moved = {i for part in self.direction for i in part.indices}
        return [1.0 - d if i in moved else 1.0 for i, d in enumerate(self.decay)]

    def passes(self, moves: Sequence[tuple[Part, Part | None]] | None = None) -> list[Pass]:
        """The passes of parts, each with what it restores; by default of the direction's parts.

        If several write a weight, the first one decays it, and each has a rounding key of its own.
        """
        times: dict[int, int] = {}
        made = list(self.before)
        for part, restore in moves if moves is not None else [(part, None) for part in self._parts()]:
            decay = [0.0 if w.index in times else self.decay[w.index] for w in part.weights]
            key = self.rounding_key(max(times.get(i, 0) for i in part.indices))
            times |= {i: times.get(i, 0) + 1 for i in part.indices}
            made.append(self._pass(part, decay, key, restore))
        return [*made, *self.after]

    def _parts(self) -> list[Part]:
        return list(self.direction) if self.rule else concatenated(self.direction)

    def _pass(self, part: Part, decay: list[float], key: int, restore: Part | None) -> Pass:
        if self.rule is None or not self.rule.serves(part):
            return Pass(part, decay, key)
        return RulePass(part, decay, key, self.rule.make(part.weights), self.rule.state(part.weights), restore)


class Perturbation:
    """One mode.

    A step is ``begin``, any number of ``perturb_to`` and ``forward``, and ``apply``; on an exception ``restore``.

    Attributes:
        active: a forward of a step is running.
        fades: what is pending takes a share of W away, too (mode folded with weight decay).
        passes: reads and writes of all weights so far, counted by elements.
        seconds: spent on perturbing inside forwards, if they were not compiled.
        passes_this_step: number of ``perturb_to`` and ``apply`` of this step that wrote weights; it numbers the keys of
            stochastic rounding.
        dry: count passes, run none.
        watched: something looks on while the forward runs, so that replaying it would not do.
        must_repeat: the last forward ran other code than the next ones will, and has to be repeated.
    """

    mode: ClassVar[str]
    fades = False

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.passes = 0.0
        self.passes_this_step = self.merge_key = 0
        self.seconds = 0.0
        self.workspace_bytes = 0  # the most workspace that was lent beyond the memory of the forwards
        self.residual: Residual | None = None
        self.active = self.dry = self.must_repeat = self.watched = False
        self.released: str | None = None  # why it no longer serves
        self.set_weights(weights)

    @property
    def scratch_bytes(self) -> int:
        """Memory beside the weights that the forwards need."""
        return 0

    @property
    def state_bytes(self) -> int:
        """Memory that the mode keeps between steps."""
        return 0

    @property
    def has_graphs(self) -> bool:
        """Whether CUDA graphs read what forwards have read in memory of the method's own."""
        return False

    @property
    def graph_key(self) -> Hashable:
        """Forwards with equal keys may replay each other's CUDA graph."""
        return None

    @property
    def pending(self) -> bool:
        """Whether the weights are not what the model is: see ``merge``."""
        return False

    def is_current(self) -> bool:
        """Whether the model computes with its weights as it did when the mode was given them."""
        return True

    def set_weights(self, weights: Sequence[Weight]) -> None:
        """Serve these weights from now on."""
        self.weights = list(weights)
        self.numels = [w.tensor.numel() for w in weights]
        self.total = sum(self.numels) or 1
        self.on_cuda = any(w.tensor.is_cuda for w in weights)
        self.largest = max((bytes_of([w.tensor]) for w in weights), default=0)

    def workspace(self, elements: int, device: torch.device) -> Tensor:
        """Uninitialised float32 memory to use until the next forward."""
        self.workspace_bytes = max(self.workspace_bytes, 4 * elements)
        return torch.empty(elements, dtype=torch.float32, device=device)

    def dry_copy(self, weights: list[Weight]) -> Perturbation:
        """The mode for weights without memory: it counts passes and runs none."""
        twin = copy.copy(self)
        twin.dry, twin.residual = True, None
        twin.weights, twin.passes, twin.seconds, twin.workspace_bytes = weights, 0.0, 0.0, 0
        twin.drop_cached()
        return twin

    def drop_cached(self) -> None:
        """Drop what depends on the weights as they were before a change."""

    # ---- passes -----------------------------------------------------------------------------------------------------

    def count_passes(self, weights: Sequence[Weight], times: int = 1) -> None:
        """Count passes over some of the weights."""
        elements = self.total if len(weights) == len(self.weights) else sum(self.numels[w.index] for w in weights)
        self.passes += times * elements / self.total

    def run(self, p: Pass) -> None:
        """Run a pass: the only place where weights are written."""
        if not self.dry:
            p.run()
        if self.residual is not None:
            self.residual.note(p.weights)
        self.count_passes(p.weights)

    def split(self, p: Pass) -> list[Pass]:
        """The passes that make up a pass of an update: with residual planes several, of a few weights each."""
        if p.is_empty():
            return []
        if self.residual is None or not self.residual.serves(p.part):
            return [p]
        return self.residual.split(p)

    def run_all(self, passes: Sequence[Pass], copy_budget: int) -> None:
        """Run the passes of an update, or none of them."""
        if self.residual is not None:
            self.residual.follow(self.weights)
        try:
            run_all_or_none([small for p in passes for small in self.split(p)], self.run, copy_budget)
        finally:
            torch.clear_autocast_cache()  # whoever merges under autocast would go on with casts of the weights before
            if self.residual is not None:  # weights may have been copied back
                self.residual.note(self.weights)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def refuse_if_released(self, call: str) -> None:
        """Raise RuntimeError if the mode no longer serves, or is in the middle of a forward."""
        if self.released is not None:
            raise RuntimeError(f"{call}: {self.released}; make a new optimizer to go on")
        self.refuse_inside_forward(call)

    def refuse_inside_forward(self, call: str) -> None:
        """Raise RuntimeError in a closure: the rest of its forward would run at another point than its start."""
        if self.active:
            raise RuntimeError(
                f"{call}: called in the closure of a step, at perturbed weights; accepted: between steps"
            )

    def begin(self, merge_key: int) -> None:
        """A step begins; ``merge_key`` rounds what is merged until the next begins."""
        self.passes_this_step, self.merge_key = 0, merge_key
        if self.residual is not None:
            self.residual.follow(self.weights)

    def perturb_to(self, points: Sequence[Direction]) -> None:
        """The next forwards see W + point: one point, or one for each of N equal slices of a forward's rows.

        Raises:
            ValueError: the mode cannot show several points in one forward.
        """
        raise NotImplementedError

    def forward(self, call: Callable[[], T]) -> T:
        """One forward at the points of the last ``perturb_to``."""
        return call()

    def apply(self, update: Update) -> None:
        """Leave the point and apply the update; if this raises, nothing has changed."""
        raise NotImplementedError

    def restore(self) -> None:
        """Give the weights what they were before ``begin``."""
        self.perturb_to([Direction()])

    def merge(self) -> None:
        """Write into the weights what is pending."""

    def release(self, why: str = "the optimizer was detached from its model") -> None:
        """Write all that was learnt into the weights, and leave the model alone from now on."""
        self.merge()
        self.released = why
