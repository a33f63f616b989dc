"""masked_perturb_ on the Triton kernel: the very bits of the reference, under every mask."""

import itertools
import math

import pytest
import torch
from support.agreement import SHAPES
from support.cases import IDS, KEYS, MASK_KEY, MASKS, ROUNDINGS
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, weights

STOCHASTIC = ROUNDINGS["stochastic"]
DRAWS = [(KEYS[0], 1e-1), (KEYS[1], -0.37)]


def agreeing(tensors, draws=DRAWS, **options):
    """Copies of the tensors after the op, once both backends gave the same bits."""
    results = []
    for backend in ("triton", "reference"):
        results.append(clones(tensors))
        ops.masked_perturb_(results[-1], draws, backend=backend, **{"tensor_ids": IDS[: len(tensors)], **options})
    assert_all_same(*results)
    return results[0]


# ---- the pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_scalars_of_each_tensor(mask):
    """Thresholds of each tensor beside one coefficient for all, the other way round, and both."""
    w = weights(SHAPES)
    levels, many = [0.3, 0.8, 0.05], [0.1, -0.2, 0.3]
    for several in (False, True):
        for per_level in (False, True):
            level = levels if per_level else 0.4
            bits = ops.threshold_bits(w, level) if mask == "bits" else None
            own = {"threshold": level, "share": (MASK_KEY, 0.3), "bits": bits}[mask]
            agreeing(w, [(KEYS[0], many if several else 0.1), (KEYS[1], 0.5)], **{mask: own})


@pytest.mark.parametrize("mask", MASKS)
def test_all_kept_is_the_dense_pass_and_none_the_decay(mask):
    w = weights(SHAPES, torch.bfloat16)
    ones = [torch.full((-(-t.numel() // 32),), -1, dtype=torch.int32) for t in w]
    everything = {"threshold": 1e30, "share": (MASK_KEY, 1.0), "bits": ones}[mask]
    nothing = {"threshold": -1.0, "share": (MASK_KEY, 0.0), "bits": [torch.zeros_like(b) for b in ones]}[mask]
    options = {"tensor_ids": IDS[:3], "decay": 0.1, "backend": "triton", **STOCHASTIC}
    for own, draws in ((everything, DRAWS), (nothing, [(KEYS[0], 0.0)])):
        got, want = clones(w), clones(w)
        ops.masked_perturb_(got, DRAWS, **{mask: own}, **options)
        ops.dense_perturb_(want, draws, **options)
        assert_all_same(got, want)


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, 1e-40, -1e-45, 65504.0, 3.38e38, 0.5, -0.5]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e-40, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_weights(dtype, threshold):
    w = [torch.tensor(SPECIAL * 40, dtype=torch.float64).to(dtype)]
    for decay, options in itertools.product((0.0, 0.5), ROUNDINGS.values()):
        agreeing(w, threshold=threshold, decay=decay, **options)


@pytest.mark.parametrize("share", [0.0, 2.0**-32, 0.5, 1 - 2.0**-32, 1.0])
def test_shares(share):
    agreeing(weights(SHAPES), share=(MASK_KEY, share))


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 13, 31, 33, 67])
def test_bits_wherever_a_tensor_begins_and_ends(count):
    """Eight elements of a tile lie in one or two bytes of the mask, the last of them cut short anywhere."""
    pieces = [torch.ones(count) for _ in range(8)]
    generator = torch.Generator().manual_seed(count)
    mask = [torch.randint(-(2**31), 2**31, (-(-count // 32),), generator=generator).int() for _ in pieces]
    options = {"slices": [(4096 + i, 2**40) for i in range(8)], "bits": mask, "tensor_ids": IDS[:8]}
    agreeing(pieces, DRAWS[:1], **options)


@pytest.mark.parametrize("columns", [5, 8, 13, 32, 37])
def test_bits_of_rows_apart(columns):
    """Bits run through the rows of the tensor given, whatever their place in memory or in the unsharded tensor."""
    (buffer,) = weights([(5, columns + 3)])
    (mask,) = ops.threshold_bits([buffer[:, 1 : columns + 1]], 0.7)
    results = []
    for backend in ("triton", "reference"):
        results.append(buffer.clone())
        options = {"slices": [(3 * (columns + 11) + 2, columns + 11)], "bits": [mask], "backend": backend}
        ops.masked_perturb_([results[-1][:, 1 : columns + 1]], DRAWS, tensor_ids=IDS[:1], **options)
    assert_same_bits(*results)


def test_bits_of_clean_weights_are_the_threshold():
    w = weights(SHAPES, torch.bfloat16)
    by_threshold = agreeing(w, threshold=0.7, decay=0.01)
    assert_all_same(agreeing(w, bits=ops.threshold_bits(w, 0.7), decay=0.01), by_threshold)
