"""dense_perturb_ and assemble_gradient_ on the Triton kernels: the very bits of the reference."""

import itertools
import math

import pytest
import torch
from support.agreement import SHAPES
from support.cases import COEFFICIENTS, DISTRIBUTIONS, IDS, KEYS, ROUNDINGS, per_tensor
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, poison, serving, weights

from pgap_kernels import noise

HALF_DTYPES = (torch.bfloat16, torch.float16)
STOCHASTIC = ROUNDINGS["stochastic"]
TABLE = torch.ops.pgap_kernels
SIZES = [(), (0,), (4, 0), (1,), (7,), (31,), (997,), (4095,), (4096,), (4097,), (61, 71)]


def perturbed(tensors, draws, backend, **options):
    """Copies of the tensors after the op."""
    tensors = clones(tensors)
    ops.dense_perturb_(tensors, draws, backend=backend, **{"tensor_ids": IDS[: len(tensors)], **options})
    return tensors


def agreeing(tensors, draws, **options):
    """The same, once both backends gave the same bits."""
    got, want = (perturbed(tensors, draws, b, **options) for b in ("triton", "reference"))
    assert_all_same(got, want)
    return got


# ---- the pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_in_one_launch(dtype, rounding):
    """Nothing, one element, primes, and around the size of a tile."""
    w = weights(SIZES, dtype)
    ids = [noise.tensor_id(f"w{i}") for i in range(len(SIZES))]
    got = agreeing(w, [(KEYS[0], 0.1)], tensor_ids=ids, **ROUNDINGS[rounding])
    assert all(not torch.equal(g, x) for g, x in zip(got, w, strict=True) if x.numel() > 1)


FAR = [(2**31 - 600, 1021), (2**33 + 17, 2**31), (2**44 + 4090, 2**40), (2**62 + 3, 2**40), (2**63 - 3 * 2**45, 2**45)]


@pytest.mark.parametrize(("base", "row_stride"), FAR)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_far_rows(distribution, base, row_stride):
    """Logical indices, and steps between rows, far beyond what the buffers hold; rows begin anywhere in a group."""
    (w,) = weights([(3, 1021)], torch.bfloat16)
    base -= max(0, base % row_stride + 1021 - row_stride)  # within an unsharded row
    agreeing([w], [(KEYS[0], 0.1)], slices=[(base, row_stride)], distribution=distribution, **STOCHASTIC)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fast_tier_is_served_exactly(distribution):
    """Only NVIDIA's GPUs have what it would use."""
    agreeing(weights(SHAPES), [(KEYS[0], 0.1)], tier="fast", distribution=distribution)


def test_fma_rounds_once():
    """Coefficients that cancel leave only what a fused operation keeps."""
    agreeing(weights([(200,)]), [(KEYS[0], 0.3), (KEYS[1], 0.3), (KEYS[2], -0.6)], decay=0.3, distribution="rademacher")


# ---- assemble ------------------------------------------------------------------------------------------------------


def test_assemble_views_and_shards():
    want = ops.draw((50, 300), KEYS[0], IDS[0], backend="reference")
    (buffer,) = poison([torch.empty(9, 400)])
    views = [buffer[1:3, 7:107], buffer[4:, 301:399]]
    spans = [(3 * 300 + 5, 300), (9 * 300 + 200, 300)]
    ops.assemble_gradient_(views, [(KEYS[0], 1.0)], tensor_ids=[IDS[0]] * 2, slices=spans, backend="triton")
    assert_same_bits(views[0].contiguous(), want[3:5, 5:105].contiguous())
    assert_same_bits(views[1].contiguous(), want[9:14, 200:298].contiguous())
    assert buffer.isnan().sum() == buffer.numel() - views[0].numel() - views[1].numel()


# ---- stages --------------------------------------------------------------------------------------------------------


def staged(tensors, stages, decays, rounding_keys, backend, out=None):
    """The op itself, which the public function calls with one stage."""
    count = sum(stages)
    keys = torch.tensor([k - (k >> 63 << 64) for k in (KEYS + KEYS)[:count]], dtype=torch.int64)
    scales = torch.arange(1, len(tensors) + 1)
    keywords = {
        "keys": keys,
        "coefficients": torch.tensor((COEFFICIENTS + COEFFICIENTS)[:count])[:, None] * scales,
        "decay": torch.tensor(decays)[:, None],
        "rounding_keys": rounding_keys and torch.tensor(rounding_keys),
        "stages": stages,
        "tensor_ids": IDS[: len(tensors)],
    }
    with serving(backend):
        if out is None:
            TABLE.dense_perturb_(tensors, **keywords)
        else:
            TABLE.dense_perturb_.out(tensors, **keywords, out=out)
    return tensors if out is None else out


