"""lowrank_perturb_ on the Triton kernels: one result whatever the list, the layout and the shard."""

import math

import pytest
import torch
from support.helpers import DTYPES, assert_all_same, assert_same_bits, in_turn, ops, poison, weights
from support.lowrank_calls import CORE, IDS, LEFT, RIGHT, SHAPES, STOCHASTIC, agreeing, perturbed, stored


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 3), (torch.bfloat16, 12), (torch.bfloat16, 20), (torch.float32, 33)], ids=str
)
def test_lists_order_and_out_do_not_matter(dtype, rank):
    shapes = [(35, 70), (64, 128), (33, 40)]
    w = weights(shapes, dtype)
    left, right, cores = stored(rank, "full", shapes, lambda sizes, seed: weights(sizes, seed=seed))
    lists = (w, left, right, cores, [0.1, 0.2, 0.3], [0.0, 0.01, 0.02], IDS[:3])
    names = ("core", "coefficient", "decay", "tensor_ids")
    want = perturbed(*lists[:3], **dict(zip(names, lists[3:], strict=True)), **STOCHASTIC)
    out = poison(w)
    assert_all_same(perturbed(*lists[:3], **dict(zip(names, lists[3:], strict=True)), **STOCHASTIC, out=out), w)
    assert_all_same(out, want)
    for order in ([0], [1], [2, 0], [2, 1, 0]):
        some = [[values[i] for i in order] for values in lists]
        got = perturbed(*some[:3], **dict(zip(names, some[3:], strict=True)), **STOCHASTIC)
        assert_all_same(got, [want[i] for i in order])


def test_regenerated_factors_of_a_list_are_each_ones_own():
    """P and B of all matrices share a scratch; a longer list, a shorter one and a longer one again."""
    shapes = [(20, 33), (40, 18), (18, 40)]
    w, options = weights(shapes, torch.bfloat16), {"core": CORE, "rank": 12, "coefficient": 0.3}
    alone = [perturbed([x], LEFT, RIGHT, tensor_ids=[i], **options)[0] for x, i in zip(w, IDS, strict=False)]
    for order in ([0, 1], [2], [2, 1, 0], [1, 2]):
        got = perturbed([w[i] for i in order], LEFT, RIGHT, tensor_ids=[IDS[i] for i in order], **options)
        assert_all_same(got, [alone[i] for i in order])


@pytest.mark.parametrize(("rank", "dtype"), in_turn((3, 12, 20, 33), DTYPES), ids=str)
def test_views_are_written_and_nothing_else(dtype, rank):
    """Rows apart and one element off alignment, in place and from one layout into another."""
    (whole,), (target,) = weights([(50, 160)], dtype), poison(weights([(60, 140)], dtype))
    for rows, columns in (((3, 40), (0, 128)), ((0, 35), (7, 78))):
        view = whole[slice(*rows), slice(*columns)]
        left, right, _ = stored(rank, "none", [tuple(view.shape)])
        options = {"coefficient": 0.25, "tensor_ids": IDS[:1], "slices": [(0, 600)], **STOCHASTIC}
        want = perturbed([view.contiguous()], left, right, "reference", **options)[0]
        before, inside = whole.clone(), torch.zeros(whole.shape, dtype=torch.bool)
        inside[slice(*rows), slice(*columns)] = True
        out = target[5 : 5 + view.shape[0], 3 : 3 + view.shape[1]]
        ops.lowrank_perturb_([view], left, right, out=[out], backend="triton", **options)
        assert_same_bits(out.contiguous(), want)
        assert target.isnan().sum() == target.numel() - out.numel()
        out.fill_(math.nan)
        ops.lowrank_perturb_([view], left, right, backend="triton", **options)
        assert_same_bits(view.contiguous(), want)
        assert_same_bits(whole[~inside], before[~inside])


@pytest.mark.parametrize("shard", [(7, 30, 0, 70), (0, 40, 33, 70), (33, 34, 5, 69)], ids=str)
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 3), (torch.bfloat16, 12), (torch.bfloat16, 16)], ids=str)
def test_shards_are_slices_of_the_whole(dtype, rank, shard):
    """Factors and rounding words are drawn by the shard's place."""
    top, bottom, left, right = shard
    (w,) = weights([(40, 70)], dtype)
    options = {"coefficient": 0.1, "rank": rank, "core": CORE, **STOCHASTIC}
    (whole,) = perturbed([w], LEFT, RIGHT, **options)
    local = w[top:bottom, left:right].contiguous()
    (got,) = perturbed([local], LEFT, RIGHT, slices=[(top * 70 + left, 70)], **options)
    assert_same_bits(got, whole[top:bottom, left:right].contiguous())


@pytest.mark.parametrize("row", [2**22 + 1, 2**31 + 3, 2**44 + 5])
def test_far_shards(row):
    """Rows far down an unsharded matrix: their factors and rounding words have indices beyond 2**31, 2**40, 2**53."""
    zero, eye, stride = [torch.zeros(5, 3)], [torch.eye(3)], 1021
    options = {"slices": [(row * stride + 11, stride)], "coefficient": 1.0, "tensor_ids": IDS[:1]}
    want = ops.draw((5, 3), LEFT, IDS[0], offset=row * 3, backend="reference")
    assert_same_bits(perturbed(zero, LEFT, eye, **options)[0], want)
    want = ops.draw((3, 5), RIGHT, IDS[0], offset=11 * 5, backend="reference")
    zero, five = [torch.zeros(5, 3)], [torch.eye(5)]
    assert_same_bits(perturbed(zero, five, RIGHT, **options)[0], want.T.contiguous())
    w = weights([(20, 33)], torch.bfloat16)
    left, right, _ = stored(2, "none", [(20, 33)])
    agreeing(w, left, right, coefficient=0.25, slices=options["slices"], **STOCHASTIC)


def test_misaligned_factors():
    """Stored factors that begin one element off a vector access."""
    for dtype, rank in ((torch.float32, 4), (torch.bfloat16, 16), (torch.bfloat16, 40)):
        w, (left, right, _) = weights([(20, 70)], dtype), stored(rank, "none", [(20, 70)])
        want = perturbed(w, left, right, coefficient=0.25, slices=[(0, 600)])
        buffer = torch.full((right[0].numel() + 9,), math.nan)
        off = [buffer[1 : 1 + right[0].numel()].view(right[0].shape).copy_(right[0])]
        assert_all_same(perturbed(w, left, off, coefficient=0.25, slices=[(0, 600)]), want)


def test_empty_matrices():
    for shape in ((0, 5), (5, 0), (0, 0)):
        for rank in (2, 3):
            w = [torch.empty(shape), torch.ones(4, 3)]
            options = {"rank": rank, "coefficient": 0.1, "core": CORE}
            (want,) = perturbed(w[1:], LEFT, RIGHT, tensor_ids=IDS[1:2], **options)
            assert_same_bits(perturbed(w, LEFT, RIGHT, **options)[1], want)
            perturbed(w[:1], LEFT, RIGHT, **options)


def test_zero_coefficient_changes_nothing():
    for dtype in DTYPES:
        w, (left, right, cores) = weights(SHAPES, dtype), stored(3, "full")
        assert_all_same(perturbed(w, left, right, core=cores, coefficient=0.0), w)
