"""The torch.library the ops live in, and how one is put there."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..arguments import schema
from . import _traced

library = torch.library.Library("pgap_kernels", "DEF")
torch_ops = torch.ops.pgap_kernels
_passes: dict[str, Callable] = {}  # what serves each op that writes weights


def _fake_nothing(*args, **kwargs):
    return None


def define(signature: str, impl: Callable, fake: Callable = _fake_nothing) -> None:
    """Register an op: ``impl`` for every device (it asks ``backends`` who serves), ``fake`` for tracing."""
    name = signature.partition("(")[0]
    library.define(signature)
    library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pgap_kernels::{name}", fake, lib=library)


def define_with_out(name: str, record: Any, impl: Callable) -> None:
    """Register an op that writes its ``weights``, and its ``.out`` twin that writes other tensors."""
    arguments = schema(record)
    _passes[name] = impl
    define(f"{name}(Tensor(a!)[] weights, *, {arguments}) -> ()", impl)
    define(f"{name}.out(Tensor[] weights, *, {arguments}, Tensor(a!)[] out) -> ()", impl)


def define_pass(name: str, record: Any) -> None:
    """Register an op whose backends write ``out``, which may be ``weights``, under the op's own name."""

    def run(weights, *, out=None, **arguments):
        out = weights if out is None else out
        serving = backends.select(name, weights[0].device, weights[0].dtype)
        getattr(serving, name)(weights, out, record(**arguments))
        bump_versions(out)

    define_with_out(name, record, run)


def traceable(function: Callable) -> Callable:
    """Let a compiled function hold a public op in its graph.

    The checks then run while it is traced; those that read memory, addresses or numbers in tensors, are left out
    (``torch.compiler.is_compiling``).
    """

    name = function.__name__
    _traced.functions[name] = function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        returned = getattr(_traced, name)(*args, **kwargs)
        return None if isinstance(returned, tuple) else returned

    return call


def placed(value: Any, device: torch.device) -> Any:
    """Scalars or keys on the weights' device, if they lie on another; those on the host are left to backends.

    Args:
        value: a tensor, or a record of arguments.

    Raises:
        ValueError: a scalar is not finite. (On the weights' device, if it is not the CPU, kernels look at them.)
    """
    if not isinstance(value, Tensor):
        given = {name: x for name, x in value._asdict().items() if isinstance(x, Tensor)}
        moved = {name: x for name, x in given.items() if x.device.type != "cpu" and x.device != device}
        return value._replace(**{name: _finite(name, x.to(device)) for name, x in moved.items()}) if moved else value
    return value if value.device.type == "cpu" else value.to(device)


def _finite(name: str, value: Tensor) -> Tensor:
    if value.device.type == "cpu" and not value.isfinite().all():
        raise ValueError(f"{name}: got {value.tolist()}; accepted: finite values")
    return value


def call_pass(op: Any, weights: list[Tensor], arguments: Any, out: list[Tensor] | None) -> None:
    """Call a pass with its record of arguments, in place or into ``out``."""
    arguments = placed(arguments, weights[0].device)
    with torch.no_grad():
        if out is None:
            op.default(weights, **arguments._asdict())
        else:
            op.out(weights, **arguments._asdict(), out=out)


def write_into(name: str, tensors: list[Tensor], out: list[Tensor], **arguments: Any) -> None:
    """Unchecked fast path for hooks, called before every layer's forward. Writes ``out``, which may be ``tensors``.

    That is memory which stands in for weights, so scalars on the device are not looked at first (``checks.unguarded``).
    The dispatcher takes longer over the arguments than a small call over all the rest: only tracing goes through it.
    """
    same = all(map(operator.is_, tensors, out))
    read = out if same else tensors
    if not torch.compiler.is_compiling():
        token = checks.unguarded.set(True)
        try:
            _passes[name](read, out=out, **arguments)
        finally:
            checks.unguarded.reset(token)
    elif same:
        getattr(torch_ops, name).default(out, **arguments)
    else:
        getattr(torch_ops, name).out(read, **arguments, out=out)


def bump_versions(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors changed; library ops do not do it themselves."""
    tensors = list(chain(*lists))
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
