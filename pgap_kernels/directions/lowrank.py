"""Low-rank directions of weight matrices.

A (sum_j c_j C_j) B^T       A (m, r), B (n, r): stored, or drawn from a key;   C_j: none (identity), diagonal or full
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, ops
from .part import Fold, Operands, Part, add_rows, pick, scale_row
from .weight import Amounts, Weight, scalar_if_equal

_LINE = 32  # floats: factors that are drawn together begin at multiples of 128 bytes


class Factor(NamedTuple):
    """A or B of several weights: float32 tensors (rows, rank), or a key and the rank to draw them with."""

    tensors: list[Tensor] | None = None
    key: int | None = None
    rank: int | None = None

    @classmethod
    def stored(cls, tensors: Sequence[Tensor]) -> Factor:
        """Factors kept by the method."""
        return cls(tensors=list(tensors))

    @classmethod
    def drawn(cls, key: int, rank: int) -> Factor:
        """Factors that are drawn again wherever they are needed."""
        return cls(key=key, rank=rank)

    @property
    def columns(self) -> int:
        """The rank."""
        if self.tensors is None:
            assert self.rank is not None
            return self.rank
        return self.tensors[0].shape[1]

    def argument(self) -> list[Tensor] | int:
        """As ``ops.lowrank_perturb_`` takes it."""
        if self.tensors is not None:
            return self.tensors
        assert self.key is not None
        return self.key

    def identity(self) -> Hashable:
        """Equal for the same tensors or key; values are not compared."""
        return self.key if self.tensors is None else tuple(map(id, self.tensors))

    def select(self, chosen: Sequence[int]) -> Factor:
        """The factors of some of the weights."""
        return self if self.tensors is None else Factor.stored(pick(self.tensors, chosen))

    def materialised(self, weights: Sequence[Weight], side: int) -> list[Tensor]:
        """The tensors; drawn ones are drawn now. ``side`` is 0 for A, 1 for B."""
        if self.tensors is not None:
            return self.tensors
        assert self.key is not None
        return draw_factors(weights, side, self.columns, [(self.key, 1.0)])


KeyAndRow = tuple[int, Sequence[float]]  # a draw, and what multiplies it in each weight


class SummedDraws:
    """A factor that is a sum of drawn ones, sum_j c_j z(key_j): drawn when it is first read, by one op call.

    Args:
        weights, side, rank: as in ``draw_factors``.
        draws: the terms.
    """

    def __init__(self, weights: Sequence[Weight], side: int, rank: int, draws: list[KeyAndRow]) -> None:
        self.weights, self.side, self.rank, self.draws = weights, side, rank, draws

    def times(self, row: Sequence[float]) -> list[KeyAndRow]:
        """The draws of the sum times a number for each weight."""
        if all(number == 1.0 for number in row):
            return self.draws
        return [(key, [c * number for c, number in zip(own, row, strict=True)]) for key, own in self.draws]

    def identity(self) -> Hashable:
        """As in ``Factor``; equal for the very same sum."""
        return "sum", id(self)

    @functools.cached_property
    def stored(self) -> Factor:
        """The sum."""
        draws = [(key, scalar_if_equal(row)) for key, row in self.draws]
        return Factor.stored(draw_factors(self.weights, self.side, self.rank, draws))


def draw_factors(
    weights: Sequence[Weight], side: int, rank: int, draws: Sequence[tuple[int | Tensor, float | Sequence[float]]]
) -> list[Tensor]:
    """A (side 0) or B (1) of weights of one device, in one op call; of a shard, its rows of the unsharded one's.

    It is the sum of the draws, each a key and what multiplies it.
    """
    rows = [w.tensor.shape[side] for w in weights]
    places = [0, *itertools.accumulate(-(-count * rank // _LINE) * _LINE for count in rows)]
    # One piece of memory: a GPU's table of addresses is then found again in the next step.
    memory = torch.empty(places[-1], dtype=torch.float32, device=weights[0].tensor.device)
    factors = [memory[at : at + count * rank].view(count, rank) for at, count in zip(places, rows, strict=False)]
    spans = []
    for w in weights:
        base, row_stride = w.span or (0, w.tensor.shape[1])
        first = (base // max(row_stride, 1), base % max(row_stride, 1))[side]
        spans.append((first * rank, rank))
    ops.assemble_gradient_(factors, draws, tensor_ids=[w.id for w in weights], slices=spans)
    return factors


def draw_factor(weight: Weight, side: int, rank: int, key: int | Tensor) -> Tensor:
    """A (side 0) or B (1) of one weight."""
    return draw_factors([weight], side, rank, [(key, 1.0)])[0]


class Term(NamedTuple):
    """One core of the sum: a tensor of each weight (None: the identity), and a coefficient for each."""

    cores: Sequence[Tensor] | None
    row: Sequence[float]


class LowRank(Part):
    """Low-rank displacements of weight matrices of one rank.

    Args:
        weights: matrices (m, n) of one device and dtype.
        left, right: A and B.
        terms: their cores and coefficients.
        shapes: rows and columns as which each weight, contiguous, is viewed; by default its own. A displacement of
            another shape has no counterpart on a layer's output.

    Raises:
        ValueError: a weight is no matrix, or the rank exceeds its shorter side.
    """

    acts_on_outputs: bool = True

    def __init__(
        self,
        weights: Sequence[Weight],
        left: Factor,
        right: Factor,
        terms: Sequence[Term],
        shapes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(weights)
        rank = left.columns
        self.shapes = None if shapes is None else list(shapes)
        if self.shapes is not None:
            self.acts_on_outputs = all(w.tensor.shape == shape for w, shape in zip(weights, self.shapes, strict=True))
        own: list[tuple[int, ...]] = [tuple(w.tensor.shape) for w in weights]
        for w, shape in zip(weights, self.shapes or own, strict=True):
            if len(shape) != 2 or (w.span is None and rank > min(shape)):
                raise ValueError(
                    f"rank: got {rank} for {w.name!r} of shape {tuple(w.tensor.shape)}; accepted: a matrix, "
                    "and no more than its shorter side"
                )
        self.rank = rank
        self.factors: tuple[Factor | SummedDraws, Factor | SummedDraws] = (left, right)
        self.terms = list(terms)

    @property
    def left(self) -> Factor:
        """A."""
        return _drawn_now(self.factors[0])

    @property
    def right(self) -> Factor:
        """B."""
        return _drawn_now(self.factors[1])

    def coefficients(self) -> list[Sequence[float]]:
        for factor in self.factors:
            if isinstance(factor, SummedDraws):
                return [row for _, row in factor.times(self._coefficient())]
        return [term.row for term in self.terms]

    def _coefficient(self) -> list[float]:
        """What multiplies A B^T, of each weight, where there is no core."""
        return [sum(values) for values in zip(*(term.row for term in self.terms), strict=True)]

    def _draws(self, side: int) -> list[KeyAndRow] | None:
        """A factor, times what multiplies A B^T, as draws; None if it is stored."""
        factor = self.factors[side]
        if isinstance(factor, SummedDraws):
            return factor.times(self._coefficient())
        return None if factor.key is None else [(factor.key, self._coefficient())]

    def scaled(self, amounts: Amounts) -> LowRank:
        return self._with([Term(term.cores, scale_row(term.row, self.indices, amounts)) for term in self.terms])

    def _with(
        self, terms: list[Term], left: Factor | SummedDraws | None = None, right: Factor | SummedDraws | None = None
    ) -> LowRank:
        """The same weights, which were checked, with other terms and factors of the same rank."""
        other = copy.copy(self)
        other.terms, other.factors = terms, (left or self.factors[0], right or self.factors[1])
        return other

    def plus(self, other: Part) -> LowRank | None:
        """Parts that share both factors add their cores; parts without cores that share one add the other factor."""
        if not isinstance(other, LowRank) or self.indices != other.indices or self.shapes != other.shapes:
            return None
        same_left, same_right = (a.identity() == b.identity() for a, b in zip(self.factors, other.factors, strict=True))
        if same_left and same_right and self.rank == other.rank:
            return self._with(_added(self.terms, other.terms))
        bare = self._has_no_core() and other._has_no_core()
        if self.rank != other.rank or not (same_left or same_right) or not bare:
            return None
        ones = [Term(None, [1.0] * len(self.weights))]
        if same_right:
            return self._with(ones, left=self._sum_of(other, 0))
        return self._with(ones, right=self._sum_of(other, 1))

    def _has_no_core(self) -> bool:
        return all(term.cores is None for term in self.terms)

    def _sum_of(self, other: LowRank, side: int) -> Factor | SummedDraws:
        """A factor of each, times what multiplies its A B^T, summed."""
        own, its = (part._draws(side) for part in (self, other))
        if own is not None and its is not None:
            return SummedDraws(self.weights, side, self.rank, [*own, *its])
        moved = []
        for part in (self, other):
            factors = _drawn_now(part.factors[side]).materialised(self.weights, side)
            rows = part._coefficient()
            unchanged = all(row == 1.0 for row in rows)  # as in a sum of parts
            moved.append(factors if unchanged else torch._foreach_mul(factors, rows))
        return Factor.stored(torch._foreach_add(*moved))

    def condensed(self) -> LowRank:
        """The same with coefficient 1: multiplied into one core of each weight, or into A where there is none."""
        ones = [1.0] * len(self.weights)
        if not self._has_no_core():
            return self._with([Term(self._cores(), ones)])
        return self._with([Term(None, ones)], left=Factor.stored(self._mixed_left()))

    @property
    def core_bytes(self) -> int:
        held = self.left.tensors or [] if self._has_no_core() else [c for term in self.terms for c in term.cores or ()]
        return sum(t.nbytes for t in held)

    def _core_stack(self) -> Tensor | None:
        """sum_j c_j C_j of all weights in one tensor, if the C_j are."""
        stacks = [stack for term in self.terms if (stack := stack_of(term.cores or ())) is not None]
        if len(stacks) < len(self.terms) or any(stack.dim() != 3 for stack in stacks):
            return None
        products = [stack * _column(term.row, stack) for stack, term in zip(stacks, self.terms, strict=True)]
        return functools.reduce(Tensor.add_, products)

    def _cores(self) -> list[Tensor]:
        """sum_j c_j C_j, float32 (r, r)."""
        stack = self._core_stack()
        if stack is not None:
            return list(stack.unbind())
        total: list[Tensor] = []
        for term in self.terms:
            cores = term.cores
            if cores is None:
                device = self.weights[0].tensor.device
                cores = [torch.eye(self.rank, dtype=torch.float32, device=device)] * len(self.weights)
            elif cores[0].dim() == 1:
                cores = [core.diag() for core in cores]
            moved = torch._foreach_mul(list(cores), list(term.row))
            if total:
                torch._foreach_add_(total, moved)
            else:
                total = list(moved)
        return total

    def _mixed_left(self) -> list[Tensor]:
        """sum_j c_j A C_j."""
        left = [a.float() for a in self.left.materialised(self.weights, 0)]
        if not self._has_no_core():
            return [a @ core for a, core in zip(left, self._cores(), strict=True)]
        return list(torch._foreach_mul(left, self._coefficient()))

    def apply(self, tensors: list[Tensor], **options: Any) -> None:
        if len(self.terms) == 1:
            core, coefficient = self.terms[0].cores, scalar_if_equal(self.terms[0].row)
        else:
            core, coefficient = self._cores(), 1.0
        if self.shapes is not None:
            tensors = self._viewed(tensors)
            if options.get("out") is not None:
                options["out"] = self._viewed(options["out"])
        ops.lowrank_perturb_(
            tensors,
            self.left.argument(),
            self.right.argument(),
            core=None if core is None else list(core),
            coefficient=coefficient,
            rank=self.rank,
            tensor_ids=self.ids,
            slices=self.slices,
            **options,
        )

    def _viewed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.view(shape) for t, shape in zip(tensors, self.shapes or (), strict=True)]

    def select(self, chosen: Sequence[int], tensors: Sequence[Tensor] | None = None) -> LowRank:
        terms = [Term(t.cores and pick(t.cores, chosen), pick(t.row, chosen)) for t in self.terms]
        shapes = self.shapes and pick(self.shapes, chosen)
        weights = self._chosen(chosen, tensors)
        return LowRank(weights, self.left.select(chosen), self.right.select(chosen), terms, shapes)

    def layout(self) -> Hashable:
        drawn = self.left.tensors is None, self.right.tensors is None
        return "lowrank", self.indices, self.rank, *drawn, self._has_no_core(), tuple(self.shapes or ())

    def operands(self) -> LowRankOperands:
        return LowRankOperands(self)


def _drawn_now(factor: Factor | SummedDraws) -> Factor:
    return factor.stored if isinstance(factor, SummedDraws) else factor


def product_of_draws(weights: Sequence[Weight], left: int, right: int, rank: int) -> LowRank:
    """A B^T / sqrt(r) with A and B drawn from their keys: its elements have variance 1, as those of dense noise."""
    row = [1.0 / math.sqrt(rank)] * len(weights)
    return LowRank(weights, Factor.drawn(left, rank), Factor.drawn(right, rank), [Term(None, row)])


def concatenated(parts: Iterable[Part]) -> list[Part]:
    """The parts, low-rank ones of the same weights joined side by side, so that one pass writes them all:

        sum_i A_i C_i B_i^T  =  [A_1 C_1, A_2 C_2, ..] [B_1, B_2, ..]^T

    Up to the rank that a pass takes; drawn factors are drawn now, (m + n) r floats of a matrix and part.
    """
    found: list[list[Part]] = []
    for part in parts:
        group = next((group for group in found if _may_join([*group, part])), None)
        if group is None:
            found.append([part])
        else:
            group.append(part)
    return [_side_by_side(group) if len(group) > 1 else group[0] for group in found]


def _may_join(parts: Sequence[Part]) -> bool:
    if any(part.indices != parts[0].indices for part in parts):
        return False
    ranks = [part.rank for part in parts if isinstance(part, LowRank)]
    limit = min([ops.MAX_RANK, *(side for w in parts[0].weights for side in w.tensor.shape)])
    return len(ranks) == len(parts) and sum(ranks) <= limit


def _side_by_side(group: Sequence[Part]) -> LowRank:
    parts = [part for part in group if isinstance(part, LowRank)]
    first = parts[0]
    columns = zip(*(part._mixed_left() for part in parts), strict=True)
    left = Factor.stored([torch.cat(own, dim=1) for own in columns])
    columns = zip(*(part.right.materialised(part.weights, 1) for part in parts), strict=True)
    right = Factor.stored([torch.cat([b.float() for b in own], dim=1) for own in columns])
    return LowRank(first.weights, left, right, [Term(None, [1.0] * len(first.weights))], first.shapes)


def _added(terms: Sequence[Term], others: Sequence[Term]) -> list[Term]:
    """The terms of both; those with the very same cores become one."""
    total = list(terms)
    for other in others:
        for i, term in enumerate(total):
            if term.cores is other.cores:
                total[i] = Term(term.cores, add_rows(term.row, other.row))
                break
        else:
            total.append(other)
    return total


def stack_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensor that these are all slices of, in order; None if there is none. One call on it serves them all."""
    base = tensors[0]._base if tensors else None
    if base is None or base.shape != (len(tensors), *tensors[0].shape) or not base.is_contiguous():
        return None
    size, first = tensors[0].numel(), base.storage_offset()
    own = all(t._base is base and t.storage_offset() == first + i * size for i, t in enumerate(tensors))
    return base if own else None


