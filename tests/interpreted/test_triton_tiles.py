"""Which program does which tile, and how a list is cut, makes no difference; nothing outside a tensor is touched."""

import itertools
import math
import random

import pytest
import torch
from support.agreement import agree, dense
from support.cases import COEFFICIENTS, DISTRIBUTIONS, IDS, KEYS, ROUNDINGS
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, weights

from pgap_kernels.triton import anchor, launch, lowrank, preconditioned
from pgap_kernels.triton import dense as dense_family
from pgap_kernels.triton.table import FIRST_TILE, TablePointers

DRAWS = list(zip(KEYS[:2], COEFFICIENTS[:2], strict=True))
STOCHASTIC = ROUNDINGS["stochastic"]
SHAPES = [(9000,), (31,), (0,), (3, 1361), (4096,)]


def perturbed(tensors, ids=None, **options):
    tensors = clones(tensors)
    ids = IDS[: len(tensors)] if ids is None else ids
    ops.dense_perturb_(tensors, DRAWS, tensor_ids=ids, backend="triton", **{**STOCHASTIC, **options})
    return tensors


# ---- programs ------------------------------------------------------------------------------------------------------


def in_another_order(launched, seed: int):
    """``launch`` with every tile given to another program: each has an entry of its own, counted from elsewhere."""

    def launch_shuffled(kernel, programs, device, config, **arguments):
        if "table" in arguments:
            entries, owners = arguments["table"]
            order = random.Random(seed).sample(range(programs), programs)
            rows = entries[owners[order]].clone()
            # Program p looks for its tile at p - FIRST_TILE.
            rows[:, FIRST_TILE.value] += torch.arange(programs) - torch.tensor(order)
            arguments["table"] = TablePointers(rows, torch.arange(programs, dtype=torch.int32))
            order_of.append(order)
        launched(kernel, programs, device, config, **arguments)

    order_of: list[list[int]] = []
    return launch_shuffled, order_of


def dense_call(w):
    ops.dense_perturb_(w, DRAWS, tensor_ids=IDS[: len(w)], backend="triton", **STOCHASTIC)


def masked_call(w):
    mask = ops.threshold_bits(w, 0.7)
    ops.masked_perturb_(w, DRAWS[:1], tensor_ids=IDS[: len(w)], bits=mask, backend="triton", **STOCHASTIC)


def update_call(w):
    state = [[torch.ones(t.shape) for t in w] for _ in range(2)]
    rule = ops.AdamRule(0.1, step=2)
    ops.preconditioned_update_(w, state, DRAWS[:1], rule, tensor_ids=IDS[: len(w)], backend="triton", **STOCHASTIC)
    w += state[0] + state[1]


def anchor_call(w):
    anchors = [torch.ones(t.shape) for t in w]
    ops.anchor_affine_(w, anchors, 0.3, tensor_ids=IDS[: len(w)], backend="triton", **STOCHASTIC)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("family", "call"),
    [(dense_family, dense_call), (dense_family, masked_call), (preconditioned, update_call), (anchor, anchor_call)],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_any_program_may_do_any_tile(monkeypatch, family, call, seed):
    w = weights(SHAPES, torch.bfloat16)
    want, got = clones(w), clones(w)
    call(want)
    shuffled, orders = in_another_order(launch.launch, seed)
    monkeypatch.setattr(family, "launch", shuffled)
    call(got)
    assert_all_same(got, want)
    assert orders[0] != sorted(orders[0]) and len(orders[0]) == 3 + 1 + 1 + 1


def test_any_program_may_do_any_lowrank_tile(monkeypatch):
    w = weights([(70, 140), (20, 30)], torch.bfloat16)
    left, right = weights([(70, 3), (20, 3)], seed=1), weights([(140, 3), (30, 3)], seed=2)
    want, got = clones(w), clones(w)
    ops.lowrank_perturb_(want, left, right, coefficient=0.3, backend="triton")
    shuffled, orders = in_another_order(launch.launch, 1)
    monkeypatch.setattr(lowrank, "launch", shuffled)
    ops.lowrank_perturb_(got, left, right, coefficient=0.3, backend="triton")
    assert_all_same(got, want)
    assert orders[0] != sorted(orders[0])


