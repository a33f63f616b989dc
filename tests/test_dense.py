"""dense_perturb_ and assemble_gradient_: the formula, views, far shards, stages, rounding."""

import bisect
import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
from support.exact import exact_dense, round32
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, poison, serving, weights

from pgap_kernels import noise, reference

BACKENDS = ("reference", "cpu")
HALF_DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [(), (0,), (4, 0), (1,), (33,), (37, 129), (4097,), (3, 5, 2, 2), (5003,)]
IDS = [noise.tensor_id(f"w{i}") for i in range(len(SHAPES))]
KEYS = [noise.derive(9, step, noise.Role.DENSE) for step in range(5)]
COEFFICIENTS = [1e-3, -0.37, 2.5e-2, 1.0, -1e-6]
ROUNDING_KEY = noise.derive(9, 0, noise.Role.ROUNDING)
DRAWS = list(zip(KEYS, COEFFICIENTS, strict=True))
STOCHASTIC = {"rounding": "stochastic", "rounding_key": ROUNDING_KEY}
TABLE = torch.ops.pgap_kernels


def perturbed(tensors, draws, ids=None, **options):
    """Copies of the tensors after the op."""
    tensors = clones(tensors)
    ops.dense_perturb_(tensors, draws, tensor_ids=IDS[: len(tensors)] if ids is None else ids, **options)
    return tensors


