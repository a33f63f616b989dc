"""anchor_affine_ on the Triton kernel: the very bits of the reference."""

import functools
import itertools
import math

import pytest
import torch
from support.agreement import SHAPES, agree
from support.cases import Case, anchor_arguments
from support.helpers import DTYPES, assert_all_same, ops


def affine(**options) -> Case:
    """A call of ``anchor_affine_``, its arguments those of ``cases.anchor_arguments``."""
    written = ("weights", "out") if options.get("out") else ("weights",)
    return Case("anchor_affine_", functools.partial(anchor_arguments, **{"shapes": SHAPES, **options}), written)


@pytest.mark.parametrize("coefficient", [0.0, -0.0, 1.0, 1e-42, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, coefficient):
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, 1e-40, 65504.0, -65504.0, 3.38e38, 1.0]
    values = torch.tensor(list(itertools.product(special, special)), dtype=torch.float64).to(dtype)
    for stored in (False, True):
        results = []
        for backend in ("triton", "reference"):
            w, anchor = values[:, 0].contiguous(), values[:, 1].contiguous()
            deltas = [w.clone()] if stored else None
            ops.anchor_affine_([w], [anchor], coefficient, deltas=deltas, backend=backend)
            results.append([w])
        assert_all_same(*results)


def test_nothing_to_write():
    agree(affine(shapes=[(), (0,), (0, 4), (1,), (3, 5)]))
    agree(affine(shapes=[(0,)], deltas=torch.float32))


def test_stored_distances_give_what_the_first_scale_would():
    """From a stored distance any scale can be tried: W itself is not read."""
    arguments = anchor_arguments(torch.bfloat16, deltas=torch.float32, rounding="stochastic", shapes=SHAPES)
    results = []
    for fill in (0.0, math.nan):
        w = [torch.full_like(t, fill) for t in arguments["weights"]]
        ops.anchor_affine_(**{**arguments, "weights": w}, backend="triton")
        results.append(w)
    assert_all_same(*results)
