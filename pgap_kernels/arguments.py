"""The arguments of each op family, named once: its schemas, its public functions and every backend take this record.

An op's first arguments are the lists of tensors that it works on; everything else is a field here and a keyword-only
argument of the schema. Scalars and keys travel in small tensors: scalars as float32 (the limit of a mask's words as
int64), in rows of one value or one per tensor, keys as int64 bit patterns. ``slices`` is empty, or (base, row_stride)
of every tensor, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class DenseArguments(NamedTuple):
    """Of ``dense_perturb_``. A pass may hold several stages, each of which rounds as a pass of its own would: draws are
    grouped by ``stages``, and each stage has its row of ``decay`` and its rounding key."""

    keys: Tensor
    coefficients: Tensor
    decay: Tensor
    stages: list[int]
    tensor_ids: list[int]
    rounding_keys: Tensor | None = None
    slices: Sequence[int] = ()
    distribution: str = "normal"
    tier: str = "exact"


class MaskedArguments(NamedTuple):
    """Of ``masked_perturb_``; ``mask`` is "threshold", "share" or "bits" and says which of the next three is read."""

    keys: Tensor
    coefficients: Tensor
    decay: Tensor
    mask: str
    mask_key: Tensor
    mask_level: Tensor
    mask_bits: list[Tensor]
    tensor_ids: list[int]
    rounding_key: Tensor | None = None
    slices: Sequence[int] = ()
    distribution: str = "normal"
    tier: str = "exact"


class AssembleArguments(NamedTuple):
    """Of ``assemble_gradient_``."""

    keys: Tensor
    coefficients: Tensor
    tensor_ids: list[int]
    slices: Sequence[int] = ()
    distribution: str = "normal"
    tier: str = "exact"


class LowRankArguments(NamedTuple):
    """Of ``lowrank_perturb_``: a factor that is an empty list is drawn, from its key in ``keys`` (left, right, core);
    ``core_kind`` is "none", "diagonal", "full" or "regenerated". ``below`` is empty, or the v of each weight's
    quotient, which has an ``e`` > 0."""

    left: list[Tensor]
    right: list[Tensor]
    core: list[Tensor]
    keys: Tensor
    coefficient: Tensor
    decay: Tensor
    tensor_ids: list[int]
    rank: int
    core_kind: str
    below: list[Tensor]
    rounding_key: Tensor | None = None
    slices: Sequence[int] = ()
    e: Tensor | None = None


class ForwardArguments(NamedTuple):
    """Of ``lowrank_forward_``. A side holds one factor for all slices of the rows, one for each, or none: then each
    slice's is drawn, by the two keys (A's, B's) that ``keys`` has for it. The cores of the slices, or where there are
    none their ``coefficients``, one element each. ``shape`` is the weight's; ``span`` is empty, or (base, row stride)
    of a shard."""

    left: list[Tensor]
    right: list[Tensor]
    cores: list[Tensor]
    coefficients: list[Tensor]
    keys: list[Tensor]
    shape: list[int]
    rank: int
    tensor_id: int
    span: Sequence[int] = ()
    transposed: bool = False

    @property
    def slices(self) -> int:
        """How many slices the rows have."""
        return len(self.cores) or len(self.coefficients)


class PreconditionedArguments(NamedTuple):
    """Of ``preconditioned_update_``; ``scalars`` are the rule's, in its order."""

    keys: Tensor
    gradient: Tensor
    restore: Tensor
    scalars: Tensor
    rule: str
    decay: Tensor
    tensor_ids: list[int]
    rounding_key: Tensor | None = None
    slices: Sequence[int] = ()
    distribution: str = "normal"
    tier: str = "exact"


class CurvatureArguments(NamedTuple):
    """Of ``preconditioned_perturb_``, which backends serve as a rule of ``PreconditionedArguments``: "perturb" or, with
    ``around``, "around"."""

    curvature: list[Tensor]
    keys: Tensor
    coefficients: Tensor
    decay: Tensor
    tensor_ids: list[int]
    around: Tensor | None = None
    rounding_key: Tensor | None = None
    slices: Sequence[int] = ()
    distribution: str = "normal"
    tier: str = "exact"


class AnchorArguments(NamedTuple):
    """Of ``anchor_affine_``; ``deltas`` may be empty."""

    anchors: list[Tensor]
    deltas: list[Tensor]
    coefficient: Tensor
    tensor_ids: list[int]
    rounding_key: Tensor | None = None
    slices: Sequence[int] = ()


class ReductionArguments(NamedTuple):
    """Of ``reduce``; without keys the sum is of squares, of distances from ``anchors`` if there are any."""

    anchors: list[Tensor]
    keys: Tensor
    tensor_ids: list[int]
    slices: Sequence[int] = ()
    distribution: str = "normal"
    tier: str = "exact"


_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[int]: "int[]",
    Sequence[int]: "int[]",
    int: "int",
    bool: "bool",
    str: "str",
}


def schema(record: Any) -> str:
    """The fields of a record as arguments in the text of a torch.library schema."""
    arguments = [f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items()]
    first = len(arguments) - len(record._field_defaults)
    for i, value in enumerate(record._field_defaults.values(), first):
        text = f'"{value}"' if isinstance(value, str) else "[]" if value == () else str(value)
        arguments[i] += f"={text}"
    return ", ".join(arguments)
