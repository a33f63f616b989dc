"""Which mode serves a method: asked for, or chosen by a static table, so that bits never depend on a measurement."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..directions import Weight, address
from .base import Perturbation
from .folded import Folded, foldable_weights
from .hooks import modules_of, take_over, uses_of
from .inplace import InPlace
from .scratch import Scratch

MODES = ("inplace", "scratch", "folded", "auto")
MERGES = ("step", "window")

# For float32 weights, for which every mode is exact up to rounding. Dense directions are fastest in place. Low-rank
# ones take about as long folded as in place, and write the weights least often (docs/modes.md has the figures).
_FLOAT32 = {
    ("dense", "cpu"): "inplace",
    ("dense", "cuda"): "inplace",
    ("low-rank", "cpu"): "folded",
    ("low-rank", "cuda"): "folded",
}


class Choice(NamedTuple):
    """A mode and why it was taken."""

    mode: str
    reason: str


def choose(
    mode: str, weights: Sequence[Weight], model: nn.Module | None, lowrank: Collection[int] | None, slices: int = 1
) -> Choice:
    """Choose the mode for a method.

    Args:
        mode: one of ``MODES``.
        weights: to train.
        model: the one that has them as parameters; hooks need it.
        lowrank: indices of the weights with low-rank directions; None if the method has none.
        slices: of a batch, each of which sees a point of its own.

    Raises:
        ValueError: the mode cannot serve the method, the model or a weight.
    """
    if mode != "auto":
        reason = _refusal(mode, weights, model, lowrank)
        if reason:
            raise ValueError(f"mode: got {mode!r}, but {reason}")
        return Choice(mode, "asked for")
    kind = "low-rank" if lowrank else "dense"  # also where all weights of a low-rank method are vectors, or excluded
    sixteen_bit = any(w.tensor.dtype != torch.float32 for w in weights)
    if sixteen_bit or slices > 1:
        wanted, other = "folded" if lowrank else "scratch", "scratch"
        why = "16-bit weights are not restored exactly in place" if sixteen_bit else "slices see points of their own"
    else:
        device = weights[0].tensor.device.type
        wanted, other = _FLOAT32.get((kind, device), "inplace"), "inplace"
        why = f"table of float32 modes, {kind} on {device}"
    for candidate in (wanted, other, "scratch", *(["inplace"] if slices == 1 else [])):
        reason = _refusal(candidate, weights, model, lowrank)
        if reason is None:
            return Choice(candidate, why)
        why = reason
    raise ValueError(f"mode: got 'auto', but no mode can serve: {why}")


def _refusal(
    mode: str, weights: Sequence[Weight], model: nn.Module | None, lowrank: Collection[int] | None
) -> str | None:
    """Why a mode cannot serve, or None."""
    if mode == "inplace":
        return _written_by_forward(weights, model)
    if mode == "folded" and lowrank is None:
        return "the method's directions are dense; accepted: folded for low-rank methods, scratch or inplace for others"
    if model is None:
        return "no model was given, whose modules it would hook; accepted: a model as params or model="
    try:
        uses = uses_of(model, weights)
    except ValueError as error:
        return str(error)
    for use in uses:
        if isinstance(use.module, nn.RNNBase):
            return (
                f"{weights[use.refs[0].index].name!r} belongs to the {type(use.module).__name__} {use.name!r}, whose "
                "forward reads its weights from a list of its own; accepted: modules that read their parameters. "
                "Choose mode='inplace'"
            )
    if mode == "folded" and lowrank and not foldable_weights(uses) & {*lowrank}:
        use, ref = next((use, ref) for use in uses for ref in use.refs if ref.index in lowrank)
        replaced = " (replaced on this instance, as accelerate does)" if "forward" in use.module.__dict__ else ""
        return (
            f"no low-rank direction could be folded: {weights[ref.index].name!r}, for one, belongs to a "
            f"{type(use.module).__name__}, whose forward{replaced} it does not know; accepted: some weight of an "
            "nn.Linear, nn.Embedding or Conv1D. Choose mode='scratch'"
        )
    return None


def check_options(
    mode: str,
    weights: Sequence[Weight],
    *,
    two_pass: bool,
    plans_ahead: bool,
    members: int,
    window: bool,
    residual: bool,
) -> None:
    """Refuse options of an optimizer that its mode, weights or method cannot serve.

    Raises:
        ValueError: naming the option.
    """
    if two_pass and (mode != "inplace" or not plans_ahead):
        raise ValueError(
            f"two_pass: got True with mode={mode!r}; accepted: with mode='inplace', for methods that know their first "
            "direction before a step"
        )
    if members > 1 and mode == "inplace":
        raise ValueError(
            f"members, groups: got {members} slices of a batch with mode='inplace'; accepted: 1, or mode 'scratch' or "
            "'folded', in which every slice can see another point"
        )
    if window and mode != "folded":
        raise ValueError(f"merge: got 'window' with mode={mode!r}; accepted: with mode 'folded'")
    if residual and (mode == "inplace" or all(w.tensor.dtype == torch.float32 for w in weights)):
        raise ValueError(
            f"residual: got True with mode={mode!r} and {weights[0].tensor.dtype} weights; accepted: with 16-bit "
            "weights that are not perturbed in place"
        )


def _written_by_forward(weights: Sequence[Weight], model: nn.Module | None) -> str | None:
    """Why weights could not be restored in place: embeddings with ``max_norm`` rescale theirs in every forward."""
    names = {address(w.tensor): w.name for w in weights}
    for module in modules_of(model):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            name = names.get(address(module.weight))
            if name is not None:
                return (
                    f"{name!r} is rescaled by the forwards of its {type(module).__name__} "
                    f"(max_norm={module.max_norm}), perturbed or not; accepted: weights that forwards do not write. "
                    "Choose mode='scratch'"
                )
    return None


def unfolded(weights: Sequence[Weight], model: nn.Module, lowrank: Collection[int]) -> list[str]:
    """Names of the weights with low-rank directions that mode "folded" cannot fold, so that they take the scratch."""
    foldable = foldable_weights(uses_of(model, weights))
    return [weights[index].name for index in lowrank if index not in foldable]


def build(
    choice: Choice,
    weights: Sequence[Weight],
    model: nn.Module | None,
    *,
    two_pass: bool,
    allow_unused: bool,
    defers: bool,
) -> Perturbation:
    """The object that implements a mode."""
    if choice.mode == "inplace":
        if model is not None:
            take_over(model.modules(), weights)
        strategy = InPlace(weights, two_pass)
        if two_pass and model is not None:
            strategy.watch(model)
        return strategy
    assert model is not None
    if choice.mode == "folded":
        return Folded(weights, model, allow_unused=allow_unused, defers=defers)
    return Scratch(weights, model, allow_unused=allow_unused)
