"""Collects an optimizer's weights from its param groups, and notices when the model has changed since."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import checks, noise
from ..directions import Weight, address, storage
from ..perturbation import modules_of


def collect(
    param_groups: Sequence[dict[str, Any]],
    ids: Mapping[str, int],
    model: nn.Module | None,
    read_by: Mapping[str, str] | None = None,
) -> list[Weight]:
    """Every trainable tensor once: tied weights under their first name, frozen ones left out, ids checked.

    Args:
        param_groups: of a ``torch.optim.Optimizer``.
        ids: overrides of ``noise.tensor_id`` by parameter name.
        model: whose embeddings' padding rows stay as they are, if it is given.
        read_by: of parameters of the model, the module whose forward reads them.

    Raises:
        TypeError, ValueError: a parameter cannot be trained here; the message names it.
    """
    padding, aliases = padding_rows(model), names_at(param_groups, model)
    found: dict[Hashable, Weight] = {}
    names: dict[int, str] = {}
    position = 0
    for group in param_groups:
        given = group.get("param_names")
        for i, tensor in enumerate(group["params"]):
            called = given[i] if given is not None else str(position)
            name = noise.canonical_name(called)
            position += 1
            if is_frozen(tensor):
                continue
            _check_storage(called, tensor)
            place = address(tensor) if tensor.numel() else name
            if place in found:
                continue  # tied: the same storage under another name
            tid = noise.check_uint(f"tensor_ids[{name!r}]", ids.get(name, noise.tensor_id(name)), 32)
            if tid in names:
                raise ValueError(
                    f"tensor_ids: {names[tid]!r} and {name!r} have the same id {tid:#010x}; give one of them "
                    "another with tensor_ids={name: id}"
                )
            names[tid] = name
            others = tuple(alias for alias in aliases[place] if alias != name) if place in aliases else ()
            row = padding.get(tensor.data_ptr())
            found[place] = Weight(len(found), name, tensor, tid, group, None, row, others, read_by or {})
    weights = list(found.values())
    for w in weights:
        checks.matrix_layout(f"params ({w.name!r})", w.tensor)
    for device in {w.tensor.device for w in weights}:
        _refuse_overlaps([w for w in weights if w.tensor.device == device])
    return weights


def _refuse_overlaps(weights: Sequence[Weight]) -> None:
    try:
        checks.disjoint({"params": [w.tensor for w in weights]})
    except ValueError:
        for a, b in itertools.combinations(weights, 2):
            if storage(a.tensor) != storage(b.tensor):
                continue
            try:
                checks.disjoint({"params": [a.tensor, b.tensor]})
            except ValueError:
                raise ValueError(
                    f"params: {a.name!r} and {b.name!r} share some of their elements; accepted: weights that share "
                    "all of them (tied) or none"
                ) from None
        raise


def names_at(param_groups: Sequence[dict[str, Any]], model: nn.Module | None) -> dict[Hashable, list[str]]:
    """Every name of the parameters at an address: tied ones have several."""
    names: dict[Hashable, dict[str, None]] = {}
    pairs = [
        pair for group in param_groups for pair in zip(group.get("param_names") or (), group["params"], strict=False)
    ]
    if model is not None:
        pairs += model.named_parameters(remove_duplicate=False)
    for name, p in pairs:
        names.setdefault(address(p), {})[noise.canonical_name(name)] = None
    return {place: list(found) for place, found in names.items() if place is not None}


def is_frozen(tensor: Tensor) -> bool:
    """Whether torch's training leaves a parameter alone; plain tensors are trained whatever their flag."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _check_storage(name: str, tensor: Tensor) -> None:
    if "_flat_param" in name or "_fsdp_wrapped_module" in name:
        raise ValueError(
            f"params: got {name!r}, of a model in FullyShardedDataParallel, whose forwards read gathered copies; "
            "accepted: whole tensors of this process. Train the model unsharded"
        )
    if hasattr(tensor, "to_local") and hasattr(tensor, "placements"):
        raise ValueError(
            f"params: got a DTensor, {name!r}, sharded over {tensor.placements}; accepted: whole tensors of this "
            "process. Train the model unsharded"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"params: got {name!r}, a {type(tensor).__name__}, which wraps other tensors (quantised, for example); "
            "accepted: plain tensors. Freeze it (requires_grad_(False)) or replace it by a plain one"
        )
    if is_lazy(tensor):
        raise ValueError(
            f"params: got {name!r} of a lazy module, without a shape yet; accepted: weights in memory. Run a forward "
            "first"
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"params: got {name!r} on the meta device, without values here (not loaded yet, or offloaded to CPU or "
            "disk); accepted: weights in memory. Load the model first, without offloading"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"params: got {name!r} with layout {layout}; accepted: dense tensors (torch.strided)")
    if tensor.dtype not in checks.WEIGHT_DTYPES:
        accepted = ", ".join(map(str, checks.WEIGHT_DTYPES))
        raise TypeError(f"params: got {name!r} with dtype {tensor.dtype}; accepted: {accepted}")