STAGES = [
    ([2, 1, 0, 1], [0.0, 0.1, 0.05, 0.0], [71, -72, 73, 74]),
    ([0, 1], [0.0, 0.0], [-1, 2]),
    ([0], [0.05], [5]),
    ([0, 0], [0.0, 0.3], [5, 6]),
]


@pytest.mark.parametrize(("stages", "decays", "rounding"), STAGES, ids=lambda v: "-".join(map(str, v)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_stages(dtype, stages, decays, rounding):
    w = weights([(), (33,), (4097,)], dtype)
    want = staged(clones(w), stages, decays, None, "reference")
    assert_all_same(staged(clones(w), stages, decays, None, "triton"), want)
    want = staged(clones(w), stages, decays, rounding, "reference")
    assert_all_same(staged(w, stages, decays, rounding, "triton", out=poison(w)), want)


def test_zeros_keep_their_sign_as_the_reference_has_it():
    """A draw of coefficient 0 adds a signed zero, a stage without draws +0."""
    for dtype in DTYPES:
        zeros = [torch.tensor([0.0, -0.0] * 100, dtype=dtype)]
        for coefficient in (0.0, -0.0):
            agreeing(zeros, [(KEYS[0], coefficient)])
            agreeing(zeros, [(KEYS[0], coefficient), (KEYS[1], -0.0)], decay=0.5)
        want = staged(clones(zeros), [0], [0.0], None, "reference")
        assert_all_same(staged(clones(zeros), [0], [0.0], None, "triton"), want)


# ---- values at the edges -------------------------------------------------------------------------------------------

SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, -6e-8, 1e-40, -1e-45, 65504.0, -65504.0, 3.38e38, 1e-3, 1.0]


@pytest.mark.parametrize("coefficient", [0.0, 1e-42, 1e-7, 100.0, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_weights(dtype, coefficient):
    """Infinities, NaN, subnormal numbers, both zeros, and results that overflow."""
    w = [torch.tensor(SPECIAL * 40, dtype=torch.float64).to(dtype)]
    for decay, options in itertools.product((0.0, 0.5), ROUNDINGS.values()):
        agreeing(w, [(KEYS[0], coefficient), (KEYS[1], coefficient)], decay=decay, **options)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 64.0), (torch.bfloat16, 2.0**121)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_overflow(rounding, dtype, step):
    """Steps of two ulp from the largest value: to infinity or to the value below."""
    w = [torch.full((256,), torch.finfo(dtype).max, dtype=dtype)]
    (got,) = agreeing(w, [(KEYS[0], step)], distribution="rademacher", **ROUNDINGS[rounding])
    assert got.isinf().any() and got.isfinite().any()


@pytest.mark.parametrize(
    ("dtype", "boundary", "ulp"), [(torch.float16, 2.0**-14, 2.0**-24), (torch.bfloat16, 2.0**-126, 2.0**-133)]
)
def test_stochastic_rounding_at_the_subnormal_boundary(dtype, boundary, ulp):
    """Both signs, every subnormal number of the last binade and as many normal ones, moved by parts of an ulp."""
    steps = torch.arange(-512, 513) if dtype == torch.float16 else torch.arange(-64, 65)
    values = torch.cat([steps.double() * ulp + boundary, torch.arange(0, 65).double() * ulp])
    w = [torch.cat([values, -values]).to(dtype)]
    for part in (0.0, 2.0**-16, 0.3, 0.5, 1 - 2.0**-16, 1.7):
        agreeing(w, [(KEYS[0], part * ulp)], distribution="rademacher", **STOCHASTIC)
    agreeing(w, [(KEYS[0], ulp)], **STOCHASTIC)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_nearest_rounding_breaks_ties_to_even(dtype):
    """Steps of half an ulp from even and odd values, and a hair to either side of the tie."""
    ulp = torch.finfo(dtype).eps
    w = [(1 + torch.arange(100).double() * ulp).to(dtype)]
    for part in (0.5, 0.5 + 2.0**-12, 0.5 - 2.0**-12):
        agreeing(w, [(KEYS[0], part * ulp)], distribution="rademacher")


def test_per_tensor_decay_of_zero_reads_no_sign():
    """A decay of 0 adds nothing, not even -0, in a list where another tensor decays."""
    w = [torch.tensor([0.0, -0.0, 1.0] * 30), torch.tensor([0.0, -0.0, 1.0] * 30)]
    agreeing(w, [(KEYS[0], 0.0)], decay=per_tensor([0.0, 0.25], 2))
