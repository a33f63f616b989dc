"""Who reads a model's weights between steps finds all that was learnt in them: what is pending is merged first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import distributed, nn

from .step_context import outside_ambient_state, uninterrupted

# Methods of adapter layers and their models, as PEFT names them, that read the adapters' weights without a forward.
_ADAPTER_LAYER = ("merge", "get_delta_weight", "unload")
_ADAPTER_MODEL = ("merge_adapter", "merge_and_unload", "unload", "add_weighted_adapter")


class Pending(Protocol):
    """What may have something to merge."""

    @property
    def pending(self) -> bool: ...

    def refuse_inside_forward(self, call: str) -> None: ...

    def merge(self) -> None: ...


def in_several_processes() -> bool:
    """Whether this process is one of several that torch.distributed has joined."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def merge_for(client: Pending, call: str) -> None:
    """Merge because ``call`` reads the weights.

    Raises:
        RuntimeError: in a closure; or in one of several processes, whose weights would differ from then on.
    """
    if client.pending:
        client.refuse_inside_forward(call)
        if in_several_processes():
            raise RuntimeError(
                f"{call}: some updates or perturbations are not in the weights yet, and to write them rounds, so that "
                "this process's weights would differ from the others'; accepted: after merge() of the optimizer, "
                "called in every process"
            )
    with outside_ambient_state(), uninterrupted():
        client.merge()


class MergeFirst:
    """A hook that merges; a class, so that models with hooks can be copied and pickled."""

    def __init__(self, client: Pending, call: str = "state_dict") -> None:
        self.client, self.call = client, call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        merge_for(self.client, self.call)


class _Method:
    """Stands for a method of one module, and merges before it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.clients: list[Pending] = []  # each has other weights of the model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for client in self.clients:
            merge_for(client, self.name)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class AdapterReaders:
    """The methods of a model's adapters that read weights, each standing behind a merge; nothing of PEFT is imported.

    ``state_dict`` and forwards have hooks of their own.
    """

    def __init__(self, modules: Iterable[nn.Module], client: Pending) -> None:
        self.client = client
        self.methods: list[_Method] = []
        for module in modules:
            is_layer, is_model = (hasattr(type(module), name) for name in ("get_base_layer", "merge_and_unload"))
            for name in [*_ADAPTER_LAYER * is_layer, *_ADAPTER_MODEL * is_model]:
                if hasattr(type(module), name):
                    method = module.__dict__.setdefault(name, _Method(module, name))
                    method.clients.append(client)
                    self.methods.append(method)

    def remove(self) -> None:
        for method in self.methods:
            method.clients.remove(self.client)
            if not method.clients:
                del method.module.__dict__[method.name]
        self.methods = []
