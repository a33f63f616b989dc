"""anchor_affine_: the formula in exact arithmetic, refusals."""

import math
from fractions import Fraction

import pytest
import torch
from support.cases import IDS, ROUNDINGS, anchor_arguments
from support.exact import round32, scalar32
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, poison, weights
from support.refusals import refused

from pgap_kernels import reference

BACKENDS = ("reference", "cpu")
HALF_DTYPES = (torch.bfloat16, torch.float16)
STOCHASTIC = ROUNDINGS["stochastic"]


# ---- the formula ---------------------------------------------------------------------------------------------------


def exact_affine(w: float, origin: float, delta: float | None, c: float) -> float:
    """fma(c, X, W0), X = Delta or W - W0 rounded to float32."""
    x = round32(Fraction(w) - Fraction(origin)) if delta is None else Fraction(delta)
    return float(round32(scalar32(c) * x + Fraction(origin)))


@pytest.mark.parametrize(
    ("anchors", "deltas", "coefficient"),
    [
        ("float32", "none", 0.7),
        ("own", "none", -1.3),
        ("float32", "float32", 1.0),
        ("own", "own", 1e-8),
        ("float32", "own", -1.3),
        ("own", "float32", 0.7),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_in_exact_arithmetic(backend, dtype, anchors, deltas, coefficient):
    kinds = {"none": None, "float32": torch.float32, "own": dtype}
    options = {"coefficient": coefficient, "shapes": [(301,)]}
    arguments = anchor_arguments(dtype, kinds[anchors], kinds[deltas], **options)
    (w,), (origin,) = clones(arguments["weights"]), arguments["anchors"]
    distance = arguments["deltas"][0].tolist() if deltas != "none" else [None] * 301
    ops.anchor_affine_(**arguments, backend=backend)
    want = [exact_affine(*values, coefficient) for values in zip(w.tolist(), origin.tolist(), distance, strict=True)]
    assert_same_bits(arguments["weights"][0], torch.tensor(want, dtype=torch.float64).float().to(dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_pass_rounds_the_float32_pass(backend, dtype):
    """By the rounding that test_dense holds to its definition, with the words of the weight's own stream."""
    arguments = anchor_arguments(dtype, rounding="stochastic", shapes=[(3000,)])
    wide = {**arguments, "weights": [arguments["weights"][0].float()]}
    ops.anchor_affine_(**arguments, backend=backend)
    ops.anchor_affine_(**wide, backend=backend)
    (got,), (value,) = arguments["weights"], wide["weights"]
    words = reference.words(0, 3000, IDS[0], STOCHASTIC["rounding_key"], value.device)
    assert_same_bits(got, reference.stochastic_round(value, words, dtype))
    assert not torch.equal(got, value.to(dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_at_equality(backend, dtype):
    """Where the fraction is the word's top bits it rounds toward zero, one unit above them away from it.

    In many short tensors, as the rest of a vector is rounded apart. W is Delta itself: c = 1, W0 = 0.
    """
    cut = 16 if dtype == torch.bfloat16 else 13  # bits of float32 that the dtype has not
    low, ids = torch.full((31,), 1.5), list(range(1, 65))
    tops = [reference.words(0, 31, i, 77, low.device) >> (32 - cut) for i in ids]
    for more in (0, 1):
        deltas = [(low.view(torch.int32) + top.int() + more).view(torch.float32) for top in tops]
        got, zeros = ([torch.zeros(31, dtype=dtype) for _ in ids] for _ in range(2))
        options = {"tensor_ids": ids, "rounding": "stochastic", "rounding_key": 77, "backend": backend}
        ops.anchor_affine_(got, zeros, 1.0, deltas=deltas, **options)
        want = (low.to(dtype).view(torch.int16) + more).view(dtype)
        assert_all_same(got, [want] * len(ids))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_even(backend, dtype):
    """Halfway between neighbours, in less than two vectors, whose rest is rounded apart. W is Delta: c = 1, W0 = 0."""
    low = torch.ones(31, dtype=dtype).view(torch.int16) + torch.arange(31, dtype=torch.int16)
    halfway = (low.view(dtype).float() + (low + 1).view(dtype).float()) / 2
    got, zeros = torch.zeros(31, dtype=dtype), torch.zeros(31, dtype=dtype)
    ops.anchor_affine_([got], [zeros], 1.0, deltas=[halfway], backend=backend)
    assert_same_bits(got, ((low + 1) // 2 * 2).view(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_is_the_anchor_and_stored_distances_do_not_drift(backend, dtype):
    arguments = anchor_arguments(dtype, dtype, torch.float32)
    want = clones(arguments["weights"])
    ops.anchor_affine_(**{**arguments, "weights": want, "coefficient": 0.25}, backend=backend)
    for c in (3.0, -7.0, 0.1, 0.25):
        ops.anchor_affine_(**{**arguments, "coefficient": c}, backend=backend)
    assert_all_same(arguments["weights"], want)
    ops.anchor_affine_(**{**arguments, "coefficient": 0.0}, backend=backend)
    assert all(torch.equal(w, a) for w, a in zip(arguments["weights"], arguments["anchors"], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_not_read_where_distances_are_stored(backend):
    arguments = anchor_arguments(deltas=torch.float32)
    want, out = clones(arguments["weights"]), poison(arguments["weights"])
    ops.anchor_affine_(**{**arguments, "weights": want}, backend=backend)
    for t in arguments["weights"]:
        t.fill_(math.nan)
    ops.anchor_affine_(**arguments, out=out, backend=backend)
    ops.anchor_affine_(**arguments, backend=backend)
    assert_all_same(out, want)
    assert_all_same(arguments["weights"], want)


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(**changes) -> dict:
    arguments = anchor_arguments(deltas=torch.float32, shapes=[(6, 8), (5, 7)])
    return {**{key: arguments[key] for key in ("weights", "anchors", "deltas", "coefficient")}, **changes}


@pytest.mark.parametrize("name", ["anchors", "deltas"])
def test_other_sixteen_bits(name):
    arguments = {**good(), "weights": weights([(6, 8), (5, 7)], torch.bfloat16)}
    arguments[name] = [t.half() for t in arguments[name]]
    refused("anchor_affine_", arguments, TypeError, rf"^{name}\[0\]: got dtype torch.float16; accepted: .*bfloat16")


def test_stochastic_rounding_needs_ids():
    arguments = good(rounding="stochastic", rounding_key=1)
    refused("anchor_affine_", arguments, ValueError, "^tensor_ids: got None; accepted: one per tensor with stochastic")


@pytest.mark.parametrize("name", ["anchors", "deltas"])
def test_what_is_written_over_what_is_read(name):
    out = [torch.zeros(6, 8), good()[name][1]]
    arguments = good(out=out)
    arguments[name][1] = out[1]
    refused("anchor_affine_", arguments, ValueError, rf"^{name}\[1\]: shares memory with out")
    arguments = good()
    arguments[name][0] = arguments["weights"][0]
    refused("anchor_affine_", arguments, ValueError, rf"^{name}\[0\]: shares memory with weights")


def test_weights_may_share_an_anchor():
    one = torch.linspace(-1, 1, 48).view(6, 8)
    apart = [torch.ones(6, 8), torch.full((6, 8), 2.0)]
    shared, expanded = [w.clone() for w in apart], [w.clone() for w in apart]
    ops.anchor_affine_(apart, [one, one.clone()], 0.5)
    ops.anchor_affine_(shared, [one, one], 0.5)
    assert all(map(torch.equal, shared, apart))
    row = one[0].expand(6, 8)
    ops.anchor_affine_(expanded, [row, row], 0.5)
    want = [w.fill_(value) for w, value in zip(apart, (1.0, 2.0), strict=True)]
    ops.anchor_affine_(want, [row.contiguous()] * 2, 0.5)
    assert all(map(torch.equal, expanded, want))


def test_no_anchors():
    refused("anchor_affine_", good(anchors=None), TypeError, "^anchors: got NoneType")
