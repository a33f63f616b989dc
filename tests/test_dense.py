"""dense_perturb_ and assemble_gradient_: the formula, the backends, layouts, shards, stages, rounding."""

import bisect
import functools
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


# ---- cpu = reference -----------------------------------------------------------------------------------------------

PER_TENSOR_DECAY = [0.0 if i % 2 else 0.01 * i for i in range(len(SHAPES))]


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("decay", [0.0, 0.03, PER_TENSOR_DECAY], ids=["none", "float", "per-tensor"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("draws", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_is_the_reference(dtype, draws, distribution, decay, options):
    w = weights(SHAPES, dtype)
    got, want = (
        perturbed(w, DRAWS[:draws], decay=decay, distribution=distribution, backend=b, **options)
        for b in ("cpu", "reference")
    )
    assert_all_same(got, want)
    assert not torch.equal(got[5], w[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    """Tensors without elements are fine, wherever the zero stands."""
    w = weights([(0, 5), (2, 0, 3), (0,), (3, 2)])
    (want,) = perturbed(w[3:], DRAWS[:1], ids=[3], backend=backend)
    assert_same_bits(perturbed(w, DRAWS[:1], ids=[0, 1, 2, 3], backend=backend)[3], want)


@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_cpu_serves_both_tiers_exactly(tier):
    w = weights(SHAPES)
    assert_all_same(perturbed(w, DRAWS, tier=tier), perturbed(w, DRAWS, backend="reference"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(set_threads, dtype, threads):
    set_threads(threads)
    w = weights([(300, 401), (70001,)], dtype)
    want = [whole_pass(dtype, i) for i in range(2)]
    assert_all_same(perturbed(w, DRAWS[:2], decay=0.01, **STOCHASTIC), want)


@functools.cache
def whole_pass(dtype, i):
    w = weights([(300, 401), (70001,)], dtype)
    options = {"decay": 0.01, "backend": "reference", **STOCHASTIC}
    return perturbed(w[i : i + 1], DRAWS[:2], ids=IDS[i : i + 1], **options)[0]


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, -6e-8, 1e-40, -1e-45, 65504.0, -65504.0, 3.38e38, 1e-3, 1.0]


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("coefficient", [0.0, 1e-42, 1e-7, 100.0, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_weights(dtype, coefficient, decay, options):
    w = [torch.tensor(SPECIAL * 40, dtype=torch.float64).to(dtype)]
    draws = [(KEYS[0], coefficient), (KEYS[1], coefficient)]
    got, want = (perturbed(w, draws, decay=decay, backend=b, **options) for b in ("cpu", "reference"))
    assert_all_same(got, want)
    assert got[0][w[0].isnan()].isnan().all()
    if coefficient < 1e38 and not decay:
        infinite = w[0].isinf()
        assert torch.equal(got[0][infinite], w[0][infinite])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
def test_float16_overflows_to_infinity(backend, options):
    w = [torch.full((256,), 65504.0, dtype=torch.float16)]
    (got,) = perturbed(w, [(KEYS[0], 64.0)], distribution="rademacher", backend=backend, **options)
    signs = ops.draw(256, KEYS[0], IDS[0], distribution="rademacher")
    assert set(got.tolist()) == {math.inf, 65440.0}
    assert torch.equal(got.isinf(), signs > 0)


# ---- coefficients and keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_tensor_coefficients_are_single_calls(dtype, backend):
    w = weights(SHAPES, dtype)
    many = [0.01 * (i + 1) for i in range(len(w))]
    got = perturbed(w, [(KEYS[0], many), (KEYS[1], 0.5)], decay=many[::-1], backend=backend, **STOCHASTIC)
    for i in range(len(w)):
        draws = [(KEYS[0], many[i]), (KEYS[1], 0.5)]
        decay = many[::-1][i]
        (want,) = perturbed(w[i : i + 1], draws, ids=[IDS[i]], decay=decay, backend=backend, **STOCHASTIC)
        assert_same_bits(got[i], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_and_keys_in_tensors(backend):
    w = weights(SHAPES)
    many = [0.01 * (i + 1) for i in range(len(w))]
    want = perturbed(w, [(KEYS[0], 0.25), (2**64 - 2, many)], decay=0.125, backend=backend)
    draws = [(torch.tensor(KEYS[0] - (KEYS[0] >> 63 << 64)), torch.tensor(0.25)), (torch.tensor([-2]), many)]
    assert_all_same(perturbed(w, draws, decay=torch.tensor([0.125]), backend=backend), want)
    draws = [(KEYS[0], torch.tensor([0.25], dtype=torch.float64)), (2**64 - 2, torch.tensor(many))]
    assert_all_same(perturbed(w, draws, decay=torch.full((len(w),), 0.125), backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_key_in_a_tensor(backend):
    w = weights(SHAPES, torch.bfloat16)
    key = torch.tensor(ROUNDING_KEY - (ROUNDING_KEY >> 63 << 64))
    got = perturbed(w, DRAWS, rounding="stochastic", rounding_key=key, backend=backend)
    assert_all_same(got, perturbed(w, DRAWS, backend=backend, **STOCHASTIC))


def test_rounding_key_matters_and_leaves_float32_alone():
    w = weights(SHAPES, torch.bfloat16)
    first, second = (perturbed(w, DRAWS, rounding="stochastic", rounding_key=key)[5] for key in (1, 2))
    assert not torch.equal(first, second)
    wide = weights(SHAPES)
    assert_all_same(perturbed(wide, DRAWS, **STOCHASTIC), perturbed(wide, DRAWS))


# ---- lists, order, layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_and_subsets_do_not_matter(dtype, backend):
    w = weights(SHAPES, dtype)
    whole = perturbed(w, DRAWS[:2], backend=backend, **STOCHASTIC)
    for order in ([8, 5, 0, 6, 2], [5], list(range(len(w)))[::-1]):
        got = perturbed([w[i] for i in order], DRAWS[:2], ids=[IDS[i] for i in order], backend=backend, **STOCHASTIC)
        assert_all_same(got, [whole[i] for i in order])


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


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out(backend, dtype, options):
    w = weights(SHAPES, dtype)
    out, before = poison(w), clones(w)
    ops.dense_perturb_(w, DRAWS[:2], tensor_ids=IDS, decay=0.01, out=out, backend=backend, **options)
    assert_all_same(out, perturbed(w, DRAWS[:2], decay=0.01, backend=backend, **options))
    assert_all_same(w, before)


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
SHARDS = [(0, 50, 0, 300), (7, 19, 0, 300), (0, 50, 100, 300), (13, 14, 0, 300), (3, 44, 17, 18), (21, 50, 250, 300)]


@pytest.mark.parametrize("shard", SHARDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_draw_their_slice(backend, dtype, shard):
    top, bottom, left, right = shard
    (w,) = weights([WHOLE], dtype)
    (whole,) = perturbed([w], DRAWS[:2], decay=0.02, backend=backend, **STOCHASTIC)
    spans = [(top * WHOLE[1] + left, WHOLE[1])]
    local = w[top:bottom, left:right].contiguous()
    (got,) = perturbed([local], DRAWS[:2], decay=0.02, slices=spans, backend=backend, **STOCHASTIC)
    assert_same_bits(got, whole[top:bottom, left:right].contiguous())


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


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_assemble(draws, distribution):
    zeros = [torch.zeros(shape) for shape in SHAPES]
    results = {}
    for backend in BACKENDS:
        results[backend] = poison(zeros)
        options = {"tensor_ids": IDS, "distribution": distribution, "backend": backend}
        ops.assemble_gradient_(results[backend], DRAWS[:draws], **options)
    assert_all_same(results["cpu"], results["reference"])
    for got, want in zip(results["cpu"], perturbed(zeros, DRAWS[:draws], distribution=distribution), strict=True):
        assert torch.equal(got, want)


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


# ---- registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_version_counters(backend):
    w = weights(SHAPES)
    out = poison(w)
    scalars = [torch.tensor(5), torch.tensor(0.5), torch.tensor(0.1)]
    draws = [(scalars[0], scalars[1])]

    def versions(tensors):
        return [t._version for t in tensors]

    before_out, before, before_scalars = versions(out), versions(w), versions(scalars)
    ops.dense_perturb_(w, draws, tensor_ids=IDS, decay=scalars[2], out=out, backend=backend)
    assert versions(w) == before
    assert all(a > b for a, b in zip(versions(out), before_out, strict=True))
    ops.dense_perturb_(w, draws, tensor_ids=IDS, decay=scalars[2], backend=backend)
    assert all(a > b for a, b in zip(versions(w), before, strict=True))
    before = versions(out)
    ops.assemble_gradient_(out, draws, tensor_ids=IDS, backend=backend)
    assert all(a > b for a, b in zip(versions(out), before, strict=True))
    assert versions(scalars) == before_scalars


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_write(backend):
    w = torch.nn.Parameter(torch.ones(4))
    x = torch.ones(4, requires_grad=True)
    y = (x * w).sum()
    ops.dense_perturb_([w], DRAWS[:1], tensor_ids=[1], backend=backend)
    assert w.requires_grad and w.is_leaf and w.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    (w,) = weights([(5, 7)])
    (want,) = perturbed([w], DRAWS[:2], backend=backend)
    with torch.inference_mode():
        inside = w.clone()
        ops.dense_perturb_([inside], DRAWS[:2], tensor_ids=IDS[:1], backend=backend)
        assert torch.equal(inside, want)


def op_arguments(dtype) -> tuple[list, dict]:
    """Weights, and the keywords of the op."""
    keywords = {
        "keys": torch.tensor([3, -4]),
        "coefficients": torch.tensor([[0.5], [-0.25]]),
        "decay": torch.tensor([[0.0, 0.1], [0.0, 0.0]]),
        "stages": [1, 1],
        "tensor_ids": [1, 2],
    }
    if dtype != torch.float32:
        keywords |= {"rounding_keys": torch.tensor([5, 6]), "slices": [0, 7, 0, 9]}
    return weights([(5, 7), (9,)], dtype), keywords


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_dense(backend, dtype):
    w, keywords = op_arguments(dtype)
    with serving(backend):
        torch.library.opcheck(TABLE.dense_perturb_.default, (w,), keywords)
        torch.library.opcheck(TABLE.dense_perturb_.out, (w,), {**keywords, "out": clones(w)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_assemble(backend):
    w, keywords = op_arguments(torch.float32)
    own = {name: keywords[name] for name in ("keys", "coefficients", "tensor_ids")}
    with serving(backend):
        torch.library.opcheck(TABLE.assemble_gradient_.default, (w,), own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_op(dtype):
    w, keywords = op_arguments(dtype)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(w):
        TABLE.dense_perturb_(w, **keywords)
        return w[0].float() * 2

    want, got = clones(w), clones(w)
    TABLE.dense_perturb_(want, **keywords)
    assert torch.equal(step(got), want[0].float() * 2)
    assert_all_same(got, want)


def test_compiled_public_function():
    """Whatever the compiler makes of the checks, a function that calls the op still works."""

    @torch.compile(backend="aot_eager")
    def step(w):
        ops.dense_perturb_([w], DRAWS[:2], tensor_ids=IDS[:1])
        return w * 2

    (w,) = weights([(5, 7)])
    (want,) = perturbed([w], DRAWS[:2])
    assert torch.equal(step(w), want * 2)
    assert_same_bits(w, want)


# ---- the extension guards memory whoever calls it -------------------------------------------------------------------


@pytest.mark.parametrize(
    "coefficients, decay, ids, span, accepted",
    [
        (torch.ones(1, 2), torch.zeros(1, 3), [1, 2, 3], (0, 8), "tables of one column"),
        (torch.ones(1, 0), torch.zeros(1, 1), [1, 2, 3], (0, 8), "tables of one column"),
        (torch.ones(1), torch.zeros(1, 1), [1, 2, 3], (0, 8), "tables of one column"),
        (torch.ones(1, 1), torch.zeros(1, 1), [1, 2, 1 << 32], (0, 8), "tensor_ids"),
        (torch.ones(1, 1), torch.zeros(1, 1), [1, 2, 3], ((1 << 63) - 4, 8), "slices"),
        (torch.ones(1, 1), torch.zeros(1, 1), [1, 2, 3], (0, 7), "slices"),
    ],
)
def test_extension_refuses_what_it_cannot_index(coefficients, decay, ids, span, accepted):
    weights = [torch.zeros(8) for _ in range(3)]
    keys = torch.tensor([1])
    with pytest.raises(RuntimeError, match=accepted):
        torch.ops.pgap_kernels_cpu.dense(
            [], weights, True, keys, coefficients, decay, None, [1], ids, [*span] * 3, "normal"
        )
    assert all((w == 0).all() for w in weights)
