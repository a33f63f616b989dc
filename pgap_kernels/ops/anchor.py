"""Weights as a multiple of their distance from an anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..arguments import AnchorArguments
from ._library import call_pass, define_pass, torch_ops, traceable
from ._packing import Key, Scalar, Slices, outputs, rounding_keys, scalar

define_pass("anchor_affine_", AnchorArguments)


@traceable
def anchor_affine_(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    coefficient: Scalar,
    *,
    deltas: Sequence[Tensor] | None = None,
    tensor_ids: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
) -> None:
    """Scale the distance from an anchor:  W <- round(fma(c, X, W0))  with X = Delta where given, else W - W0.

    DiZO's projection (2502.03304). With a stored Delta any number of scales can be tried without rounding drift: W is
    then only written, and with ``out`` not touched. The bits are the same on every backend.

    Args:
        weights: as in ``dense_perturb_``.
        anchors: W0, of the weights' shapes, in their dtype or float32.
        coefficient: c, a float, a float per tensor, or a tensor of either.
        deltas: stored distances, in the weights' dtype or float32.
        tensor_ids: needed with stochastic rounding.
        out, rounding, rounding_key, slices: as in ``dense_perturb_``; outputs share nothing with anchors and deltas.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    dtypes = tuple({torch.float32: None, weights[0].dtype: None})
    if tensor_ids is None:
        if rounding == "stochastic":
            raise ValueError("tensor_ids: got None; accepted: one per tensor with stochastic rounding")
        tensor_ids = [0] * len(weights)
    arguments = AnchorArguments(
        anchors=checks.companions("anchors", anchors, weights, dtypes, written=False),
        deltas=[] if deltas is None else checks.companions("deltas", deltas, weights, dtypes, written=False),
        coefficient=scalar("coefficient", coefficient, len(weights)),
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(weights)),
        rounding_key=rounding_keys(rounding, rounding_key),
        slices=checks.slices("slices", slices, weights),
    )
    targets = outputs(out, weights)
    read = {"anchors": arguments.anchors, "deltas": arguments.deltas}
    checks.apart("weights" if targets is None else "out", targets or weights, read)
    call_pass(torch_ops.anchor_affine_, weights, arguments, targets)