# ---- lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_tensor_in_pieces(distribution):
    """Cut anywhere, in one call or several: pieces are shards of one row."""
    (w,) = weights([(9000,)], torch.bfloat16)
    (want,) = perturbed([w], distribution=distribution)
    for cuts in ([4096, 8192], [1, 4097, 5000], [13, 4095]):
        edges = [0, *cuts, 9000]
        pieces = [w[a:b].clone() for a, b in itertools.pairwise(edges)]
        spans = [(a, 9000) for a in edges[:-1]]
        ids = IDS[:1] * len(pieces)
        together = perturbed(pieces, ids, slices=spans, distribution=distribution)
        assert_same_bits(torch.cat(together), want)
    alone = [
        perturbed([piece], ids[:1], slices=[span], distribution=distribution)[0]
        for piece, span in zip(pieces, spans, strict=True)
    ]
    assert_all_same(alone, together)


def test_shape_does_not_matter():
    (w,) = weights([(30, 4, 7, 5)], torch.float16)
    (want,) = perturbed([w])
    for shape in ((4200,), (60, 70), (4200, 1), (1, 4200)):
        assert_same_bits(perturbed([w.view(shape)])[0].view(w.shape), want)


# ---- shards and views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_stride", [8192, 8192 + 4096, 8192 + 1])
@pytest.mark.parametrize(("columns", "gap"), [(4096, 0), (4096, 8), (4100, 4092), (4096, 1)])
def test_rows_of_whole_tiles(row_stride, columns, gap):
    """Aligned rows of whole tiles, rows that end in a tile, and rows whose second begins off alignment: each in one
    buffer with what lies between."""
    (buffer,) = weights([(2, columns + gap + 1)], torch.bfloat16)
    buffer = buffer.flatten()[: 2 * (columns + gap)].view(2, columns + gap)
    before, view = buffer.clone(), buffer[:, :columns]
    want = view.contiguous()
    options = {"tensor_ids": IDS[:1], "slices": [(4096 * row_stride, row_stride)], **STOCHASTIC}
    ops.dense_perturb_([want], DRAWS[:1], backend="reference", **options)
    ops.dense_perturb_([view], DRAWS[:1], backend="triton", **options)
    assert_same_bits(view.contiguous(), want)
    assert_same_bits(buffer[:, columns:], before[:, columns:])


@pytest.mark.parametrize("start", [16, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_around_stays(dtype, start):
    """Aligned or one element off, of lengths around a vector's, a row's of lanes and a tile's, poison on both sides."""
    for length in (1, 3, 8, 33, 1025, 2050, 3075, 4096, 4097):
        (values,) = weights([(length,)], dtype)
        buffer = torch.full((length + 64,), math.nan, dtype=dtype)
        view = buffer[start : start + length]
        view.copy_(values)
        ops.dense_perturb_([view], DRAWS[:1], tensor_ids=IDS[:1], backend="triton", **STOCHASTIC)
        ops.dense_perturb_([values], DRAWS[:1], tensor_ids=IDS[:1], backend="reference", **STOCHASTIC)
        assert_same_bits(view, values)
        assert buffer[:start].isnan().all() and buffer[start + length :].isnan().all()


@pytest.mark.parametrize("shift", [0, 1])
def test_out_may_lie_otherwise_than_the_weights(shift):
    """Aligned weights into a misaligned output and the other way round, of other strides."""
    (source,), target = weights([(6, 200)], torch.bfloat16), torch.full((9, 300), math.nan, dtype=torch.bfloat16)
    view, out = source[1:5, shift : shift + 150], target[2:6, 1 - shift : 151 - shift]
    want = view.contiguous()
    ops.dense_perturb_([want], DRAWS, tensor_ids=IDS[:1], backend="reference", **STOCHASTIC)
    ops.dense_perturb_([view], DRAWS, tensor_ids=IDS[:1], out=[out], backend="triton", **STOCHASTIC)
    assert_same_bits(out.contiguous(), want)
    assert target.isnan().sum() == target.numel() - out.numel()


def test_aligned_weights_into_a_misaligned_output():
    (w,) = weights([(4096,)])
    buffer = torch.full((4098,), math.nan)
    ops.dense_perturb_([w], DRAWS, tensor_ids=IDS[:1], out=[buffer[1:4097]], backend="triton")
    want = w.clone()
    ops.dense_perturb_([want], DRAWS, tensor_ids=IDS[:1], backend="reference")
    assert_same_bits(buffer[1:4097], want)
    assert buffer[[0, 4097]].isnan().all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_many_short_rows(distribution):
    """More rows than programs of a tile: every row its own tiles, most of them empty."""
    agree(dense(torch.float32, 1, distribution, "nearest", 0.0, "shard", [(13, 3), (7, 1)]))
