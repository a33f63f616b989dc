"""Directions: what a method perturbs along and moves along, without how it gets there.

A direction is a list of parts that share no weight. A part is one op call's share: weights of one device and dtype,
along dense noise or in a subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops


class Weight(NamedTuple):
    """A trainable tensor with its name, its id in the noise contract and its param group."""

    name: str
    tensor: Tensor
    id: int
    group: dict[str, Any]


PerWeight = Callable[[Weight], float]


def buckets(weights: Sequence[Weight], also: Callable[[Weight], Any] = lambda _: None) -> list[list[Weight]]:
    """Weights that may share an op call: one device, dtype and value of ``also``."""
    found: dict[Any, list[Weight]] = {}
    for weight in weights:
        key = (weight.tensor.device, weight.tensor.dtype, also(weight))
        found.setdefault(key, []).append(weight)
    return list(found.values())


class Part:
    """One op call's share of a direction; ``scale`` multiplies the direction of each weight."""

    def __init__(self, weights: list[Weight], scale: list[float] | None = None) -> None:
        self.weights = weights
        self.scale = scale or [1.0] * len(weights)
        self.tensors = [w.tensor for w in weights]
        self.ids = [w.id for w in weights]

    def amounts(self, amount: PerWeight) -> list[float]:
        """Coefficient of each weight, its scale in it."""
        return [amount(w) * s for w, s in zip(self.weights, self.scale, strict=True)]

    def summable(self, other: Part) -> bool:
        """Whether one pass can move along both."""
        raise NotImplementedError

    def write(self, terms: Sequence[Term], decay: list[float], rounding: dict[str, Any]) -> None:
        """W <- W - d W + sum of terms, in one pass; every term's part is summable with this one."""
        raise NotImplementedError

    def subset(self, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Part:
        """The part of some of the weights, in other tensors."""
        raise NotImplementedError

    def _moved(self, chosen: Sequence[int], tensors: Sequence[Tensor]) -> list[Weight]:
        return [self.weights[i]._replace(tensor=t) for i, t in zip(chosen, tensors, strict=True)]


class Term(NamedTuple):
    """A part and a coefficient for each of its weights."""

    part: Part
    coefficient: list[float]


Direction = Sequence[Part]


class Dense(Part):
    """Dense normal noise z(key)."""

    def __init__(self, weights: list[Weight], key: int) -> None:
        super().__init__(weights)
        self.key = key

    def summable(self, other: Part) -> bool:
        return isinstance(other, Dense) and other.ids == self.ids

    def write(self, terms: Sequence[Term], decay: list[float], rounding: dict[str, Any]) -> None:
        total: dict[int, list[float]] = {}
        for part, coefficient in terms:
            assert isinstance(part, Dense)
            total[part.key] = _sum(total.get(part.key), coefficient)
        ops.dense_perturb_(self.tensors, list(total.items()), tensor_ids=self.ids, decay=decay, **rounding)

    def subset(self, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Dense:
        return Dense(self._moved(chosen, tensors), self.key)


class Subspace(Part):
    """scale * U Z V^T on matrices of one rank."""

    def __init__(
        self,
        weights: list[Weight],
        left: list[Tensor],
        right: list[Tensor],
        cores: list[Tensor],
        scale: list[float],
    ) -> None:
        super().__init__(weights, scale)
        for w, factor in zip(weights, left, strict=True):
            if w.tensor.dim() != 2 or factor.shape[1] > min(w.tensor.shape):
                raise ValueError(
                    f"rank: got {factor.shape[1]} for {w.name!r} of shape {tuple(w.tensor.shape)}; accepted: a matrix, "
                    "and no more than its shorter side"
                )
        self.left, self.right, self.cores = left, right, cores

    def summable(self, other: Part) -> bool:
        return isinstance(other, Subspace) and other.ids == self.ids and all(map(_same, self.left, other.left))

    def write(self, terms: Sequence[Term], decay: list[float], rounding: dict[str, Any]) -> None:
        core, coefficient = sum_of_cores(terms)
        options = {"tensor_ids": self.ids, "decay": decay, **rounding}
        ops.lowrank_perturb_(self.tensors, self.left, self.right, core=core, coefficient=coefficient, **options)

    def subset(self, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Subspace:
        left, right, cores = ([values[i] for i in chosen] for values in (self.left, self.right, self.cores))
        return Subspace(self._moved(chosen, tensors), left, right, cores, [self.scale[i] for i in chosen])


def _sum(before: list[float] | None, coefficient: list[float]) -> list[float]:
    return coefficient if before is None else [a + b for a, b in zip(before, coefficient, strict=True)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b


def sum_of_cores(terms: Sequence[Term]) -> tuple[list[Tensor], list[float] | float]:
    """(core, coefficient) of the sum of terms of one subspace: a single core stays as it is, several are added up."""
    parts: dict[int, tuple[Subspace, list[float]]] = {}
    for part, coefficient in terms:
        assert isinstance(part, Subspace)
        parts[id(part)] = (part, _sum(parts[id(part)][1] if id(part) in parts else None, coefficient))
    if len(parts) == 1:
        ((part, coefficient),) = parts.values()
        return part.cores, coefficient
    scaled = [torch._foreach_mul(part.cores, coefficient) for part, coefficient in parts.values()]
    for cores in scaled[1:]:
        torch._foreach_add_(scaled[0], cores)
    return list(scaled[0]), 1.0
