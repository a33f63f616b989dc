"""The checks that the ops share, value by value; of lists with and without the extension, which passes most at once."""

import math
from fractions import Fraction
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import assert_same_bits

from pgap_kernels import checks, extension
from pgap_kernels.ops import _packing

BUFFER = torch.zeros(160)


@st.composite
def views(draw):
    """Rows of the buffer: some contiguous, some slices of a matrix, some empty, some that overlap themselves."""
    dims = draw(st.integers(0, 3))
    sizes = [draw(st.integers(0, 4)) for _ in range(dims)]
    strides = [draw(st.sampled_from([0, 1, 2, 4, 8, 12])) for _ in range(dims)]
    if draw(st.booleans()):  # dense but for the first dimension
        for i in range(dims - 1, 0, -1):
            strides[i] = 1 if i == dims - 1 else strides[i + 1] * max(sizes[i + 1], 1)
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True) if size)
    return BUFFER.as_strided(sizes, strides, draw(st.integers(0, 159 - max(reach, 0))))


def elements(tensor):
    """Addresses of all elements, with repeats."""
    place = torch.arange(160).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return place.reshape(-1).tolist()


def in_rows(tensor):
    """Each row contiguous, and behind the one before it."""
    rows = [elements(row) for row in tensor] if tensor.dim() > 1 else [elements(tensor)]
    dense = all(row == list(range(row[0], row[0] + len(row))) for row in rows if row)
    return dense and all(a[-1] < b[0] for a, b in pairwise(rows) if a and b)


built = pytest.mark.skipif(extension.unavailable is not None, reason="the C++ extension is not built")


@pytest.mark.parametrize("reason", [pytest.param(None, marks=built), "not wanted"])
@example(tensors=[BUFFER.as_strided((2, 1), (1, 0), 1), BUFFER.as_strided((2, 1), (4, 0), 0)])  # between two rows
@example(tensors=[BUFFER.as_strided((2, 1), (2, 1), 0), BUFFER.as_strided((2, 1), (4, 1), 1)])  # two row strides
@given(tensors=st.lists(views(), min_size=1, max_size=4))
def test_what_is_refused(reason, tensors):
    """Lists are refused exactly where a row is not contiguous, rows overlap, or two tensors share an element."""
    places = [place for t in tensors for place in elements(t)]
    message = ""
    with mock.patch.object(extension, "unavailable", reason):
        try:
            checks.matrices("weights", tensors)
        except ValueError as error:
            message = str(error)
    if not all(in_rows(t) for t in tensors):
        assert "accepted: contiguous rows" in message
    elif len(set(places)) < len(places):
        assert "overlaps" in message
    else:
        assert not message


@built
def test_the_extension_sees_most_lists_at_once():
    """Weights of a model, whatever their order, shapes and dtype; not what needs a closer look."""
    whole = torch.zeros(64)
    plain = torch.ops.pgap_kernels_cpu.is_disjoint_rows
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = [torch.zeros(shape, dtype=dtype) for shape in ((3, 5), (7,), (), (0, 4), (2, 3, 4))]
        assert plain(weights, True) and plain(weights[::-1], True)
    assert plain([whole[32:], whole[:32].view(4, 8)], True)
    halves = whole.view(torch.bfloat16)
    assert plain([whole[:32], halves[64:]], False) and not plain([whole[:33], halves[64:]], False)
    refused = {
        "dtypes": [torch.zeros(2), torch.zeros(2, dtype=torch.float64)],
        "devices": [torch.zeros(2), torch.zeros(2, device="meta")],
        "layouts": [torch.zeros(2, 2).to_sparse()],
        "overlap": [whole[:33], whole[32:]],
        "columns of one matrix": whole.view(8, 8).split(4, dim=1),
        "strided": [whole[::2]],
    }
    for why, tensors in refused.items():
        assert not plain(tensors, True), why
    columns = whole.view(8, 8).split(4, dim=1)  # shards, which take a closer look
    assert checks.matrices("weights", columns) == list(columns)


# ---- lists of tensors ----------------------------------------------------------------------------------------------

