"""A trainable tensor's one identity, from the optimizer's constructor to the op call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# One number for each weight, found by ``Weight.index``.
Amounts = Sequence[float] | Mapping[int, float]


@dataclass(frozen=True, eq=False)
class Weight:
    """A trainable tensor.

    Attributes:
        index: its position among the optimizer's weights; ``Amounts`` and hooks go by it.
        name: its canonical parameter name.
        aliases: the other names of a tied one.
        tensor: the parameter itself, or the local piece of a sharded one.
        id: 32-bit id in the noise contract.
        group: its param group.
        span: (base, row_stride) of a shard in the unsharded tensor, as the ops' ``slices``; None for a whole tensor.
        padding_row: a row that training leaves alone (``nn.Embedding.padding_idx``).
        read_by: of some parameters of the model, the module whose forward reads them instead of their own module's.
    """

    index: int
    name: str
    tensor: Tensor
    id: int
    group: dict[str, Any]
    span: tuple[int, int] | None = None
    padding_row: int | None = None
    aliases: tuple[str, ...] = ()
    read_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All its names, the canonical one first."""
        return self.name, *self.aliases

    def matches(self, pattern: str) -> bool:
        """Whether one of its names matches an fnmatch pattern."""
        return any(fnmatchcase(name, pattern) for name in self.names)


def address(tensor: Tensor) -> tuple | None:
    """Equal for tensors with the same elements, so that tied parameters are found. None: it has no memory here."""
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_nested or tensor.device.type == "meta":
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap and the like
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def storage(tensor: Tensor) -> int:
    """Address of a tensor's storage; 0 where it has none."""
    if address(tensor) is None or is_traceable_wrapper_subclass(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


def address_range(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements, the last not included; equal where there is none."""
    if not storage(tensor) or not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def bucket(weights: Sequence[Weight], also: Callable[[Weight], Any] = lambda _: None) -> list[list[Weight]]:
    """Group weights that may share an op call: one device, dtype and value of ``also``."""
    found: dict[Any, list[Weight]] = {}
    for weight in weights:
        key = (weight.tensor.device, weight.tensor.dtype, weight.span is None, also(weight))
        found.setdefault(key, []).append(weight)
    return list(found.values())


def scalar_if_equal(values: Sequence[float]) -> float | list[float]:
    """One float if all are equal: the ops check and copy one scalar faster than one for each tensor."""
    first = values[0]
    return first if values.count(first) == len(values) else list(values)