def padding_rows(model: nn.Module | None) -> dict[int, int]:
    """Rows of embeddings that training leaves alone, by the address of the weight.

    As in torch, they are trained all the same where another layer shares the weight (a tied head).
    """
    rows: dict[int, int | None] = {}
    for module in modules_of(model):
        for name, p in module._parameters.items():
            if p is None or address(p) is None or not p.numel():
                continue
            embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name == "weight"
            row = cast("int | None", module.padding_idx) if embeds else None
            rows[p.data_ptr()] = row if rows.get(p.data_ptr(), row) == row else None
    return {place: row for place, row in rows.items() if row is not None}


class Kind(NamedTuple):
    """What a weight is, wherever it lies."""

    name: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    is_of_model: bool


class ModelSnapshot:
    """What a step depends on and others may change, as it was: compared before each step.

    Attributes:
        parameters: a fingerprint of those that are trained.
        modules: of the model.
        ours: ids of the optimizer's parameters.
        owners: where the modules have them: a dict, the key in it, the parameter.
        kinds: dtype, device and shape of each weight, by the id of its tensor.
    """

    def __init__(self, param_groups: Sequence[dict[str, Any]], model: nn.Module | None, weights: Sequence[Weight]):
        self.parameters = fingerprint(param_groups)
        self.modules = modules_of(model)
        ours = {id(p) for group in param_groups for p in group["params"]}
        self.owners = [
            (module._parameters, name, p)
            for module in self.modules
            if isinstance(module._parameters, dict)  # scripted modules have something else
            for name, p in module._parameters.items()
            if id(p) in ours
        ]
        self.ours = ours
        self.kinds = {id(w.tensor): (w.tensor.dtype, w.tensor.device, w.tensor.shape) for w in weights}

    def is_current(self, param_groups: Sequence[dict[str, Any]], model: nn.Module | None) -> bool:
        """Whether nothing has changed."""
        return (
            fingerprint(param_groups) == self.parameters
            and modules_of(model) == self.modules
            and all(owner.get(name) is p for owner, name, p in self.owners)
            and self._count_owners() == len(self.owners)  # a weight may have been tied to one more
        )

    def _count_owners(self) -> int:
        """How many places in modules have one of the optimizer's parameters now."""
        tables = (module._parameters for module in self.modules if isinstance(module._parameters, dict))
        return sum(id(p) in self.ours for table in tables for p in table.values())

    def check_weights_remain(self, weights: Sequence[Weight], model: nn.Module | None) -> None:
        """Raise RuntimeError if the model had a weight that it has no more: nothing would come of training it."""
        had = {id(p) for _, _, p in self.owners}
        has = {id(p) for module in modules_of(model) for p in module._parameters.values()}
        for w in weights:
            if id(w.tensor) in had - has:
                raise RuntimeError(
                    f"model: {w.name!r} is not one of its parameters any more, but was replaced (as by "
                    "load_state_dict(assign=True), resize_token_embeddings, weight_norm, sharding or offloading) or "
                    "removed; accepted: the Parameter objects that the optimizer was made with. Make a new optimizer"
                )


def fingerprint(param_groups: Sequence[dict[str, Any]]) -> list[tuple[int, list[tuple]]]:
    """Dtype, device, place and shape of the parameters that are trained, by group."""
    try:
        return [(id(group), [_place(p) for p in group["params"]]) for group in param_groups]
    except (RuntimeError, ValueError):  # one has become a tensor without memory, which ``collect`` refuses by name
        return []


def _place(p: Tensor) -> tuple:
    return () if is_frozen(p) else (p.dtype, p.device, p.data_ptr(), p.shape)
