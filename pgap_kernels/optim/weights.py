"""Collects an optimizer's weights from its param groups, and notices when the model has changed since."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from .. import checks, noise
from ..directions import Weight, bucket

_FLAGS = attrgetter("requires_grad", "dtype", "device", "shape")


def collect(param_groups: Sequence[dict[str, Any]], ids: Mapping[str, int], model: nn.Module | None) -> list[Weight]:
    """Every trainable tensor once: tied weights under their first name, frozen ones left out, ids checked.

    Args:
        param_groups: of a ``torch.optim.Optimizer``.
        ids: overrides of ``noise.tensor_id`` by parameter name.
        model: whose embeddings' padding rows stay as they are, if it is given.

    Raises:
        TypeError, ValueError: a parameter cannot be trained here; the message names it.
    """
    padding = padding_rows(model)
    found: dict[Hashable, Weight] = {}
    names: dict[int, str] = {}
    position = 0
    for group in param_groups:
        given = group.get("param_names")
        if given is None:
            warnings.warn(
                "params: parameters without names get their flat index as name, so their noise depends on their "
                "order; pass the model or model.named_parameters()",
                stacklevel=4,
            )
        for i, tensor in enumerate(group["params"]):
            name = noise.canonical_name(given[i]) if given is not None else str(position)
            position += 1
            if is_frozen(tensor):
                continue
            _check_storage(name, tensor)
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            if place in found:
                continue  # tied: the same storage under another name
            tid = noise.check_uint(f"tensor_ids[{name!r}]", ids.get(name, noise.tensor_id(name)), 32)
            if tid in names:
                raise ValueError(
                    f"tensor_ids: {names[tid]!r} and {name!r} have the same id {tid:#010x}; give one of them "
                    "another with tensor_ids={name: id}"
                )
            names[tid] = name
            found[place] = Weight(len(found), name, tensor, tid, group, padding_row=padding.get(tensor.data_ptr()))
    weights = list(found.values())
    for same_kind in bucket(weights):
        tensors = checks.tensors(f"params ({same_kind[0].name!r})", [w.tensor for w in same_kind])
        for w in same_kind:
            checks.matrix_layout(f"params ({w.name!r})", w.tensor)
        checks.disjoint("params", tensors)
    return weights


def is_frozen(tensor: Tensor) -> bool:
    """Whether torch's training leaves a parameter alone; plain tensors are trained whatever their flag."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _check_storage(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "to_local") and hasattr(tensor, "placements"):
        raise ValueError(
            f"params: got a DTensor, {name!r}, sharded over {tensor.placements}; accepted: whole tensors of this "
            "process. Make the optimizer before the model is sharded, or train it unsharded"
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"params: got {name!r} on the meta device, without values here (not loaded yet, or offloaded to CPU or "
            "disk); accepted: weights in memory. Load the model first, without offloading"
        )


def padding_rows(model: nn.Module | None) -> dict[int, int]:
    """Rows of embeddings that training leaves alone, by the address of the weight.

    As in torch, they are trained all the same where another layer shares the weight (a tied head).
    """
    rows: dict[int, int | None] = {}
    for module in model.modules() if model is not None else ():
        for name, p in module._parameters.items():
            if p is None or not p.numel() or p.device.type == "meta" or hasattr(p, "placements"):
                continue
            embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name == "weight"
            row = cast("int | None", module.padding_idx) if embeds else None
            rows[p.data_ptr()] = row if rows.get(p.data_ptr(), row) == row else None
    return {place: row for place, row in rows.items() if row is not None}


def fingerprint(param_groups: Sequence[dict[str, Any]]) -> list:
    """What a step depends on and others may change: looked at before each step."""
    params = [p for group in param_groups for p in group["params"]]
    return [*map(_FLAGS, params), *map(Tensor.data_ptr, params)]