WHOLE = torch.zeros(12, 20)
TENSORS = {
    "not a list": (torch.zeros(6, 8), TypeError, ": got Tensor"),
    "a string": ("w", TypeError, ": got str"),
    "none": (None, TypeError, ": got NoneType"),
    "a generator": ((t for t in [torch.zeros(6, 8)]), TypeError, ": got generator"),
    "empty": ([], ValueError, ": got an empty list"),
    "a number": ([torch.zeros(6, 8), 1.0], TypeError, r"\[1\]: got float"),
    "float64": ([torch.zeros(6, 8).double()] * 2, TypeError, r"\[0\]: got dtype torch.float64"),
    "int32": ([torch.zeros(6, 8).int()] * 2, TypeError, r"\[0\]: got dtype torch.int32"),
    "meta": ([torch.zeros(6, 8), torch.zeros(5, 7, device="meta")], ValueError, r"\[1\]: got torch.float32 on meta"),
    "two dtypes": ([torch.zeros(3), torch.zeros(3).half()], ValueError, r"\[1\]: got torch.float16 .*: torch.float32"),
    "sparse": ([torch.zeros(6, 8).to_sparse()] * 2, TypeError, r"\[0\]: got layout torch.sparse_coo"),
    "transposed": ([torch.zeros(7, 5).T], ValueError, r"\[0\]: got shape \(5, 7\) with strides"),
    "expanded rows": ([torch.zeros(1, 8).expand(6, 8)], ValueError, r"\[0\]: got shape .* strides"),
    "expanded columns": ([torch.zeros(6, 1).expand(6, 8)], ValueError, r"\[0\]: got shape .* strides"),
    "overlapping rows": ([torch.zeros(64).as_strided((6, 8), (4, 1))], ValueError, r"\[0\]: got .* do not overlap"),
    "every other column": ([torch.zeros(6, 16)[:, ::2]], ValueError, r"\[0\]: got shape .* strides"),
    "every other element": ([torch.zeros(16)[::2]], ValueError, r"\[0\]: got shape .* strides"),
    "an inner dimension": ([torch.zeros(2, 6, 8).transpose(1, 2)], ValueError, r"\[0\]: got shape .* strides"),
    "duplicate": ([WHOLE, WHOLE], ValueError, r"\[1\] overlaps w\[0\]"),
    "rows that meet": ([WHOLE[:5], WHOLE[4:]], ValueError, r"\[1\] overlaps w\[0\]"),
    "columns that meet": ([WHOLE[:, :9], WHOLE[:, 8:]], ValueError, r"\[1\] overlaps w\[0\]"),
    "columns that meet a row later": ([WHOLE[:, 5:], WHOLE[1:, :6]], ValueError, r"\[\d\] overlaps"),
    "an inner block": ([WHOLE, WHOLE[3:5, 2:4]], ValueError, r"\[\d\] overlaps"),
    "wrapped columns": ([WHOLE.view(-1)[5:225].view(11, 20)[:, 10:], WHOLE[:, 14:16]], ValueError, r"\[\d\] overlaps"),
    "other width": ([WHOLE.view(6, 40)[:, 19:30], WHOLE[:, :2]], ValueError, r"\[\d\] overlaps"),
    "a row in a block": ([WHOLE[4:5], WHOLE[:, 3:9]], ValueError, r"\[\d\] overlaps"),
    "two of three": ([WHOLE[:, 15:], WHOLE[:, :8], WHOLE[:, 7:15]], ValueError, r"\[\d\] overlaps"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_matrices(case):
    value, error, match = TENSORS[case]
    with pytest.raises(error, match=f"^w{match}"):
        checks.matrices("w", value)


def test_a_row_may_be_expanded_where_it_is_only_read():
    for rows in (torch.zeros(8).expand(6, 8), torch.zeros(2, 4).expand(6, 2, 4), torch.zeros(1, 8).expand(6, 8)):
        assert checks.matrices("w", [rows], written=False)[0] is rows
        assert checks.matrix_layout("w", rows, written=False) == (6, 8, 0)
    for other in (torch.zeros(6, 1).expand(6, 8), torch.zeros(64).as_strided((6, 8), (4, 1))):
        with pytest.raises(ValueError, match=r"^w\[0\]: got shape .* strides"):
            checks.matrices("w", [other], written=False)


@pytest.mark.parametrize(
    "tensors",
    [
        [WHOLE[:, 8:], WHOLE[:, :7], WHOLE[:, 7:8]],
        [WHOLE[:3], WHOLE[3:4], WHOLE[4:]],
        [WHOLE[:6, :10], WHOLE[6:, :10], WHOLE[:6, 10:], WHOLE[6:, 10:]],
        [WHOLE.view(6, 40)[:, :20], WHOLE.view(6, 40)[:, 20:]],
        [WHOLE[:, :5], WHOLE[2:3, 5:]],
    ],
    ids=["columns", "rows", "blocks", "interleaved rows", "a block and part of one row"],
)
def test_tensors_of_one_storage_that_share_nothing(tensors):
    assert checks.matrices("w", tensors) == tensors


RIGHT = [torch.zeros(6, 8), torch.zeros(5, 7)]
WEIGHTS = [torch.zeros(6, 8), torch.zeros(5, 7)]
COMPANIONS = {
    "one short": (RIGHT[:1], ValueError, ": got 1 tensors"),
    "other shape": ([RIGHT[0], RIGHT[1].T.contiguous()], ValueError, r"\[1\]: got shape \(7, 5\)"),
    "same count, other shape": ([RIGHT[0], RIGHT[1].view(-1)], ValueError, r"\[1\]: got shape \(35,\)"),
    "other dtype": ([t.half() for t in RIGHT], TypeError, r"\[0\]: got dtype torch.float16"),
    "meta": ([t.to("meta") for t in RIGHT], ValueError, ": got 2 tensors on meta"),
    "transposed": ([RIGHT[0].T.contiguous().T, RIGHT[1]], ValueError, r"\[0\]: got shape .* strides"),
    "expanded rows": ([torch.zeros(8).expand(6, 8), RIGHT[1]], ValueError, r"\[0\]: got shape .* strides"),
    "the weights": (WEIGHTS, ValueError, r"(out|weights)\[\d\] overlaps (out|weights)\[\d\]"),
    "itself": (
        [WHOLE.view(-1)[:48].view(6, 8), WHOLE.view(-1)[47:82].view(5, 7)],
        ValueError,
        r"out\[\d\] overlaps out",
    ),
}


@pytest.mark.parametrize("case", COMPANIONS)
def test_companions(case):
    value, error, match = COMPANIONS[case]
    with pytest.raises(error, match=rf"^(out)?{match}"):
        checks.companions("out", value, WEIGHTS, (torch.float32,))


# ---- scalars, keys, ids, shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, ValueError),
        (-math.inf, ValueError),
        (1e39, ValueError),
        (10**400, ValueError),
        ([0.1, math.nan], ValueError),
        ([0.1, 0.2, 0.3], ValueError),
        ([], ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1j, TypeError),
        ([0.1, "x"], TypeError),
        (np.float32(math.nan), ValueError),
        (np.bool_(True), TypeError),
        ([0.1, torch.tensor(math.nan)], ValueError),
        ([0.1, torch.tensor([0.1, 0.2])], TypeError),
        (torch.tensor(math.nan), ValueError),
        (torch.tensor([0.1, math.inf]), ValueError),
        (torch.tensor(1e300, dtype=torch.float64), ValueError),
        (torch.tensor(1), TypeError),
        (torch.zeros(3), TypeError),
    ],
    ids=lambda v: repr(v)[:24],
)
def test_scalars(value, error):
    with pytest.raises(error, match=r"^a: got"):
        checks.scalar_row("a", value, 2)


