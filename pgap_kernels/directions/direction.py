"""A direction is a vector over the weights: parts that add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .part import Part
from .weight import Amounts


class Direction:
    """An immutable vector of parts. ``W + eps * sum_j c_j D_j`` is a point like any other.

    Parts that one pass can make are merged into one. Other parts that share a weight take a pass each, in order.
    """

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self.parts = tuple(parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def scaled(self, amounts: Amounts) -> Direction:
        """This direction times the amount of each weight."""
        check_amounts(amounts)
        return Direction([part.scaled(amounts) for part in self.parts])

    @staticmethod
    def sum(terms: Sequence[tuple[Direction, Amounts]]) -> Direction:
        """The sum of amount * direction, in the order of the terms."""
        for _, amounts in terms:
            check_amounts(amounts)
        return add_parts(part.scaled(amounts) for direction, amounts in terms for part in direction)


def check_amounts(amounts: Amounts) -> None:
    """Raise TypeError if somebody gives one number for all weights."""
    if isinstance(amounts, (int, float)):
        raise TypeError(
            f"amounts: got {amounts!r}; accepted: a number for each weight, as in self.radius(), self.rates() or "
            "self.descent(slope)"
        )


def add_parts(parts: Iterator[Part] | Sequence[Part]) -> Direction:
    """The sum of parts: each is merged into the first earlier part that one pass can make together with it."""
    total: list[Part] = []
    for part in parts:
        for i, before in enumerate(total):
            both = before.plus(part)
            if both is not None:
                total[i] = both
                break
        else:
            total.append(part)
    return Direction(total)
