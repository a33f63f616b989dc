"""A pass is a value: what was or will be done to some weights, once. It can be run, undone and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from .blend import Blend
from .part import Part
from .weight import Weight, scalar_if_equal


@dataclass(frozen=True)
class Pass:
    """W <- round((1 - d) W + part), one op call.

    Attributes:
        part: what is added, coefficients included.
        decay: d of each weight of the part.
        rounding_key: key of stochastic rounding of 16-bit weights; None rounds to nearest.
    """

    part: Part
    decay: Sequence[float] = ()
    rounding_key: int | None = None
    reversible: ClassVar[bool] = True

    @property
    def weights(self) -> list[Weight]:
        """The weights that are written."""
        return self.part.weights

    @property
    def written(self) -> list[Tensor]:
        """Every tensor that is written."""
        return self.part.tensors

    @property
    def options(self) -> dict[str, Any]:
        """The op's options for decay and rounding."""
        decay = list(self.decay) if any(self.decay) else 0.0
        if self.rounding_key is None or self.weights[0].tensor.dtype == torch.float32:
            return {"decay": decay}
        return {"decay": decay, "rounding": "stochastic", "rounding_key": self.rounding_key}

    def run(self) -> None:
        """Write the weights. An op that raises has written nothing."""
        with_padding_kept(self.weights, self.part.tensors, lambda: self.part.apply(self.part.tensors, **self.options))

    def inverse(self) -> Pass | None:
        """The pass that takes the weights back, up to rounding; None if there is none."""
        keep = [1.0 - d for d in self.decay or [0.0] * len(self.weights)]
        back = {w.index: -1.0 / k for w, k in zip(self.weights, keep, strict=True)}
        return Pass(self.part.reverted(back), [1.0 - 1.0 / k for k in keep])

    def is_empty(self) -> bool:
        """Whether it would leave every weight as it is."""
        return not any(self.decay) and self.part.is_zero()


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass whose update depends on state that it reads and writes: momentum, second moments, curvature.

    ``part`` is the gradient estimate  sum_j c_j z_j;  ``restore`` undoes the perturbation that is still in the weights.
    There is no inverse: to undo the pass, copies are needed.
    """

    reversible: ClassVar[bool] = False
    rule: ops.Rule | None = None
    state: Sequence[Sequence[Tensor]] = field(default_factory=tuple)
    restore: Part | None = None

    @property
    def written(self) -> list[Tensor]:
        return [*self.part.tensors, *(t for tensors in self.state for t in tensors)]

    def run(self) -> None:
        part = self.part
        rule, draws, restored = self._arguments()

        def update() -> None:
            ops.preconditioned_update_(
                part.tensors,
                [list(tensors) for tensors in self.state],
                [(key, scalar_if_equal(row)) for key, row in draws.items()],
                rule,
                restore=[scalar_if_equal(row) for row in restored],
                tensor_ids=part.ids,
                slices=part.slices,
                **self.options,
            )

        with_padding_kept(part.weights, part.tensors, update)

    def _arguments(self) -> tuple[ops.Rule, dict[int, Sequence[float]], list[Sequence[float]]]:
        """The rule, the coefficients of the gradient estimate by key, and those of what it takes off."""
        draws, rule = self.part.plain_draws(), self.rule
        back: Mapping[int, Sequence[float]] | None = {}
        if isinstance(self.restore, Blend):
            back = {}
        elif self.restore is not None and isinstance(rule, ops.HiZOORule):
            back = self.restore.draws_over(self.state[0])
        elif self.restore is not None:
            back = self.restore.plain_draws()
        if rule is None or draws is None or back is None:
            raise ValueError(
                f"rule: got {type(rule).__name__} with a {type(self.part).__name__}; accepted: plain dense noise"
            )
        zero: Sequence[float] = [0.0] * len(self.part.weights)
        if isinstance(rule, ops.AdaMURule):  # its draws stay apart, and it takes off multiples of its own m
            (first, second), rows = draws, list(draws.values())
            factors = self.restore.factors if isinstance(self.restore, Blend) else zero
            return replace(rule, back=list(factors)), {first: rows[0], second: zero}, [zero, rows[1]]
        keys = list({**draws, **back})
        return rule, {key: draws.get(key, zero) for key in keys}, [back.get(key, zero) for key in keys]

    def inverse(self) -> None:
        return None

    def is_empty(self) -> bool:
        return False  # state changes even if the gradient estimate is 0


def with_padding_kept(weights: Sequence[Weight], written: Sequence[Tensor], write: Callable[[], None]) -> None:
    """Run a write, then restore the padding rows, which the op does not know of."""
    if all(w.padding_row is None for w in weights):
        write()
        return
    rows = [
        (out[w.padding_row], w.tensor[w.padding_row].clone())
        for w, out in zip(weights, written, strict=True)
        if w.padding_row is not None
    ]
    write()
    with write_context([row for row, _ in rows]):
        for row, before in rows:
            row.copy_(before)


def write_context(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager:
    """The context in which torch may write tensors: those made in inference mode only inside of it."""
    inside = any(t.is_inference() for t in tensors)
    return torch.inference_mode() if inside else contextlib.nullcontext()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Their size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def smallest_first(passes: Sequence[Pass]) -> list[Pass]:
    """The passes in order of the bytes they write; of two that write the same tensor, the earlier one stays first."""
    if len(passes) < 2:
        return list(passes)
    turns: list[int] = []
    last: dict[int, int] = {}  # by tensor, the turn of its last pass
    for p in passes:
        turns.append(1 + max((last.get(id(t), -1) for t in p.written), default=-1))
        last |= {id(t): turns[-1] for t in p.written}
    order = sorted(range(len(passes)), key=lambda i: (turns[i], bytes_of(passes[i].written)))
    return [passes[i] for i in order]


def run_all_or_none(passes: Sequence[Pass], run: Callable[[Pass], None], copy_budget: int) -> None:
    """Run every pass, or none: if one raises, those before it are undone and the exception propagates.

    Passes run smallest first, those that share a tensor in their order. Up to ``copy_budget`` bytes of what they write
    are copied first, so that undoing them is exact to the bit. Beyond that they are undone arithmetically, exact to
    rounding; those without an inverse are copied whatever the budget. The last pass needs neither: an op that raises
    has written nothing.
    """
    done: list[tuple[Pass, list[Tensor] | None]] = []
    ordered = smallest_first(passes)
    try:
        for p in ordered:
            copies = None
            if p is not ordered[-1]:
                size = bytes_of(p.written)
                if size <= copy_budget or not p.reversible:
                    copies = [t.clone() for t in p.written]
                    copy_budget -= size
            run(p)
            done.append((p, copies))
    except BaseException:
        for p, copies in reversed(done):
            inverse = p.inverse()
            if copies is not None:
                with write_context(p.written):
                    torch._foreach_copy_(p.written, copies)
            elif inverse is not None:
                run(inverse)
        raise
