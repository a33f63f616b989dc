"""A part of a direction: what one op call adds to some weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .weight import Amounts, Weight


class Part(ABC):
    """A displacement of some weights of one device and dtype, coefficients included.

    Parts are immutable vectors: they scale and add. Two parts add up to one part if one pass can move along both.
    A mode knows no kind of part. It asks for passes (``apply``) or, where weights are not written, for ``operands``.
    """

    acts_on_outputs: bool = False  # its operands can move a layer's output instead of its weight

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = list(weights)
        self.tensors = [w.tensor for w in weights]
        self.ids = [w.id for w in weights]
        self.indices = tuple([w.index for w in weights])
        # As the ops take it: None if all tensors are whole.
        self.slices = None if weights[0].span is None else [w.span or (0, 0) for w in weights]

    # ---- a vector ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def coefficients(self) -> list[Sequence[float]]:
        """A row per term with a number for each weight, so that an overflow is found before it is written."""

    @abstractmethod
    def scaled(self, amounts: Amounts) -> Part:
        """This part times the amount of each weight."""

    @abstractmethod
    def plus(self, other: Part) -> Part | None:
        """The sum, or None if it takes two passes."""

    def moved_from(self, before: Part, keep: Sequence[float]) -> Part | None:
        """What takes ``W + before`` to ``keep W + self`` in one pass with decay 1 - keep; None if it takes two."""
        return before.removal(keep).plus(self)

    def removal(self, keep: Sequence[float]) -> Part:
        """What takes ``W + self`` to ``keep W`` with decay 1 - keep."""
        return self.scaled([-k for k in keep])

    def reverted(self, back: Amounts) -> Part:
        """What takes ``keep W + self`` back to W with decay 1 - 1 / keep; ``back`` is -1 / keep."""
        return self.scaled(back)

    def is_zero(self) -> bool:
        """Whether nothing would move; such a pass is not made, as adding +0 would turn -0 into +0."""
        return not any(map(any, self.coefficients()))

    def draws_over(self, curvature: Sequence[Tensor]) -> Mapping[int, Sequence[float]] | None:
        """Coefficients by key, if this is plain noise over the root of a curvature."""
        return None

    def plain_draws(self) -> Mapping[int, Sequence[float]] | None:
        """Coefficients by key, if this is plain dense normal noise: what rules with state take as a gradient."""
        return None

    # ---- a pass -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        """Write ``tensors <- tensors - decay * tensors + self`` in one op call; options are the op's."""

    @abstractmethod
    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Part:
        """The part of some of its weights (positions in ``weights``), stored in other tensors if given."""

    def by_kind(self) -> list[Part]:
        """The part split by the weights' present device and dtype: some may have been cast since it was made."""
        kinds: dict[Hashable, list[int]] = {}
        for position, w in enumerate(self.weights):
            kinds.setdefault((w.tensor.device, w.tensor.dtype), []).append(position)
        return [self] if len(kinds) == 1 else [self.select(chosen) for chosen in kinds.values()]

    def condensed(self) -> Part:
        """The same displacement in the fewest terms and in memory of its own, to be summed over many steps."""
        return self

    @property
    def core_bytes(self) -> int:
        """Memory that its coefficients take beyond floats."""
        return 0

    def _chosen(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None) -> list[Weight]:
        if tensors is None:
            return [self.weights[i] for i in chosen]
        return [replace(self.weights[i], tensor=t) for i, t in zip(chosen, tensors, strict=True)]

    # ---- a forward that reads the weights without writing them -----------------------------------------------------

    @abstractmethod
    def layout(self) -> Hashable:
        """What decides the shape of its operands: parts of one layout can use each other's memory."""

    @abstractmethod
    def operands(self) -> Operands:
        """Device memory for what hooks and captured graphs read, not loaded yet."""


class Fold(NamedTuple):
    """A C B^T of one weight in device memory that keeps its place.

    Attributes:
        left, right: A and B; None where they are drawn.
        core: C; None for the identity.
        coefficient: what multiplies it where there is no core, (1,).
        keys: of A and B, for those that are drawn.
    """

    left: Tensor | None
    right: Tensor | None
    core: Tensor | None
    coefficient: Tensor
    keys: Tensor
    rank: int

    @property
    def kind(self) -> Hashable:
        """Equal for folds that one op can make, each on its own rows."""
        return self.left is None, self.right is None, self.core is None, self.rank


class Operands(ABC):
    """A part's keys, coefficients and cores in device memory that keeps its place from step to step.

    Attributes:
        serial: of whoever keeps it: what was put together from other operands, in memory since freed, does not serve.
    """

    serial: int = 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of its own."""

    @abstractmethod
    def load(self, part: Part) -> None:
        """Take over the values of a part of the same layout."""

    def unload(self) -> None:  # noqa: B027  (most have nothing to let go of)
        """Release what belongs to the part: nothing is shown until the next ``load``."""

    @abstractmethod
    def fill(self, position: int, tensor: Tensor, out: Tensor, decay: Tensor) -> None:
        """out <- tensor - decay * tensor + the part, for the weight at a position; decay is a (1, 1) device tensor."""

    def fill_all(self, positions: Sequence[int], tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """``fill`` for several weights, without decay, with what was loaded last."""
        no_decay = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        for position, tensor, filled in zip(positions, tensors, out, strict=True):
            self.fill(position, tensor, filled, no_decay)

    def fold(self, position: int) -> Fold:
        """The factors and the core of one weight, for parts that act on outputs."""
        raise NotImplementedError

    def outside(self) -> Sequence[Tensor | None]:
        """Tensors that are read where the method keeps them: other ones make another graph."""
        return ()


def pick(values: Sequence, chosen: Sequence[int]) -> list:
    """The values at some positions."""
    return [values[i] for i in chosen]


def scale_row(row: Sequence[float], indices: Sequence[int], amounts: Amounts) -> list[float]:
    """A row of coefficients times the amounts of its weights."""
    return [c * amounts[i] for c, i in zip(row, indices, strict=True)]


def add_rows(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The sum of two rows of coefficients."""
    return [x + y for x, y in zip(a, b, strict=True)]
