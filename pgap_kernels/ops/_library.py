"""The torch.library the ops live in, and how one is put there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

library = torch.library.Library("pgap_kernels", "DEF")
table = torch.ops.pgap_kernels


def _fake_nothing(*args, **kwargs):
    return None


def define(schema: str, impl: Callable, fake: Callable = _fake_nothing) -> None:
    """Register an op: ``impl`` for every device (it asks ``backends`` who serves), ``fake`` for tracing."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pgap_kernels::{name}", fake, lib=library)


def define_with_out(name: str, arguments: str, impl: Callable) -> None:
    """Register an op that writes its ``weights`` and its ``.out`` twin that writes other tensors."""
    define(f"{name}(Tensor(a!)[] weights, {arguments}) -> ()", impl)
    define(f"{name}.out(Tensor[] weights, {arguments}, *, Tensor(a!)[] out) -> ()", impl)


def written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors changed; library ops do not do it themselves."""
    tensors = list(chain(*lists))
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
