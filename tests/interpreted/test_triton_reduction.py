"""seeded_dot and squared_norms on the Triton kernels: within rounding of exact sums, the same whatever the list."""

import functools
import itertools
import math

import pytest
import torch
from support.agreement import SHAPES
from support.cases import DISTRIBUTIONS, IDS, KEYS, LAYOUTS, Case, dot_arguments, norm_arguments, run
from support.helpers import DTYPES, ops, weights
from support.sums import magnitudes

from pgap_kernels.triton.reduction import sum_tiles_kernel
from pgap_kernels.triton.table import FIELDS, FIRST_TILE, TILES

NOTHING_AND_ONE = [(), (0,), (0, 4), (1,), (3, 5)]


def agree(op: str, build) -> None:
    """Within 1e-12 of the sum of magnitudes, and the same again."""
    case = Case(op, build)
    (got,), (again,), (want,) = run(case, "triton"), run(case, "triton"), run(case, "reference")
    assert got.dtype == torch.float64 and torch.equal(got, again)
    assert ((got - want).abs() <= 1e-12 * magnitudes(build())).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("layout", "dtype"), [*zip(LAYOUTS, itertools.cycle(DTYPES), strict=False)], ids=str)
def test_dot(layout, dtype, distribution):
    agree("seeded_dot", functools.partial(dot_arguments, dtype, distribution, layout, SHAPES))


@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, layout):
    for anchors in dict.fromkeys([None, torch.float32, dtype]):
        agree("squared_norms", functools.partial(norm_arguments, dtype, anchors, layout, SHAPES))


def test_nothing_and_one_element():
    agree("seeded_dot", functools.partial(dot_arguments, shapes=NOTHING_AND_ONE))
    agree("squared_norms", functools.partial(norm_arguments, anchors=torch.float32, shapes=NOTHING_AND_ONE))
    assert torch.equal(ops.squared_norms([torch.empty(0)], backend="triton"), torch.zeros(1, dtype=torch.float64))


def test_the_list_does_not_matter():
    arguments = dot_arguments(torch.bfloat16, shapes=SHAPES)
    dots = ops.seeded_dot(**arguments, backend="triton")
    norms = ops.squared_norms(arguments["tensors"], backend="triton")
    for order in ([1], [2, 0], [2, 1, 0]):
        some = {name: [arguments[name][i] for i in order] for name in ("tensors", "tensor_ids")}
        assert torch.equal(ops.seeded_dot(**{**arguments, **some}, backend="triton"), dots[order])
        assert torch.equal(ops.squared_norms(some["tensors"], backend="triton"), norms[order])


def test_place_in_memory_does_not_matter():
    """A misaligned tensor is summed as an aligned one; anchors of the other dtype beside it too."""
    (w,), (anchor,) = weights([(4100,)], torch.bfloat16), weights([(4100,)], seed=1)
    buffer, far = torch.full((4200,), math.nan, dtype=torch.bfloat16), torch.full((4200,), math.nan)
    view, apart = buffer[17 : 17 + 4100].copy_(w), far[3 : 3 + 4100].copy_(anchor)
    options = {"tensor_ids": IDS[:1], "backend": "triton"}
    assert torch.equal(ops.seeded_dot([view], KEYS[0], **options), ops.seeded_dot([w], KEYS[0], **options))
    norms = [ops.squared_norms([x], [a], backend="triton") for x, a in itertools.product((w, view), (anchor, apart))]
    assert all(torch.equal(n, norms[0]) for n in norms)


def test_a_row_expanded_over_rows_is_the_matrix_of_equal_rows():
    for columns, options in ((700, {}), (700, {"slices": [(5, 9000)]}), (4096, {}), (1, {})):  # masked, whole tiles
        (row,) = weights([(columns,)], torch.bfloat16)
        tensors = [row.expand(7, columns), row.repeat(7, 1)]
        dots = [ops.seeded_dot([t], KEYS[0], tensor_ids=IDS[:1], backend="triton", **options) for t in tensors]
        norms = [ops.squared_norms([t], [2 * t], backend="triton") for t in tensors]
        from_row = ops.squared_norms([tensors[1]], [row.float().mul(2).expand(7, columns)], backend="triton")
        assert torch.equal(*dots) and torch.equal(*norms) and torch.equal(from_row, norms[0])


def test_infinities_and_nan_pass_through():
    for bad in (math.inf, math.nan):
        values = torch.tensor([1.0, bad, 2.0])
        assert not ops.squared_norms([values], backend="triton").isfinite().any()
        assert not ops.seeded_dot([values], 1, tensor_ids=[1], backend="triton").isfinite().any()


def test_parts_of_many_tiles():
    """The second launch walks over a tensor's parts: none, one, exactly a step of it, and several steps."""
    counts = [0, 1, 16, 40, 3]
    parts = torch.randn(sum(counts), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table, first = torch.zeros(len(counts), FIELDS.value, dtype=torch.int64), 0
    for row, count in zip(table, counts, strict=True):
        row[FIRST_TILE.value], row[TILES.value] = first, count
        first += count
    totals = torch.full((len(counts),), math.nan, dtype=torch.float64)
    sum_tiles_kernel[(len(counts),)](entries_ptr=table, parts_ptr=parts, totals_ptr=totals, STEP=16)
    for total, own in zip(totals.tolist(), parts.split(counts), strict=True):
        assert abs(total - math.fsum(own.tolist())) <= 1e-12 * own.abs().sum().item()
