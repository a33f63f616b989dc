"""Weights as a multiple of their distance from an anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks
from ._arguments import Key, Scalar, Slices, rounding_keys, scalar
from ._library import define, table, written


def _affine_impl(weights, *args):
    backend = backends.select("anchor_affine_", weights[0].device, weights[0].dtype, args[-1])
    backend.anchor_affine_(weights, *args[:-1])
    written(weights)


define(
    "anchor_affine_(Tensor(a!)[] weights, Tensor[] anchors, Tensor[] deltas, Tensor coefficient, Tensor? rounding_key, "
    "int[] tensor_ids, int[] slices, str? backend) -> ()",
    _affine_impl,
)


@torch.compiler.disable
def anchor_affine_(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    coefficient: Scalar,
    *,
    deltas: Sequence[Tensor] | None = None,
    tensor_ids: Sequence[int] | None = None,
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
    backend: str | None = None,
) -> None:
    """Scale the distance from an anchor:  W <- round(fma(c, X, W0))  with X = Delta where given, else W - W0.

    K5 of the kernel algebra; DiZO's projection (2502.03304). With a stored Delta any number of scales can be tried
    without rounding drift; W is then only written. The same bits on every backend.

    Args:
        weights: as in ``dense_perturb_``.
        anchors: W0, of the weights' shapes, in their dtype or float32.
        coefficient: c, a float, a float per tensor, or a tensor of either.
        deltas: stored distances, in the weights' dtype or float32.
        tensor_ids: needed with stochastic rounding.
        rounding, rounding_key, slices, backend: as in ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    dtypes = tuple({torch.float32: None, weights[0].dtype: None})
    origin = checks.companions("anchors", anchors, weights, dtypes)
    distance = [] if deltas is None else checks.companions("deltas", deltas, weights, dtypes)
    spans = checks.slices("slices", slices, weights)
    keys_rounding = rounding_keys(rounding, rounding_key)
    if tensor_ids is None:
        if keys_rounding is not None:
            raise ValueError("tensor_ids: got None; accepted: one per tensor with stochastic rounding")
        tensor_ids = [0] * len(weights)
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(weights))
    c = scalar("coefficient", coefficient, len(weights))
    with torch.no_grad():
        table.anchor_affine_(weights, origin, distance, c, keys_rounding, ids, spans, backend)
