"""The optimizer's state_dict: PyTorch's, state of each weight in its own dtype, and a header that guards the stream."""

from __future__ import annotations

import numbers
from itertools import chain
from typing import Any

from torch import Tensor

from ..noise import CONTRACT_VERSION, canonical_name
from .mode import ModeOptimizer

FORMAT = 3  # 1 kept the method's state in the header, 2 what some methods have counted in other ways


def header(optimizer: ModeOptimizer) -> dict[str, Any]:
    """The entry "zo": all that determines the stream, and the method's plain attributes."""
    residual = optimizer.perturbation.residual
    return {
        "format": FORMAT,
        "contract_version": CONTRACT_VERSION,
        "method": optimizer.method,
        "seed": optimizer.seed,
        "steps": optimizer.steps,
        "skipped": optimizer.skipped,
        "tensor_ids": {w.name: w.id for w in optimizer.weights()},
        "attributes": {name: getattr(optimizer, name) for name in optimizer.saved_attributes},
        "signal": optimizer.signal_rule.state(),
        "residual": None if residual is None else residual.planes,
    }


def with_plain_numbers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """NumPy's numbers, which a scheduler may have left in the param groups, as Python's: ``torch.load`` takes those."""
    for group in state_dict["param_groups"]:
        for name, value in group.items():
            if isinstance(value, numbers.Number) and hasattr(value, "item"):
                group[name] = value.item()
    return state_dict


def check(optimizer: ModeOptimizer, state_dict: dict[str, Any]) -> None:
    """Refuse a state_dict that would not continue the run; nothing has been loaded yet.

    Raises:
        ValueError: with the reason.
    """
    zo = state_dict.get("zo")
    if zo is None:
        raise ValueError("state_dict: got one without the entry 'zo'; accepted: the state of a ZOOptimizer")
    if zo.get("format") != FORMAT:
        raise ValueError(
            f"state_dict: got format {zo.get('format', 1)}, of another version of this package, which kept the state "
            f"of methods otherwise; accepted: format {FORMAT}. Finish that run with the version that began it, or "
            "start from its weights"
        )
    if zo["method"] != optimizer.method:
        raise ValueError(
            f"state_dict: got that of the method {zo['method']}; accepted: that of {optimizer.method}. To go on with "
            "another method, load the weights alone"
        )
    if zo["contract_version"] != CONTRACT_VERSION:
        raise ValueError(
            f"state_dict: got noise of version {zo['contract_version']} (docs/noise_v1.md); accepted: "
            f"{CONTRACT_VERSION}, as other noise would not continue the run. Finish it with the version of this "
            "package that began it, or start from its weights"
        )
    saved, own = (_names(groups) for groups in (state_dict["param_groups"], optimizer.param_groups))
    if saved != own:
        raise ValueError(f"state_dict: got parameters {saved}; accepted: those of this optimizer in their order, {own}")
    ids = {w.name: w.id for w in optimizer.weights()}
    moved = sorted(name for name, tid in zo["tensor_ids"].items() if ids.get(name, tid) != tid)
    if moved:
        name = moved[0]
        raise ValueError(
            f"state_dict: {name!r} had the tensor id {zo['tensor_ids'][name]}; accepted: {ids.get(name)}, as in "
            "this optimizer (tensor_ids=): another stream would not continue the run"
        )
    if (zo.get("residual") is not None) != optimizer.residual:
        raise ValueError(
            f"residual: got {optimizer.residual}; accepted: {not optimizer.residual}, as in the optimizer whose "
            "state_dict this is"
        )
    weight_of = {id(w.tensor): w for w in optimizer.weights()}
    for tensor, state in _states(optimizer, state_dict):
        if id(tensor) in weight_of:
            optimizer.check_state(weight_of[id(tensor)], state)


def load(optimizer: ModeOptimizer, state_dict: dict[str, Any]) -> None:
    """Take over a state_dict that was checked, all but the param groups.

    PyTorch would cast state to the dtype of its parameter and put it into new memory. Here it keeps its dtype, and the
    memory that captured graphs read.
    """
    zo = state_dict["zo"]
    optimizer.seed, optimizer.steps, optimizer.skipped = zo["seed"], zo["steps"], zo["skipped"]
    for name, value in zo["attributes"].items():
        setattr(optimizer, name, value)
    optimizer.signal_rule.load(zo.get("signal", {}))
    for tensor, state in _states(optimizer, state_dict):
        own = optimizer.state[tensor]
        for name in [name for name in own if name not in state]:
            del own[name]
        for name, value in state.items():
            keep_memory(own, name, value.to(tensor.device) if isinstance(value, Tensor) else value)
        if not own:
            del optimizer.state[tensor]
    residual = optimizer.perturbation.residual
    if residual is not None:
        residual.load(zo["residual"])


def keep_memory(state: dict[str, Any], name: str, value: Any) -> None:
    """Set an entry of a weight's state; a tensor goes into the memory of the one before, if it fits there."""
    before = state.get(name)
    if not isinstance(value, Tensor):
        state[name] = value
    elif isinstance(before, Tensor) and _kind(before) == _kind(value):
        before.copy_(value)
    else:
        state[name] = value.detach().clone()


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _states(optimizer: ModeOptimizer, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter of the optimizer and what a state_dict has for it."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(tensor, state_dict["state"].get(number, {})) for number, tensor in zip(saved, own, strict=True)]


def _names(groups: list[dict[str, Any]]) -> list[list[str] | None]:
    given = [group.get("param_names") for group in groups]
    return [names and list(map(canonical_name, names)) for names in given]
