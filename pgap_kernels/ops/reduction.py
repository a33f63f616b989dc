"""Sums over whole tensors: products with regenerated noise, squared norms, squared distances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks
from ..arguments import ReductionArguments, schema
from ._library import define, placed, torch_ops, traceable
from ._packing import Key, Slices, noise_options


def _reduce(tensors, **arguments):
    serving = backends.select("reduce", tensors[0].device, tensors[0].dtype)
    return serving.reduce(tensors, ReductionArguments(**arguments))


def _fake_reduce(tensors, **arguments):
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


define(f"reduce(Tensor[] tensors, *, {schema(ReductionArguments)}) -> Tensor", _reduce, _fake_reduce)


@traceable
def seeded_dot(
    tensors: Sequence[Tensor],
    key: Key,
    *,
    tensor_ids: Sequence[int],
    distribution: str = "normal",
    tier: str = "exact",
    slices: Slices | None = None,
) -> Tensor:
    """<z(key), T> of each tensor, with the noise regenerated in the kernel (LOREN, diagnostics).

    Products and sums are float64. The result does not depend on threads, grid or the list; backends agree to the
    order of summation.

    Args:
        tensors: float32, bfloat16 or float16, laid out as the weights of ``dense_perturb_``; only read, so they may
            overlap, or be a row vector expanded over rows: ``a.expand(m, n)`` gives <1 a^T, z>.
        key, tensor_ids, distribution, tier, slices: as there.

    Returns:
        float64 tensor (number of tensors,) on their device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    values = checks.matrices("tensors", tensors, written=False)
    noise_options(distribution, tier)
    arguments = ReductionArguments(
        anchors=[],
        keys=checks.key_tensor("key", [key]),
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(values)),
        slices=checks.slices("slices", slices, values),
        distribution=distribution,
        tier=tier,
    )
    with torch.no_grad():
        return torch_ops.reduce(values, **placed(arguments, values[0].device)._asdict())


@traceable
def squared_norms(tensors: Sequence[Tensor], anchors: Sequence[Tensor] | None = None) -> Tensor:
    """Squared Frobenius norm of each tensor, or of its distance from an anchor (DiZO).

    The difference is taken in float32, squares and sums in float64.

    Args:
        tensors: as in ``seeded_dot``.
        anchors: one per tensor, of its shape, in the tensors' dtype or float32.

    Returns:
        float64 tensor (number of tensors,) on their device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    values = checks.matrices("tensors", tensors, written=False)
    dtypes = tuple({torch.float32: None, values[0].dtype: None})
    origin = [] if anchors is None else checks.companions("anchors", anchors, values, dtypes, written=False)
    keys = torch.zeros(0, dtype=torch.int64, device="cpu")
    arguments = ReductionArguments(origin, keys=keys, tensor_ids=[0] * len(values))
    with torch.no_grad():
        return torch_ops.reduce(values, **placed(arguments, values[0].device)._asdict())
