"""Maps weights to the modules whose forwards use them, and hooks those forwards."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from ..directions import Weight, address, address_range
from ..noise import canonical_name
from .readers import AdapterReaders, MergeFirst

LINEAR, CONV1D, EMBEDDING = "linear", "conv1d", "embedding"


@dataclass(frozen=True, eq=False)
class ParamRef:
    """A parameter in its owner: what a hook exchanges."""

    owner: nn.Module
    name: str
    index: int  # of its weight
    parameter: nn.Parameter

    def is_in_place(self) -> bool:
        """Whether the owner still has this very parameter."""
        return self.owner._parameters.get(self.name) is self.parameter

    def put_back(self) -> None:
        """Give the owner its parameter back."""
        self.owner._parameters[self.name] = self.parameter


class ModuleUse:
    """A module whose forward uses weights: its own, and those of children that have no forward (``ParameterDict``)."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.number = name, module, 0
        self.refs: list[ParamRef] = []
        self.kind = kind_of(module)

    def foldable(self, ref: ParamRef) -> bool:
        """Whether a low-rank direction of a parameter can act on the module's output instead."""
        return self.kind is not None and ref.owner is self.module and ref.name == "weight"


def kind_of(module: nn.Module) -> str | None:
    """How the module's forward uses ``weight``, for those of which a direction can be folded into the output."""
    forward, own = type(module).forward, module.__dict__.get("forward")
    own = None if getattr(own, "__func__", None) is forward else own  # as accelerate puts it back
    if own is not None and not getattr(own, "transparent", False) and not _is_dispatched(module):
        return None  # replaced: nobody knows by what
    if forward is nn.Linear.forward:
        return LINEAR
    if forward is nn.Embedding.forward and module.max_norm is None:
        return EMBEDDING
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return CONV1D
    return None


def _is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate has replaced its forward by one that moves the inputs to the weights' device, no more."""
    before: Any = module.__dict__.get("_old_forward")
    while getattr(before, "transparent", False):  # a stacked forward of ours
        before = before.forward
    hook = type(module.__dict__.get("_hf_hook")).__name__
    return getattr(before, "__func__", None) is type(module).forward and hook == "AlignDevicesHook"


def modules_of(model: nn.Module | None) -> list[nn.Module]:
    """Every module once: what ``model.modules()`` finds, four times as fast, as it is asked before every step."""
    found = [] if model is None else [model]
    seen = {*found}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def uses_of(model: nn.Module, weights: Sequence[Weight]) -> list[ModuleUse]:
    """Every module whose forward uses one of the weights, once.

    Raises:
        ValueError: a weight is in no module of the model, or in none that has a forward.
    """
    weight_at = {address(w.tensor): w for w in weights}
    modules = dict(model.named_modules())
    uses: dict[str, ModuleUse] = {}
    found: set[int] = set()
    for name, owner in modules.items():
        for key, parameter in owner._parameters.items():
            weight = None if parameter is None else weight_at.get(address(parameter))
            if parameter is None or weight is None:
                continue
            if isinstance(owner, torch.jit.ScriptModule):
                raise ValueError(
                    f"model: {weight.name!r} belongs to a scripted module, whose forward knows no hooks; accepted: "
                    "modules of Python (or mode='inplace' without two_pass)"
                )
            elsewhere = weight.read_by.get(canonical_name(f"{name}.{key}".lstrip(".")))
            user = _user(name, modules) if elsewhere is None else elsewhere
            if user is None:
                raise ValueError(
                    f"model: {weight.name!r} belongs to a {type(owner).__name__} that no module with a forward "
                    "contains; accepted: parameters of modules that are called (or mode='inplace')"
                )
            use = uses.setdefault(user, ModuleUse(user, modules[user]))
            use.refs.append(ParamRef(owner, key, weight.index, parameter))
            found.add(weight.index)
    lost = [w.name for w in weights if w.index not in found and w.tensor.numel()]
    if lost:
        raise ValueError(
            f"model: its modules do not have the parameter {lost[0]!r}; accepted: the model whose forward the closure "
            "runs, with every parameter to train (or mode='inplace')"
        )
    ordered = [uses[name] for name in modules if name in uses]
    for number, use in enumerate(ordered):
        use.number = number
    return ordered