# ---- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1, 1e-8])
@pytest.mark.parametrize("draws", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_in_exact_arithmetic(backend, dtype, draws, decay):
    (w,) = weights([(300,)], dtype, seed=draws)
    (got,) = perturbed([w], DRAWS[:draws], decay=decay, backend=backend)
    zs = torch.stack([ops.draw(300, key, IDS[0], backend="reference") for key in KEYS[:draws]], 1).tolist()
    want = [exact_dense(x, z, COEFFICIENTS[:draws], decay) for x, z in zip(w.tolist(), zs, strict=True)]
    assert_same_bits(got, torch.tensor(want, dtype=torch.float64).float().to(dtype))


def test_fma_rounds_once():
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(2000, generator=generator) for _ in range(3))
    c[1::3] = -(a * b)[1::3]  # what is left is the rounding of the product
    # A hair off a tie, further than float64 sees: rounding twice goes the wrong way.
    a[2::3], b[2::3] = (1 + 2.0**-23) * 2.0**-12, (1 - 2.0**-23) * 2.0**-12
    a[2::6] *= -1
    c[2::3] = 1 + torch.arange(len(c[2::3])) * 2.0**-23
    want = [
        float(round32(Fraction(x) * Fraction(y) + Fraction(z)))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert torch.equal(reference.fma(a, b, c), torch.tensor(want, dtype=torch.float64).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_fma_of_signs_rounds_once(backend):
    """Coefficients that cancel in the second draw leave only what a fused operation keeps."""
    (w,) = weights([(200,)], seed=4)
    draws = [(KEYS[0], 0.3), (KEYS[1], 0.3), (KEYS[2], -0.6)]
    (got,) = perturbed([w], draws, decay=0.3, distribution="rademacher", backend=backend)
    zs = [ops.draw(200, key, IDS[0], distribution="rademacher").tolist() for key, _ in draws]
    for x, z, g in zip(w.tolist(), zip(*zs, strict=True), got.tolist(), strict=True):
        assert g == exact_dense(x, list(z), [0.3, 0.3, -0.6], 0.3)


@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_draw_of_signs(dtype, decay):
    """The C++ kernel keeps it in registers over a whole group, if rounded to nearest."""
    options = {"decay": decay, "distribution": "rademacher"}
    got, want = (perturbed(weights(SHAPES, dtype), DRAWS[:1], backend=b, **options) for b in ("cpu", "reference"))
    assert_all_same(got, want)


@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_cpu_serves_both_tiers_exactly(tier):
    w = weights(SHAPES)
    assert_all_same(perturbed(w, DRAWS, tier=tier), perturbed(w, DRAWS, backend="reference"))


@pytest.mark.parametrize(
    ("coefficient", "decay", "rounding"),
    [(0.0, 0.5, {}), (1e-42, 0.0, {}), (1e-7, 0.5, STOCHASTIC), (100.0, 0.0, STOCHASTIC), (3e38, 0.0, {})],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_of_every_size(dtype, coefficient, decay, rounding):
    w = [torch.tensor(SPECIAL * 40, dtype=torch.float64).to(dtype)]
    draws = [(KEYS[0], coefficient), (KEYS[1], coefficient)]
    got, want = (perturbed(w, draws, decay=decay, backend=b, **rounding) for b in ("cpu", "reference"))
    assert_all_same(got, want)
    if coefficient < 1e38 and not decay:
        infinite = w[0].isinf()
        assert torch.equal(got[0][infinite], w[0][infinite])


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, -6e-8, 1e-40, -1e-45, 65504.0, -65504.0, 3.38e38, 1e-3, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
def test_float16_overflows_to_infinity(backend, options):
    w = [torch.full((256,), 65504.0, dtype=torch.float16)]
    (got,) = perturbed(w, [(KEYS[0], 64.0)], distribution="rademacher", backend=backend, **options)
    signs = ops.draw(256, KEYS[0], IDS[0], distribution="rademacher")
    assert set(got.tolist()) == {math.inf, 65440.0}
    assert torch.equal(got.isinf(), signs > 0)


def test_rounding_key_matters_and_leaves_float32_alone():
    w = weights(SHAPES, torch.bfloat16)
    first, second = (perturbed(w, DRAWS, rounding="stochastic", rounding_key=key)[5] for key in (1, 2))
    assert not torch.equal(first, second)
    wide = weights(SHAPES)
    assert_all_same(perturbed(wide, DRAWS, **STOCHASTIC), perturbed(wide, DRAWS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_does_not_matter(dtype, backend):
    """A tensor is its row-major elements; a matrix's noise is that of the flat tensor."""
    (w,) = weights([(30, 4, 7, 5)], dtype)
    (want,) = perturbed([w], DRAWS[:2], backend=backend, **STOCHASTIC)
    for shape in ((4200,), (60, 70), (4200, 1), (1, 4200)):
        (got,) = perturbed([w.view(shape)], DRAWS[:2], backend=backend, **STOCHASTIC)
        assert_same_bits(got.view(w.shape), want)


VIEWS = {
    "rows": lambda t: t[3:11],
    "columns": lambda t: t[:, 5:77],
    "one column": lambda t: t[:, 7:8],
    "rows and columns": lambda t: t[1:40, 30:],
    "one row": lambda t: t[4],
    "part of a row": lambda t: t[4, 9:50],
    "one element": lambda t: t[2, 3],
    "none": lambda t: t[5:5],
    "no columns": lambda t: t[:, 3:3],
    "convolution": lambda t: t.view(40, 2, 5, 13)[7:22],
    "convolution rows of a wider one": lambda t: t[:, 13 : 13 + 39].unflatten(1, (3, 13)),
}


@pytest.mark.parametrize(("view", "dtype"), [*zip(VIEWS, itertools.cycle(DTYPES), strict=False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_written_and_nothing_else(backend, dtype, view):
    (whole,) = weights([(40, 130)], dtype)
    before, inside = whole.clone(), torch.zeros(whole.shape, dtype=torch.bool)
    (want,) = perturbed([VIEWS[view](whole).contiguous()], DRAWS[:2], backend="cpu", **STOCHASTIC)
    ops.dense_perturb_([VIEWS[view](whole)], DRAWS[:2], tensor_ids=IDS[:1], backend=backend, **STOCHASTIC)
    assert_same_bits(VIEWS[view](whole).contiguous(), want)
    VIEWS[view](inside).fill_(True)
    assert_same_bits(whole[~inside], before[~inside])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guards_around_stay(backend, dtype):
    """Every length and alignment up to a few vectors, with poison before and behind."""
    for length in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65):
        for start in (16, 19):
            buffer = torch.full((128,), math.nan, dtype=dtype)
            view = buffer[start : start + length]
            view.copy_(torch.arange(length) / 8)
            (want,) = perturbed([view.clone()], DRAWS[:2], backend="reference")
            ops.dense_perturb_([view], DRAWS[:2], tensor_ids=IDS[:1], backend=backend)
            assert_same_bits(view, want)
            assert buffer[:start].isnan().all() and buffer[start + length :].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_and_weights_of_different_strides(backend):
    (source,) = weights([(40, 130)], torch.bfloat16)
    (target,) = poison([source])
    view, out = source[3:20, 5:50], target[20:37, 70:115]
    (want,) = perturbed([view.contiguous()], DRAWS[:2], backend="reference", **STOCHASTIC)
    ops.dense_perturb_([view], DRAWS[:2], tensor_ids=IDS[:1], out=[out], backend=backend, **STOCHASTIC)
    assert_same_bits(out.contiguous(), want)
    assert target.isnan().sum() == target.numel() - out.numel()


# ---- shards --------------------------------------------------------------------------------------------------------

WHOLE = (50, 300)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize(("base", "row_stride"), [(2**31 - 5, 40), (2**33, 10_000), (2**62 + 3, 2**40), (4090, 2**50)])
def test_far_shards(base, row_stride, distribution):
    (w,) = weights([(9, 33)], torch.float16)
    options = {"slices": [(base, row_stride)], "distribution": distribution, **STOCHASTIC}
    if base % row_stride + 33 > row_stride:
        base = base // row_stride * row_stride
        options["slices"] = [(base, row_stride)]
    (got,), (want,) = (perturbed([w], DRAWS[:2], backend=b, **options) for b in ("cpu", "reference"))
    assert_same_bits(got, want)
    for row in (0, 4, 8):
        start = base + row * row_stride
        spans = [(start, 1 << 62 if start < 1 << 61 else (1 << 63) - 1)]
        (want,) = perturbed([w[row].clone()], DRAWS[:2], backend="reference", **{**options, "slices": spans})
        assert_same_bits(got[row], want)


def test_shards_of_one_weight_in_one_list():
    (w,) = weights([WHOLE])
    (whole,) = perturbed([w], DRAWS[:2])
    pieces = [w[:, :100], w[:, 100:101], w[:, 101:]]
    starts = [0, 100, 101]
    spans = [(s, WHOLE[1]) for s in starts]
    ops.dense_perturb_(pieces, DRAWS[:2], tensor_ids=[IDS[0]] * 3, slices=spans)
    assert_same_bits(w, whole)


# ---- stages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", ["in place", "out"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pass_of_stages_is_the_separate_passes(backend, dtype, stochastic, overload):
    stages, decays, rounding = [2, 1, 0, 2], [0.0, 0.1, 0.05, 0.0], [71, -72, 73, 74]
    w = weights([(), (0,), (33,), (37, 129), (4097,)], dtype)
    many = torch.tensor(COEFFICIENTS)[:, None].expand(-1, len(w)) * torch.arange(1, len(w) + 1)
    keys = torch.tensor([key - (key >> 63 << 64) for key in KEYS])

    def arguments(draws, decay, rounding_keys, stages):
        return {
            "keys": keys[draws],
            "coefficients": many[draws].contiguous(),
            "decay": torch.tensor(decay)[:, None],
            "rounding_keys": torch.tensor(rounding_keys) if stochastic else None,
            "stages": stages,
            "tensor_ids": IDS[: len(w)],
        }

    want, draw = clones(w), 0
    for count, decay, key in zip(stages, decays, rounding, strict=True):
        pass_alone = arguments(slice(draw, draw + max(count, 1)), [decay], [key], [max(count, 1)])
        if not count:  # decay alone: the same as a draw of coefficient 0
            pass_alone["coefficients"] = torch.zeros(1, 1)
        with serving("reference"):
            TABLE.dense_perturb_(want, **pass_alone)
        draw += count
    together = arguments(slice(None), decays, rounding, stages)
    with serving(backend):
        if overload == "in place":
            got = clones(w)
            TABLE.dense_perturb_(got, **together)
        else:
            got = poison(w)
            TABLE.dense_perturb_.out(w, **together, out=got)
    assert_all_same(got, want)


# ---- assemble ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_assemble_views_shards_and_coefficients(backend):
    (whole,) = poison([torch.empty(WHOLE)])
    ops.assemble_gradient_([whole], DRAWS, tensor_ids=IDS[:1], backend=backend)
    assert whole.isfinite().all()
    (buffer,) = poison([torch.empty(60, 400)])
    views = [buffer[2:14, 7:107], buffer[20:57, 300:]]
    coefficients = [(key, [a, a]) for key, a in DRAWS]
    ops.assemble_gradient_(
        views, coefficients, tensor_ids=[IDS[0]] * 2, slices=[(3 * 300 + 5, 300), (9 * 300 + 200, 300)], backend=backend
    )
    assert_same_bits(views[0].contiguous(), whole[3:15, 5:105].contiguous())
    assert_same_bits(views[1].contiguous(), whole[9:46, 200:].contiguous())
    assert buffer.isnan().sum() == buffer.numel() - views[0].numel() - views[1].numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_assembled_is_what_a_pass_adds_to_zeros(backend):
    zeros = [torch.zeros(shape) for shape in SHAPES]
    gradients = poison(zeros)
    ops.assemble_gradient_(gradients, DRAWS, tensor_ids=IDS, backend=backend)
    assert all(torch.equal(g, w) for g, w in zip(gradients, perturbed(zeros, DRAWS, backend=backend), strict=True))


# ---- algebra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coefficient", [1e-3, 1.0])
def test_perturb_and_restore(backend, coefficient):
    """Each pass rounds once, by at most 2**-24 of the exact sum; the deltas cancel exactly."""
    (w,) = weights([(37, 129)], scale=0.02)
    (up,) = perturbed([w], [(KEYS[0], coefficient)], backend=backend)
    (back,) = perturbed([up], [(KEYS[0], -coefficient)], backend=backend)
    w, up, back = w.double(), up.double(), back.double()
    first = 2.0**-24 * up.abs() / (1 - 2.0**-24)
    assert ((back - w).abs() <= first + 2.0**-24 * (w.abs() + first)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_draws_in_one_pass_cancel(dtype, backend):
    w = weights(SHAPES, dtype)
    assert_all_same(perturbed(w, [(KEYS[0], 0.5), (KEYS[0], -0.5)], backend=backend), w)


# ---- stochastic rounding -------------------------------------------------------------------------------------------


@functools.cache
def magnitudes(dtype) -> list[float]:
    """All finite values >= 0 of a 16-bit type."""
    values = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    return values[values.isfinite()].tolist()


def exact_stochastic(value: float, word: int, dtype) -> float:
    table, magnitude = magnitudes(dtype), abs(value)
    if not magnitude <= table[-1]:
        return torch.tensor(value, dtype=torch.float32).to(dtype).item()
    i = bisect.bisect_right(table, magnitude) - 1
    if table[i] != magnitude:
        low, high = Fraction(table[i]), Fraction(table[i + 1])
        i += Fraction(word >> 16, 1 << 16) < (Fraction(magnitude) - low) / (high - low)
    return math.copysign(table[i], value)


VALUES = [0.0, 1.0, 1.001, 1 + 2.0**-9, 1 / 3, 0.1, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 1e-7, 6.1e-5, 6.104e-5, 1e-40]
VALUES += [2.0**-133, 2.0**-134, 2.0**-149, 65504.0, 65503.9, 65505.0, 65519.0, 65520.0, 3.38e38, 3.3895e38, 3.4e38]
WORDS = [0, 1 << 16, 0x7FFF0000, 0x7FFFFFFF, 0x80000000, 0x8000FFFF, 0xFFFE0000, 0xFFFF0000, 0xFFFFFFFF, 0x33330000]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_is_its_definition(dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.cat(
        [torch.tensor(VALUES), torch.randn(100, generator=generator) * 10.0 ** torch.arange(-7, 3).repeat(10)]
    )
    values = torch.cat([values, -values])
    for word in WORDS:
        words = torch.full(values.shape, word)
        want = [exact_stochastic(v, word, dtype) for v in values.tolist()]
        got = reference.stochastic_round(values, words, dtype)
        assert_same_bits(got, torch.tensor(want, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_pass_rounds_the_float32_pass(backend, dtype, scale):
    """The float32 pass over the same values gives what is rounded; the words are those of the rounding key."""
    count = 3000
    (w,) = weights([(count,)], dtype, scale=scale)
    draws = [(KEYS[0], 0.3 * scale), (KEYS[1], -0.01 * scale)]
    (wide,) = perturbed([w.float()], draws, decay=0.01, backend=backend)
    (got,) = perturbed([w], draws, decay=0.01, backend=backend, **STOCHASTIC)
    halves = (ROUNDING_KEY & 0xFFFFFFFF, ROUNDING_KEY >> 32)
    want = []
    for e, value in enumerate(wide.tolist()):
        counter, lane = noise.element_counter(e, IDS[0])
        want.append(exact_stochastic(value, noise.philox4x32(counter, halves, noise.ROUNDS)[lane], dtype))
    assert_same_bits(got, torch.tensor(want, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "start", "ulp"),
    [(torch.bfloat16, 1.0, 2.0**-7), (torch.float16, -3.0, 2.0**-9), (torch.float16, 5 * 2.0**-24, 2.0**-24)],
)
@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
def test_stochastic_rounding_is_right_on_average(dtype, start, ulp, part):
    """Steps away from zero of `part` ulp move by a whole ulp with that probability, over 32 keys; 5 sigma, plus the
    2**-16 to which the probability is resolved."""
    n, moved = 8192, 0
    step = math.copysign(part * ulp, start)
    up = ops.draw(n, KEYS[0], 1, distribution="rademacher") > 0
    for key in range(32):
        w = torch.full((n,), start, dtype=dtype)
        ops.dense_perturb_(
            [w], [(KEYS[0], step)], tensor_ids=[1], distribution="rademacher", rounding="stochastic", rounding_key=key
        )
        steps = (w[up].double() - start).abs() / ulp
        assert ((steps == 0) | (steps == 1)).all()
        moved += steps.sum().item()
    total = 32 * int(up.sum())
    assert abs(moved / total - part) <= 5 * math.sqrt(part * (1 - part) / total) + 2.0**-16


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_write(backend):
    w = torch.nn.Parameter(torch.ones(4))
    x = torch.ones(4, requires_grad=True)
    y = (x * w).sum()
    ops.dense_perturb_([w], DRAWS[:1], tensor_ids=[1], backend=backend)
    assert w.requires_grad and w.is_leaf and w.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
