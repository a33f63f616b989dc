"""Checks of lists of weights: with the extension, which passes most lists at once, and without, they say the same."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgap_kernels import checks, extension

BUFFER = torch.zeros(96)


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
    return BUFFER.as_strided(sizes, strides, draw(st.integers(0, 95 - max(reach, 0))))


def elements(tensor):
    """Addresses of all elements, with repeats."""
    place = torch.arange(96).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return place.reshape(-1).tolist()


def in_rows(tensor):
    """Each row contiguous, and behind the one before it."""
    rows = [elements(row) for row in tensor] if tensor.dim() > 1 else [elements(tensor)]
    dense = all(row == list(range(row[0], row[0] + len(row))) for row in rows if row)
    return dense and all(a[-1] < b[0] for a, b in pairwise(rows) if a and b)


built = pytest.mark.skipif(extension.unavailable is not None, reason="the C++ extension is not built")


@pytest.mark.parametrize("reason", [pytest.param(None, marks=built), "not wanted"])
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
    plain = torch.ops.pgap_kernels_cpu.plain
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
