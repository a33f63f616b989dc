"""Which module uses which weight, and being there when it does: before and after each of its forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from .direction import Weight

LINEAR, CONV1D, EMBEDDING = "linear", "conv1d", "embedding"


class Place(NamedTuple):
    """A parameter of a module, and the number of its weight."""

    name: str
    weight: int
    parameter: nn.Parameter


class Use:
    """A module with the trainable parameters that are its own, not its children's."""

    def __init__(self, name: str, module: nn.Module, places: list[Place]) -> None:
        self.name, self.module, self.places = name, module, places
        self.kind = _kind(module)


def _kind(module: nn.Module) -> str | None:
    """How the module's forward uses ``weight``, for those of which a direction can be folded into the output."""
    own = module.__dict__.get("forward")
    if own is not None and not getattr(own, "transparent", False):
        return None  # replaced: nobody knows by what
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return LINEAR
    if forward is nn.Embedding.forward and module.max_norm is None:
        return EMBEDDING
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return CONV1D
    return None


def uses_of(model: nn.Module, weights: Sequence[Weight]) -> list[Use]:
    """Every module that owns one of the weights, once; tied parameters are found by their memory.

    Raises:
        ValueError: a weight is in no module of the model.
    """
    numbers = {_place(w.tensor): number for number, w in enumerate(weights)}
    uses = []
    for name, module in model.named_modules():
        places = [
            Place(key, numbers[_place(p)], p)
            for key, p in module._parameters.items()
            if p is not None and _place(p) in numbers
        ]
        if places:
            uses.append(Use(name, module, places))
    found = {place.weight for use in uses for place in use.places}
    lost = [w.name for number, w in enumerate(weights) if number not in found and w.tensor.numel()]
    if lost:
        raise ValueError(
            f"model: its modules do not have the parameter {lost[0]!r}; accepted: the model whose forward the closure "
            "runs, with every parameter to train (or mode='inplace')"
        )
    return uses


def _place(tensor: Tensor) -> tuple:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


class Visitor(Protocol):
    """Who is called before and after a module's forward, before its state is read or loaded (``merge``), and when
    another takes the model over (``release``)."""

    def enter(self, number: int) -> None: ...

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any: ...

    def merge(self) -> None: ...

    def release(self) -> None: ...


class _Before:
    """A forward pre-hook; a class of its own, so that models with hooks can be copied and pickled."""

    def __init__(self, visitor: Visitor, number: int) -> None:
        self.visitor, self.number = visitor, number

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.visitor.enter(self.number)


class _After(_Before):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:  # type: ignore[override]
        return self.visitor.leave(self.number, args, kwargs, output)


class _BeforeState(_Before):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.visitor.merge()


class Hooks:
    """The hooks of one visitor in the modules of one model; a model has one visitor at a time."""

    def __init__(self, uses: Sequence[Use], visitor: Visitor) -> None:
        take_over(use.module for use in uses)
        self.handles = []
        for number, use in enumerate(uses):
            state = _BeforeState(visitor, number)
            self.handles += [
                use.module.register_forward_pre_hook(_Before(visitor, number)),
                use.module.register_forward_hook(_After(visitor, number), with_kwargs=True, prepend=True),
                use.module.register_state_dict_pre_hook(state),
                use.module.register_load_state_dict_pre_hook(state),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def take_over(modules: Iterable[nn.Module]) -> None:
    """Let the visitors that modules have from other optimizers merge and go."""
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values() if isinstance(hook, _Before))
    for visitor in {id(hook.visitor): hook.visitor for hook in hooks}.values():
        visitor.release()


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results of a forward."""
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


class StrayUses(TorchFunctionMode):
    """Refuses torch functions that take a weight while no hook stands before it: its forward would be unperturbed.

    ``allowed()`` gives the weights' memory that may be read at the moment.
    """

    def __init__(self, weights: Sequence[Weight], allowed: Callable[[], set[int]]) -> None:
        super().__init__()
        self.names = {w.tensor.data_ptr(): w.name for w in weights if w.tensor.numel()}
        self.allowed = allowed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(True for _ in tensors_in(result)):  # not a question about its shape or type
            for tensor in tensors_in((args, kwargs)):
                place = tensor.data_ptr() if tensor.layout == torch.strided else 0
                if place in self.names and place not in self.allowed():
                    raise RuntimeError(self._message(place, func))
        return result

    def _message(self, place: int, func: Any) -> str:
        return (
            f"closure: {self.names[place]!r} is used by {getattr(func, '__name__', func)} outside the forward of the "
            "module that it belongs to, where it would not be perturbed; accepted: weights used by calling their "
            "module. Freeze it, or choose mode='inplace'"
        )