def _column(row: Sequence[float], stack: Tensor) -> Tensor | float:
    """A coefficient for each slice, or the one of all."""
    value = scalar_if_equal(row)
    if isinstance(value, float):
        return value
    return torch.tensor(row, dtype=torch.float32, device="cpu").to(stack.device)[:, None, None]


class LowRankOperands(Operands):
    """Factors and the core of each weight of a part, its coefficients multiplied into the core if there is one.

    A drawn factor is drawn wherever it is used. Memory is kept for an A without a core if it is stored, as it may be
    another tensor in every step, and for an A whose padding row must be 0. Others are read where the method keeps them.
    """

    def __init__(self, part: LowRank) -> None:
        self.device, self.rank, count = part.weights[0].tensor.device, part.rank, len(part.weights)
        self.shapes = part.shapes
        self.coefficients = torch.ones(count, 1, dtype=torch.float32, device=self.device)
        self.keys = torch.zeros(3, dtype=torch.int64, device=self.device)
        shape = (0 if part._has_no_core() else count, part.rank, part.rank)
        self.stack = torch.empty(shape, dtype=torch.float32, device=self.device)
        self.cores = list(self.stack.unbind())
        memory = ([self._memory_for(part, side, w) for w in part.weights] for side in (0, 1))
        self.memory = [{i: m for i, m in enumerate(own) if m is not None} for own in memory]  # by position
        self.factors: list[list[Tensor | None]] = [[], []]
        self.options = [
            dict[str, Any](
                core=self.cores[i : i + 1],
                core_kind="full" if self.cores else "none",
                below=[],
                keys=self.keys,
                coefficient=coefficient,
                tensor_ids=[w.id],
                slices=list(w.span or ()),
                rank=part.rank,
            )
            for i, (w, coefficient) in enumerate(zip(part.weights, self.coefficients.unbind(), strict=True))
        ]

    @staticmethod
    def _memory_for(part: LowRank, side: int, weight: Weight) -> Tensor | None:
        stored = (part.left, part.right)[side].tensors is not None
        padded = side == 0 and weight.padding_row is not None
        if not padded and not (stored and side == 0 and part._has_no_core()):
            return None
        shape = (weight.tensor.shape[side], part.rank)
        return torch.empty(shape, dtype=torch.float32, device=weight.tensor.device)

    @property
    def nbytes(self) -> int:
        held = (*self.cores, *(m for side in self.memory for m in side.values()))
        return sum(t.nbytes for t in held) + self.coefficients.nbytes + self.keys.nbytes

    def load(self, part: Part) -> None:
        assert isinstance(part, LowRank)
        sides = (part.left, part.right)
        keys = [checks.key_bits("key", side.key or 0) for side in sides]
        self.keys[:2].copy_(torch.tensor(keys, dtype=torch.int64, device="cpu"))
        for side, factor in enumerate(sides):
            own: list[Tensor | None] = [None] * len(part.weights) if factor.tensors is None else [*factor.tensors]
            for i, memory in self.memory[side].items():
                w = part.weights[i]
                own[i] = memory.copy_(factor.select([i]).materialised([w], side)[0])
                if w.padding_row is not None:
                    memory[w.padding_row] = 0.0
            self.factors[side] = own
        if self.cores:
            stack = part._core_stack()
            if stack is None:
                torch._foreach_copy_(self.cores, part._cores())
            else:
                self.stack.copy_(stack)
        else:
            self.coefficients.copy_(torch.tensor(part._coefficient(), dtype=torch.float32, device="cpu")[:, None])

    def fill(self, position: int, tensor: Tensor, out: Tensor, decay: Tensor) -> None:
        left, right = ([f] if (f := side[position]) is not None else [] for side in self.factors)
        options = self.options[position]
        if self.shapes is not None:
            tensor, out = tensor.view(self.shapes[position]), out.view(self.shapes[position])
        ops.write_into("lowrank_perturb_", [tensor], [out], left=left, right=right, decay=decay[0], **options)

    def fold(self, position: int) -> Fold:
        left, right = (side[position] for side in self.factors)
        core = self.cores[position] if self.cores else None
        return Fold(left, right, core, self.coefficients[position], self.keys[:2], self.rank)

    def outside(self) -> Sequence[Tensor | None]:
        return [t for side in self.factors for t in side]
