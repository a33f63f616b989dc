"""masked_perturb_ and threshold_bits: the formula, the three masks, refusals."""

import math

import pytest
import torch
from support.cases import IDS, KEYS, MASK_KEY, MASKS, ROUNDINGS, masked_arguments
from support.exact import exact_dense
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, weights
from support.refusals import refused

from pgap_kernels import noise

BACKENDS = ("reference", "cpu")
STOCHASTIC = ROUNDINGS["stochastic"]
DRAWS = [(KEYS[0], 1e-1), (KEYS[1], -0.37), (KEYS[2], 2.5e-2)]


def perturbed(tensors, draws, ids=None, **options):
    """Copies of the tensors after the op."""
    tensors = clones(tensors)
    ops.masked_perturb_(tensors, draws, tensor_ids=IDS[: len(tensors)] if ids is None else ids, **options)
    return tensors


def word(index: int, ident: int, key: int) -> int:
    """The word of one element, from the scalar definition of the stream."""
    counter, lane = noise.element_counter(index, ident)
    return noise.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32), noise.ROUNDS)[lane]


# ---- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "decay"), [(1, 0.0), (3, 0.1)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_in_exact_arithmetic(backend, dtype, mask, draws, decay):
    (w,) = weights([(300,)], dtype, seed=draws)
    if mask == "threshold":
        options, keep = {"threshold": 0.7}, [abs(x) <= torch.tensor(0.7).item() for x in w.tolist()]
    elif mask == "share":
        options = {"share": (MASK_KEY, 0.3)}
        keep = [word(e, IDS[0], MASK_KEY) < 0.3 * 2**32 for e in range(300)]
    else:
        numbers = [0x5A0F3C96 * (i + 1) & 0x7FFFFFFF for i in range(10)]
        options = {"bits": [torch.tensor(numbers, dtype=torch.int32)]}
        keep = [numbers[e // 32] >> e % 32 & 1 for e in range(300)]
    (got,) = perturbed([w], DRAWS[:draws], decay=decay, backend=backend, **options)
    zs = torch.stack([ops.draw(300, key, IDS[0], backend="reference") for key, _ in DRAWS[:draws]], 1).tolist()
    coefficients = [a for _, a in DRAWS[:draws]]
    want = [
        exact_dense(x, z, coefficients, decay) if k else exact_dense(x, [0.0], [0.0], decay)
        for x, z, k in zip(w.tolist(), zs, keep, strict=True)
    ]
    assert 50 < sum(map(bool, keep)) < 250
    assert_same_bits(got, torch.tensor(want, dtype=torch.float64).float().to(dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_kept_is_the_dense_pass_and_none_the_decay(backend, mask):
    w = weights([(37, 129), (4097,)], torch.bfloat16)
    ones = [torch.full((-(-t.numel() // 32),), -1, dtype=torch.int32) for t in w]
    everything = {"threshold": 1e30, "share": (MASK_KEY, 1.0), "bits": ones}[mask]
    nothing = {"threshold": -1.0, "share": (MASK_KEY, 0.0), "bits": [torch.zeros_like(b) for b in ones]}[mask]
    for decay in (0.0, 0.1):
        options = {"decay": decay, "backend": backend, **STOCHASTIC}
        dense = clones(w)
        ops.dense_perturb_(dense, DRAWS[:2], tensor_ids=IDS[:2], **options)
        assert_all_same(perturbed(w, DRAWS[:2], **{mask: everything}, **options), dense)
        decayed = clones(w)
        ops.dense_perturb_(decayed, [(KEYS[0], 0.0)], tensor_ids=IDS[:2], **options)
        assert_all_same(perturbed(w, DRAWS[:2], **{mask: nothing}, **options), decayed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_that_are_not_kept_keep_their_sign(backend, dtype):
    w = [torch.tensor([0.0, -0.0] * 200, dtype=dtype)]
    assert_all_same(perturbed(w, DRAWS[:1], threshold=-1.0, backend=backend), w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_every_size(dtype):
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, 1e-40, -1e-45, 65504.0, 3.38e38, 0.5, -0.5]
    w = [torch.tensor(special * 40, dtype=torch.float64).to(dtype)] * 4
    options = {"threshold": [0.0, 0.5, 1e-40, 1e38]}
    assert_all_same(*(perturbed(w, DRAWS[:2], backend=b, **options) for b in BACKENDS))


def test_share_keeps_that_part():
    """Within 5 sigma, and whether or not an element is kept does not depend on the noise's key."""
    n, p = 200_000, 0.3
    (got,) = perturbed([torch.zeros(n)], DRAWS[:1], share=(MASK_KEY, p))
    (other,) = perturbed([torch.zeros(n)], DRAWS[1:2], share=(MASK_KEY, p))
    assert abs((got != 0).sum().item() - n * p) <= 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(got != 0, other != 0)


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (31,), (32,), (33,), (7, 13), (4097,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_bits(dtype, shape):
    (w,) = weights([shape], dtype)
    if w.numel() > 20:
        w.view(-1)[3], w.view(-1)[20] = math.nan, torch.tensor(0.6, dtype=dtype)
    threshold = torch.tensor(0.6, dtype=dtype).item()
    (bits,) = ops.threshold_bits([w], threshold)
    keep = [abs(x) <= threshold for x in w.flatten().tolist()]
    want = [sum(k << i for i, k in enumerate(keep[at : at + 32])) for at in range(0, len(keep), 32)]
    assert bits.dtype == torch.int32 and [b & 0xFFFFFFFF for b in bits.tolist()] == want


def test_threshold_bits_of_lists():
    w = weights([(33,), (11, 7), (0,)])
    apart = torch.zeros(11, 20)
    apart[:, 4:11] = w[1]
    got = ops.threshold_bits([w[0], apart[:, 4:11], w[2]], [0.5, 1.0, 2.0])
    want = [ops.threshold_bits([t], level)[0] for t, level in zip(w, [0.5, 1.0, 2.0], strict=True)]
    assert all(torch.equal(g, x) for g, x in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["plain", "strided", "shard"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_clean_weights_are_the_threshold(backend, layout):
    arguments, other = (masked_arguments("threshold", torch.bfloat16, layout=layout, decay=0.01) for _ in range(2))
    other["bits"] = ops.threshold_bits(other["weights"], other.pop("threshold"))
    ops.masked_perturb_(**arguments, backend=backend)
    ops.masked_perturb_(**other, backend=backend)
    assert_all_same(other["weights"], arguments["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_restore_where_a_threshold_of_perturbed_weights_would_not(backend):
    """Perturbed through bits of the clean weights and back: each pass rounds once; the same elements move."""
    (w,) = weights([(37, 129)])
    mask = ops.threshold_bits([w], 0.7)
    (up,) = perturbed([w], [(KEYS[0], 0.3)], bits=mask, backend=backend)
    (same,) = perturbed([w], [(KEYS[0], 0.3)], threshold=0.7, backend=backend)
    assert_same_bits(up, same)
    (back,) = perturbed([up], [(KEYS[0], -0.3)], bits=mask, backend=backend)
    rounding = 2.0**-24 * (up.double().abs() * (1 + 2.0**-23) + w.double().abs() + up.double().abs() * 2.0**-23)
    assert ((back.double() - w.double()).abs() <= rounding).all()
    assert_same_bits(back[w.abs() > 0.7], w[w.abs() > 0.7])
    (lost,) = perturbed([up], [(KEYS[0], -0.3)], threshold=0.7, backend=backend)
    assert ((lost.double() - w.double()).abs() > rounding).sum() > 100


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(**changes) -> dict:
    w = weights([(6, 8), (5, 7)])
    return {"weights": w, "draws": [(1, 0.5)], "tensor_ids": [1, 2], "threshold": 0.5, **changes}


INTS = [torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)]
ONE_MASK = "^threshold, share, bits: got"
REFUSED = {
    "no mask": ({"threshold": None}, ValueError, f"{ONE_MASK} none"),
    "two masks": ({"share": (1, 0.5)}, ValueError, f"{ONE_MASK} threshold, share"),
    "three masks": ({"share": (1, 0.5), "bits": INTS}, ValueError, f"{ONE_MASK} threshold, share, bits"),
    "share a float": ({"threshold": None, "share": 0.5}, TypeError, r"^share: got 0.5; accepted: \(key, probability\)"),
    "share of three": ({"threshold": None, "share": (1, 2, 3)}, TypeError, "^share: got"),
    **{
        f"probability {p!r}": ({"threshold": None, "share": (1, p)}, ValueError, "^share probability: got")
        for p in (-0.1, 1.1, math.nan, torch.tensor(1.5))
    },
    "bits one short": ({"threshold": None, "bits": INTS[:1]}, ValueError, "^bits: got 1 tensors"),
    "bits a tensor": ({"threshold": None, "bits": INTS[0]}, TypeError, "^bits: got Tensor"),
    "bits int64": ({"threshold": None, "bits": [b.long() for b in INTS]}, TypeError, r"^bits\[0\]: got dtype"),
    "bits too short": (
        {"threshold": None, "bits": [INTS[0], INTS[1][:1]]},
        ValueError,
        r"^bits\[1\]: got shape \(1,\).*\(2,\)",
    ),
    "bits too long": ({"threshold": None, "bits": [INTS[0], INTS[0].repeat(2)]}, ValueError, r"^bits\[1\]: got shape"),
    "bits of the shape": (
        {"threshold": None, "bits": [torch.zeros(6, 8, dtype=torch.int32), INTS[1]]},
        ValueError,
        r"^bits\[0\]: got shape",
    ),
    "bits strided": (
        {"threshold": None, "bits": [INTS[0], torch.zeros(4, dtype=torch.int32)[::2]]},
        ValueError,
        r"^bits\[1\]: got shape .* strides",
    ),
    "bits on meta": ({"threshold": None, "bits": [b.to("meta") for b in INTS]}, ValueError, "^bits: got 2 .* on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, error, match = REFUSED[case]
    refused("masked_perturb_", good(**change), error, match)


def test_thresholds_and_keys():
    refused("masked_perturb_", good(threshold=[0.5, math.nan]), ValueError, "^threshold: got nan")
    refused("masked_perturb_", good(threshold=None, share=(-1, 0.5)), ValueError, r"^share key\[0\]: got -1")
    with pytest.raises(ValueError, match=r"^threshold: got nan"):
        ops.threshold_bits(good()["weights"], math.nan)


def test_threshold_bits_refuses():
    for bad, error in ((torch.zeros(3), TypeError), ([], ValueError), ([torch.zeros(3).double()], TypeError)):
        with pytest.raises(error, match=r"^weights"):
            ops.threshold_bits(bad, 0.5)