@pytest.mark.parametrize("value", [np.float32(0.1), np.float64(0.1), np.int64(3), Fraction(1, 10), torch.tensor(0.1)])
def test_any_real_number_is_a_scalar(value):
    want = torch.tensor([float(value)])
    assert_same_bits(checks.scalar_row("a", value, 2), want)
    assert_same_bits(checks.scalar_row("a", [value, 0.5], 2), torch.cat([want, torch.tensor([0.5])]))


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (-1, ValueError),
        (1 << 64, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        (torch.tensor(1.0), TypeError),
        (torch.tensor(1, dtype=torch.int32), TypeError),
        (torch.tensor([1, 2]), TypeError),
    ],
    ids=lambda v: repr(v)[:24],
)
def test_keys(key, error):
    with pytest.raises(error, match=r"^key: got"):
        checks.key_bits("key", key)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([1], ValueError),
        ([1, 2, 3], ValueError),
        ([1, -1], ValueError),
        ([1, 1 << 32], ValueError),
        ([1, 1.0], TypeError),
        ([1, True], TypeError),
        (7, TypeError),
    ],
)
def test_tensor_ids(ids, error):
    with pytest.raises(error, match=r"^ids"):
        checks.tensor_ids("ids", ids, 2)


def test_ids_and_shards_may_be_integers_of_any_type():
    assert checks.tensor_ids("ids", [np.int64(5), 7], 2) == [5, 7]
    with pytest.raises(ValueError, match=r"below 2\*\*63"):
        checks.span("span", (np.int64(2**63 - 10), np.int64(2**63 - 1)), 2, 9)  # int64 would wrap


def test_a_shard_without_elements_may_be_anywhere():
    assert checks.span("span", (0, 0), 0, 8) == [0, 8] and checks.span("span", (5, 9), 3, 0) == [5, 9]


@pytest.mark.parametrize(
    ("spans", "error", "match"),
    [
        ([(0, 8)], ValueError, ": got 1"),
        ([(-1, 8), (0, 7)], ValueError, r"\[0\] base"),
        ([(0, -8), (0, 7)], ValueError, r"\[0\] row_stride"),
        ([(0, 8), (0.0, 7)], TypeError, r"\[1\] base"),
        ([(0, 8), (0, True)], TypeError, r"\[1\] row_stride"),
        ([(1 << 63, 8), (0, 7)], ValueError, r"\[0\] base"),
        ([(0, 7), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row"),
        ([(0, 0), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row"),
        ([(3, 10), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row"),
        ([(0, 2**62), (0, 7)], ValueError, r"\[0\]: .*below 2\*\*63"),
        ([(0, 8), (0,)], ValueError, r"\[1\]"),
        ([(0, 8), 5], TypeError, r"\[1\]"),
        (5, TypeError, ": got 5; accepted: a list"),
    ],
)
def test_slices(spans, error, match):
    with pytest.raises(error, match=f"^slices{match}"):
        checks.slices("slices", spans, WEIGHTS)


@pytest.mark.parametrize("draws", [[], None, 3, [1], [(1,)], [(1, 2, 3)]])
def test_draws(draws):
    with pytest.raises((TypeError, ValueError), match=r"^draws(\[0\])?: got"):
        _packing.pack_draws(draws, 2)