def _user(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The module itself, or the nearest one around it whose forward reads its parameters."""
    while not _is_called(modules[name]):
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _is_called(module: nn.Module) -> bool:
    """Whether its parameters are used by calling it: not ``ParameterDict``, nor ``out_proj`` of attention."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


class HookClient(Protocol):
    """Is called before and after a module's forward, before its state is read or loaded (``merge``), and when another
    client takes its weights over (``release``)."""

    weights: list[Weight]
    fades: bool  # what is pending scales a layer's output, and needs the bias that it has in it

    def enter(self, number: int) -> None: ...

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any: ...

    @property
    def pending(self) -> bool: ...

    def refuse_inside_forward(self, call: str) -> None: ...

    def merge(self) -> None: ...

    def release(self, why: str) -> None: ...


class _Before:
    """A forward pre-hook; a class of its own, so that models with hooks can be copied and pickled."""

    def __init__(self, client: HookClient, number: int) -> None:
        self.client, self.number = client, number

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.__dict__.get("_is_replica"):
            raise RuntimeError(
                f"closure: {type(module).__name__} is a copy that nn.DataParallel has made, on whose weights no "
                "perturbation is; accepted: one process for each GPU (torchrun)"
            )
        self.client.enter(self.number)


class _After(_Before):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:  # type: ignore[override]
        return self.client.leave(self.number, args, kwargs, output)


class Hooks:
    """The hooks of one client in the modules of a model."""

    def __init__(self, model: nn.Module, uses: Sequence[ModuleUse], client: HookClient) -> None:
        take_over((use.module for use in uses), client.weights)
        self.client = client
        # Of each module, its hooks and those of others, in the order in which torch calls them.
        self.tables = [hooks for use in uses for hooks in (use.module._forward_pre_hooks, use.module._forward_hooks)]
        self.adapters = AdapterReaders(model.modules(), client)
        self.handles = []
        state = MergeFirst(client)
        for number, use in enumerate(uses):
            self.handles += [
                # First of all: hooks of pruning and weight norm compute what the forward reads from the weights.
                use.module.register_forward_pre_hook(_Before(client, number), prepend=True),
                use.module.register_forward_hook(_After(client, number), with_kwargs=True, prepend=True),
                use.module.register_state_dict_pre_hook(state),
                use.module.register_load_state_dict_pre_hook(state),
            ]

    def come_first(self) -> bool:
        """Whether no hook that somebody else has registered since runs before ours: it would see a module's own
        weights, or an output to which nothing has been added yet."""
        first = [next(iter(hooks.values()), None) for hooks in self.tables]  # mostly ours, and asked before every step
        if all(getattr(hook, "client", None) is self.client for hook in first):
            return True
        return all(_leads(hooks.values(), self.client) for hooks in self.tables)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.adapters.remove()


def _leads(hooks: Iterable[Any], client: HookClient) -> bool:
    """Whether all hooks up to a client's are of one client or another."""
    for hook in hooks:
        if not isinstance(hook, _Before):
            return False
        if hook.client is client:
            return True
    return False


def clients_of(modules: Iterable[nn.Module]) -> list[HookClient]:
    """Those that have hooks in some modules, each once."""
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values() if isinstance(hook, _Before))
    return [*{id(hook.client): hook.client for hook in hooks}.values()]


def take_over(modules: Iterable[nn.Module], weights: Sequence[Weight]) -> None:
    """Let other optimizers that have some of these weights merge and go; those with other weights stay."""
    ours = {address(w.tensor) for w in weights if w.tensor.numel()}
    for client in clients_of(modules):
        shared = [w.name for w in client.weights if address(w.tensor) in ours]
        if shared:
            client.release(f"a newer optimizer has taken over {shared[0]!r} and its model's hooks")


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results of a forward."""
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


class StrayUses(TorchFunctionMode):
    """Refuses torch functions that read a weight where no hook has put the perturbed one: outside its module's forward.

    Args:
        allowed: gives the addresses of weights that may be read at the moment.
        is_stale: whether a tensor was a perturbed one, in memory that others have by now.
    """

    def __init__(
        self, weights: Sequence[Weight], allowed: Callable[[], set[int]], is_stale: Callable[[Tensor], bool]
    ) -> None:
        super().__init__()
        self.is_stale = is_stale
        self.names = {w.tensor.data_ptr(): w.name for w in weights if w.tensor.numel()}
        # Views of a weight start anywhere in it.
        self.extents = sorted(address_range(w.tensor) for w in weights if w.tensor.numel() and w.tensor.is_contiguous())
        self.reach = list(itertools.accumulate((end for _, end in self.extents), max))
        self.allowed = allowed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = list(tensors_in(result))
        if results:  # not a question about its shape or type
            for tensor in tensors_in((args, kwargs)):
                if any(tensor is r for r in results):
                    continue  # handed through unread, as by requires_grad_
                if self.is_stale(tensor):
                    raise RuntimeError(self._message(f"a weight of the shape {tuple(tensor.shape)}", func))
                for place in self._weights_in(tensor):
                    if place not in self.allowed():
                        raise RuntimeError(self._message(repr(self.names[place]), func))
        return result

    def _weights_in(self, tensor: Tensor) -> list[int]:
        """Addresses of the weights that a tensor shares memory with."""
        begin, end = address_range(tensor)
        if begin in self.names:
            return [begin]
        found, i = [], bisect.bisect_left(self.extents, (end,)) - 1
        while i >= 0 and self.reach[i] > begin:
            if self.extents[i][1] > begin:
                found.append(self.extents[i][0])
            i -= 1
        return found

    def _message(self, weight: str, func: Any) -> str:
        return (
            f"closure: {weight} is used by {getattr(func, '__name__', func)} outside the forward of the "
            "module that it belongs to, where it would not be perturbed; accepted: weights used by calling their "
            "module. Freeze it, or choose mode='inplace'"
        )
