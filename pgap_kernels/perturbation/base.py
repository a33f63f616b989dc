"""The interface of the modes, and writes that happen all or not at all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .direction import Direction, Part, PerWeight, Term, Weight
from .residual import Residual

T = TypeVar("T")


class Update(NamedTuple):
    """W <- (1 - decay) W + sum over (direction, step) of step * direction; directions have parts of the same weights.

    ``closing``: all that is pending shall be in the weights afterwards. Otherwise ``following``, where known, is the
    direction and amount at which the next forward will stand.
    """

    terms: Sequence[tuple[Direction, PerWeight]]
    decay: PerWeight
    closing: bool = True
    following: tuple[Direction, PerWeight] | None = None

    def by_part(self) -> list[tuple[list[Term], list[float]]]:
        """Terms and decays of each part."""
        directions = [direction for direction, _ in self.terms]
        rows = []
        for parts in zip(*directions, strict=True):
            terms = [Term(part, part.amounts(step)) for part, (_, step) in zip(parts, self.terms, strict=True)]
            rows.append((terms, [self.decay(w) for w in parts[0].weights]))
        return rows


class Write(NamedTuple):
    """A pass over some tensors that can be made and be taken back, to rounding."""

    tensors: list[Tensor]
    do: Callable[[], None]
    undo: Callable[[], None]


def all_or_nothing(writes: Sequence[Write], spare: int) -> None:
    """Make every write, or none: if one raises, those before it are undone and the exception propagates.

    An op that raises has written nothing. Up to ``spare`` bytes are copied before they are written, the smallest writes
    first, and come back to the bit; the last write needs no copy.
    """
    done: list[tuple[Write, list[Tensor] | None]] = []
    ordered = sorted(writes, key=lambda write: size_of(write.tensors))
    try:
        for write in ordered:
            size, copies = size_of(write.tensors), None
            if write is not ordered[-1] and size <= spare:
                copies, spare = [t.clone() for t in write.tensors], spare - size
            write.do()
            done.append((write, copies))
    except BaseException:
        for write, copies in reversed(done):
            if copies is None:
                write.undo()
            else:
                torch._foreach_copy_(write.tensors, copies)
        raise


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stochastic(part: Part, key: int) -> dict[str, Any]:
    """Rounding of an update: stochastic in 16-bit, where to nearest would lose steps under half an ulp."""
    if part.tensors[0].dtype == torch.float32:
        return {}
    return {"rounding": "stochastic", "rounding_key": key}


class Perturbation:
    """How a direction reaches the forwards of a step, and how an update reaches the weights.

    A step is ``begin``, any number of ``stand`` and ``forward``, and ``commit``; on an exception ``restore``.

    Attributes:
        passes: reads and writes of all weights so far, counted by elements.
        seconds: spent on perturbing inside forwards, if they were not compiled.
        written: how many times this step has written weights; the number of its next stochastic-rounding key.
    """

    mode: ClassVar[str]

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.passes = 0.0
        self.written = self.merge_key = 0
        self.seconds = 0.0
        self.residual: Residual | None = None
        self.adopt(weights)

    @property
    def scratch_bytes(self) -> int:
        """Memory beside the weights that the forwards need."""
        return 0

    @property
    def graph_key(self) -> Hashable:
        """Forwards with equal keys may replay each other's CUDA graph."""
        return None

    def adopt(self, weights: Sequence[Weight]) -> None:
        """Serve these weights from now on."""
        self.weights = list(weights)
        self.total = sum(w.tensor.numel() for w in weights) or 1
        self.largest = max((size_of([w.tensor]) for w in weights), default=0)

    def count(self, weights: Sequence[Weight]) -> None:
        """Note a pass over some of the weights."""
        self.passes += sum(w.tensor.numel() for w in weights) / self.total

    def landing(self, terms: list[Term], decay: list[float], rounding_key: int) -> list[Write]:
        """The passes that make an update of one part: one, or with residual planes some for a few weights each."""
        if not any(decay) and not any(any(t.coefficient) for t in terms):
            return []  # not even -0 becomes 0
        part, residual = terms[0].part, self.residual
        if residual is not None and residual.serves(part):
            return [
                self._write(residual.tensors(part, chosen), terms, decay, partial(residual.write, part, chosen))
                for chosen in residual.batches(part.weights)
            ]
        first = partial(part.write, rounding=stochastic(part, rounding_key))
        return [self._write(part.tensors, terms, decay, partial(part.write, rounding={}), first)]

    def _write(
        self,
        tensors: list[Tensor],
        terms: list[Term],
        decay: list[float],
        write: Callable,
        first: Callable | None = None,
    ) -> Write:
        """A pass and its inverse,  W <- (W - sum of terms) / (1 - d); ``first`` makes the pass if not ``write``."""

        def do() -> None:
            (first or write)(terms, decay)
            self.passes += sum(t.numel() for t in tensors if t.is_floating_point()) / self.total  # planes are integers

        def undo() -> None:
            keep = [1.0 - d for d in decay]
            back = [Term(t.part, [-c / k for c, k in zip(t.coefficient, keep, strict=True)]) for t in terms]
            write(back, [-d / k for d, k in zip(decay, keep, strict=True)])

        return Write(tensors, do, undo)

    @property
    def pending(self) -> bool:
        """Whether the weights are not what the model is: see ``merge``."""
        return False

    def spare(self, elements: int, device: torch.device) -> Tensor:
        """Uninitialised float32 memory to use until the next forward."""
        return torch.empty(elements, dtype=torch.float32, device=device)

    def begin(self, merge_key: int) -> None:
        """A step begins; ``merge_key`` rounds what is merged until the next begins."""
        self.written, self.merge_key = 0, merge_key

    def stand(self, direction: Direction, amount: PerWeight) -> None:
        """The forwards that follow see W + amount * direction; an empty direction is W."""
        raise NotImplementedError

    def forward(self, call: Callable[[], T]) -> T:
        """One forward where ``stand`` said."""
        return call()

    def commit(self, update: Update, rounding_key: int) -> None:
        """Leave where one stands and make the update; if it raises, nothing has changed."""
        raise NotImplementedError

    def restore(self) -> None:
        """The weights as they were before ``begin``."""
        raise NotImplementedError

    def merge(self) -> None:
        """Write what is pending into the weights."""

    def release(self) -> None:
        """Leave the model alone from now on, with all that it has learnt in its weights."""
        self.merge()
