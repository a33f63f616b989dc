"""Which parameters of a model are tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import UserError


def choose(model: Any, tune: Sequence[str]) -> dict[str, nn.Parameter]:
    """Leave only the chosen parameters trainable, and return them.

    Args:
        model: a transformers model.
        tune: ["linear"] for the linear layers inside the decoder and the stacked matrices of its experts, so that
            embeddings, norms and the head stay as they are; ["all"]; or patterns of parameter names, in which ``*``
            stands for anything.

    Raises:
        UserError: nothing is chosen, or a pattern matches no parameter.
    """
    names = {name for name, _ in model.named_parameters()}
    if list(tune) == ["all"]:
        chosen = names
    elif list(tune) == ["linear"]:
        chosen = set(_linear(model))
        if not chosen:
            raise UserError("--model: has no linear layers in its decoder; accepted: a model that has some, or --tune")
    else:
        chosen = set()
        for pattern in tune:
            found = {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                _refuse_tied(model, pattern)
                parts = {part for name in names for part in name.split(".")}
                near = ", ".join(get_close_matches(pattern.strip("*."), parts, 3))
                raise UserError(
                    f"--tune: {pattern!r} matches no parameter; accepted: 'linear', 'all', or patterns such as "
                    f"'*q_proj*'{f'; near it: {near}' if near else ''}"
                )
            chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return tuned_parameters(model)


def _refuse_tied(model: Any, pattern: str) -> None:
    """Refuse a pattern that matches only another name of a parameter.

    Raises:
        UserError: it does.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if fnmatchcase(name, pattern):
            raise UserError(f"--tune: {pattern!r} matches {name!r}, which is tied; accepted: {own[id(parameter)]!r}")


def _linear(model: Any) -> Iterator[str]:
    head = model.get_output_embeddings()
    inside = {id(module) for module in model.base_model.modules()}
    for prefix, module in model.named_modules():
        if id(module) not in inside or module is head:
            continue
        linear = isinstance(module, (nn.Linear, Conv1D))
        if isinstance(module, nn.Conv1d):  # of three dimensions, too, and no stack of matrices
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # Experts are stacks of matrices, in no module of their own each.
            if linear or parameter.dim() == 3:
                yield f"{prefix}.{name}" if prefix else name


def tuned_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
