"""seeded_dot and squared_norms: against exact sums, and the order of summation."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from support.cases import IDS, KEYS, dot_arguments, norm_arguments, run
from support.helpers import DTYPES, ops, weights
from support.sums import REDUCED, products

BACKENDS = ("reference", "cpu")


# ---- the sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_exact_to_rounding(backend, name):
    """n float64 additions in any order are off by at most (n - 1) 2**-53 / (1 - ...) of the sum of magnitudes."""
    (got,) = run(REDUCED[name], backend)
    assert got.dtype == torch.float64 and got.shape == (len(REDUCED[name].build()["tensors"]),)
    for value, terms in zip(got.tolist(), products(REDUCED[name].build()), strict=True):
        unit = max(len(terms) - 1, 0) * 2.0**-53
        assert abs(value - math.fsum(terms)) <= unit / (1 - unit) * math.fsum(abs(terms))


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_the_definition(backend):
    """A few elements, in fractions."""
    (x,), (anchor,) = weights([(5,)]), weights([(5,)], seed=1)
    z = ops.draw(5, KEYS[0], IDS[0]).tolist()
    for got, terms in (
        (
            ops.seeded_dot([x], KEYS[0], tensor_ids=IDS[:1], backend=backend),
            [Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), z, strict=True)],
        ),
        (
            ops.squared_norms([x], [anchor], backend=backend),
            [Fraction(d) ** 2 for d in (x - anchor).tolist()],
        ),
    ):
        assert abs(Fraction(got.item()) - sum(terms)) <= Fraction(4, (1 << 53) - 4) * sum(map(abs, terms))


@pytest.mark.parametrize(("kind", "offset"), [("norm", 0), *(("dot", offset) for offset in (0, 5, 4090, 2**33 + 17))])
def test_cpu_sums_groups_in_order(kind, offset):
    """A part per group of 4096 logical elements, itself of 16 sums taken in turn; then the parts in order."""
    arguments = dot_arguments(shapes=[(70001,)]) if kind == "dot" else norm_arguments(shapes=[(70001,)])
    if kind == "dot":
        arguments["slices"] = [(offset, 2**40)]
    (terms,) = products(arguments)
    edges = [0, *range(4096 - offset % 4096, len(terms), 4096), len(terms)]
    total = 0.0
    for begin, end in itertools.pairwise(edges):
        sums = [0.0] * 16
        for i, term in enumerate(terms[begin:end].tolist()):
            sums[i % 16] += term
        partial = 0.0
        for part in sums:
            partial += part
        total += partial
    call = ops.seeded_dot if kind == "dot" else ops.squared_norms
    assert call(**arguments, backend="cpu").item() == total


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_of_its_own_noise_has_the_norm_of_the_noise(backend):
    z = ops.draw((37, 129), KEYS[0], IDS[0])
    dot = ops.seeded_dot([z], KEYS[0], tensor_ids=IDS[:1], backend=backend)
    (square,) = ops.squared_norms([z], backend=backend).tolist()
    assert abs(dot.item() - square) <= 1e-12 * square
    signs = ops.draw((37, 129), KEYS[0], IDS[0], distribution="rademacher")
    options = {"distribution": "rademacher", "backend": backend}
    assert ops.seeded_dot([signs], KEYS[0], tensor_ids=IDS[:1], **options).item() == 37 * 129
    assert ops.squared_norms([z], [z.clone()], backend=backend).item() == 0


# ---- what does not matter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_lists_do_not_matter(set_threads, threads):
    shapes = [(300, 401), (), (0,), (70001,)]
    arguments = dot_arguments(torch.bfloat16, shapes=shapes)
    set_threads(1)
    want = ops.seeded_dot(**arguments)
    norms = ops.squared_norms(arguments["tensors"])
    set_threads(threads)
    assert torch.equal(ops.seeded_dot(**arguments), want)
    assert torch.equal(ops.squared_norms(arguments["tensors"]), norms)
    for order in ([3], [3, 0], [2, 1, 0, 3]):
        some = {name: [arguments[name][i] for i in order] for name in ("tensors", "tensor_ids")}
        assert torch.equal(ops.seeded_dot(**{**arguments, **some}), want[order])
        assert torch.equal(ops.squared_norms(some["tensors"]), norms[order])


def test_strides_do_not_matter_to_the_cpu():
    apart = dot_arguments(torch.float16, layout="strided")
    packed = {**apart, "tensors": [t.contiguous() for t in apart["tensors"]]}
    assert torch.equal(ops.seeded_dot(**apart, backend="cpu"), ops.seeded_dot(**packed, backend="cpu"))


@pytest.mark.parametrize("span", [{}, {"slices": [(5, 9000)]}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_expanded_over_rows_is_the_matrix_of_equal_rows(backend, dtype, span):
    (row,), (anchor,) = weights([(704,)], dtype), weights([(704,)], seed=1)
    options = {"tensor_ids": IDS[:1], "backend": backend, **span}
    dots, norms = [], []
    for rows in (lambda t: t.expand(50, 704), lambda t: t.repeat(50, 1)):
        dots.append(ops.seeded_dot([rows(row)], KEYS[0], **options))
        norms.append(ops.squared_norms([rows(row)], [rows(anchor)], backend=backend))
    assert torch.equal(*dots) and torch.equal(*norms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_add_up(backend):
    (w,) = weights([(50, 300)])
    (whole,) = ops.seeded_dot([w], KEYS[0], tensor_ids=IDS[:1], backend=backend).tolist()
    parts = [w[:20], w[20:, :117], w[20:, 117:]]
    spans = [(0, 300), (20 * 300, 300), (20 * 300 + 117, 300)]
    sums = ops.seeded_dot(parts, KEYS[0], tensor_ids=IDS[:1] * 3, slices=spans, backend=backend)
    terms = products({"tensors": [w], "key": KEYS[0], "tensor_ids": IDS[:1], "distribution": "normal"})
    assert abs(sums.sum().item() - whole) <= 1e-12 * math.fsum(abs(terms[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors_are_zero(backend):
    tensors = [torch.empty(0), torch.empty(0, 5), torch.empty(3, 0), torch.ones(2)]
    assert ops.squared_norms(tensors, backend=backend).tolist() == [0.0, 0.0, 0.0, 2.0]
    dots = ops.seeded_dot(tensors, KEYS[0], tensor_ids=IDS[:4], backend=backend)
    assert dots[:3].tolist() == [0.0] * 3 and dots[3] != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows(backend, dtype):
    for bad in (math.inf, -math.inf, math.nan):
        (w,) = weights([(5000,)], dtype)
        w[4500] = bad
        want = math.nan if math.isnan(bad) else math.inf
        assert str(ops.squared_norms([w], backend=backend).item()) == str(want)
        assert not ops.seeded_dot([w], KEYS[0], tensor_ids=IDS[:1], backend=backend).isfinite().any()
    (w,) = weights([(5000,)], dtype)
    assert math.isnan(ops.squared_norms([w / 0], [w / 0], backend=backend).item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_do_not_overflow_or_vanish(backend):
    big, small = torch.full((5000,), 3e38), torch.full((5000,), 1e-45)
    for t in (big, small):
        (got,) = ops.squared_norms([t], backend=backend).tolist()
        assert abs(got - 5000 * t[0].double().item() ** 2) <= 1e-12 * got and got > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_and_shared_tensors_are_fine(backend):
    """Nothing is written, so tensors may overlap and require gradients."""
    (w,) = weights([(12, 20)])
    want = ops.squared_norms([w], backend=backend).item()
    tensors = [torch.nn.Parameter(w), w, w[:, :5]]
    got = ops.squared_norms(tensors, backend=backend)
    assert got[0] == got[1] == want and not got.requires_grad
    assert ops.squared_norms(tensors, tensors, backend=backend).tolist() == [0.0] * 3
    dots = ops.seeded_dot([w, w], KEYS[0], tensor_ids=[1, 1], backend=backend)
    assert dots[0] == dots[1]
