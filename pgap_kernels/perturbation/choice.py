"""Which mode serves a method: asked for, or chosen by a static table, so that bits never depend on a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .base import Perturbation
from .direction import Weight
from .folded import Folded, foldable
from .hooks import take_over, uses_of
from .inplace import InPlace
from .scratch import Scratch

MODES = ("inplace", "scratch", "folded", "auto")

# For float32 weights, where every mode is exact to rounding: what was fastest (docs/modes.md has the figures).
_FLOAT32 = {
    ("dense", "cpu"): "inplace",
    ("dense", "cuda"): "inplace",
    ("subspace", "cpu"): "folded",
    ("subspace", "cuda"): "folded",
}


class Choice(NamedTuple):
    """A mode and why it was taken."""

    mode: str
    reason: str


def choose(mode: str, weights: Sequence[Weight], model: nn.Module | None, subspace: Sequence[str] | None) -> Choice:
    """The mode for a method.

    Args:
        mode: one of ``MODES``.
        weights: to train.
        model: that has them as parameters; hooks need it.
        subspace: names of the weights with directions U Z V^T; None if the method has none.

    Raises:
        ValueError: the mode cannot serve the method, the model or a weight.
    """
    if mode != "auto":
        reason = _refusal(mode, weights, model, subspace)
        if reason:
            raise ValueError(f"mode: got {mode!r}, but {reason}")
        return Choice(mode, "asked for")
    kind = "dense" if subspace is None else "subspace"
    if any(w.tensor.dtype != torch.float32 for w in weights):
        wanted, other = "scratch" if subspace is None else "folded", "scratch"
        why = "16-bit weights are not restored exactly in place"
    else:
        device = weights[0].tensor.device.type
        wanted, other = _FLOAT32.get((kind, device), "inplace"), "inplace"
        why = f"table of float32 modes, {kind} on {device}"
    for mode in (wanted, other):
        reason = _refusal(mode, weights, model, subspace)
        if reason is None:
            return Choice(mode, why)
        why = reason
    return Choice("inplace", why)


def _refusal(
    mode: str, weights: Sequence[Weight], model: nn.Module | None, subspace: Sequence[str] | None
) -> str | None:
    """Why a mode cannot serve, or None."""
    if mode == "inplace":
        return None
    if mode == "folded" and subspace is None:
        return "the method's directions are dense; accepted: folded for U Z V^T methods, scratch or inplace for others"
    if model is None:
        return "no model was given, whose modules it would hook; accepted: a model as params or model="
    try:
        uses = uses_of(model, weights)
    except ValueError as error:
        return str(error)
    names = set(subspace or ()) if mode == "folded" else set()
    for number, w in enumerate(weights):
        why = foldable(uses, number) if w.name in names else None
        if why:
            return (
                f"{why}, whose forward it does not know; accepted: nn.Linear, nn.Embedding and Conv1D weights. Leave "
                f"{w.name!r} out with exclude=, or choose mode='scratch'"
            )
    return None


def build(
    choice: Choice,
    weights: Sequence[Weight],
    model: nn.Module | None,
    *,
    two_pass: bool,
    allow_unused: bool,
    paired: bool,
) -> Perturbation:
    """The strategy of a mode."""
    if choice.mode == "inplace":
        if model is not None:
            take_over(model.modules())
        strategy = InPlace(weights, two_pass)
        if two_pass and model is not None:
            strategy.watch(model)
        return strategy
    assert model is not None
    hooked = Folded if choice.mode == "folded" else Scratch
    return hooked(weights, model, allow_unused=allow_unused, paired=paired)
