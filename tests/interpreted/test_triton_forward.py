"""lowrank_forward_ on the Triton kernels: exact where arithmetic is, accurate where it is not, only in its place."""

import math

import pytest
import torch
from support.helpers import DTYPES, assert_same_bits, in_turn, integers, ops, weights

from pgap_kernels import draw
from pgap_kernels.triton import forward

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
INDICES = (torch.int64, torch.int32)
# Both sides of every bucket; three launches from 33 (float32) and from 65 (16 bits) on.
RANKS = (1, 3, 8, 16, 17, 33, 64, 65, 130)
M, N = 135, 70  # ragged tiles of y and chunks of x, either way round


def whole(shape, bound: int, seed: int) -> torch.Tensor:
    return integers([shape], bound, seed)[0]


def permutation(rank: int, seed: int) -> torch.Tensor:
    return torch.eye(rank)[torch.randperm(rank, generator=torch.Generator().manual_seed(seed))]


def exact(dtype, x_dtype, rank: int, tokens: int, transposed: bool):
    """y, x, A, B, C of which every product and sum is exact, t in 16 bits too: it is some tens."""
    left, right = whole((M, rank), 1, 1), whole((N, rank), 1, 2)
    columns, inner = (N, M) if transposed else (M, N)
    (y,) = weights([(tokens, columns)], dtype, seed=3)
    if x_dtype in INDICES:
        x = torch.randint(0, inner, (tokens,), generator=torch.Generator().manual_seed(4)).to(x_dtype)
    else:
        x = whole((tokens, inner), 1, 4).to(x_dtype)
    return y, x, left, right, permutation(rank, 5)


def after(y, x, left, right, *cores, backend="triton", **options):
    """A copy of y after the op."""
    y = y.clone()
    ops.lowrank_forward_(y, x, left, right, cores, backend=backend, **options)
    return y


def agreeing(y, *operands, **options):
    """The same, once both backends gave the same bits."""
    got = after(y, *operands, **options)
    assert_same_bits(got, after(y, *operands, backend="reference", **options))
    return got


# ---- exact arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "dtype"), in_turn(RANKS, DTYPES, times=2), ids=str)
def test_whole_numbers(dtype, rank):
    """Nothing but the last rounding is inexact, so the reference's bits: x of any dtype, odd tokens, odd halves."""
    for x_dtype, tokens, transposed, signs in (
        (dtype, 35, False, [1]),
        (dtype, 2, True, [1, -1]),
        (BFLOAT16, 70, False, [1, -1]),
        (FLOAT16, 33, True, [1]),
        (FLOAT32, 70, True, [1, -1]),
        (dtype, 69, False, [1, -1, 2]),
    ):
        y, x, left, right, c = exact(dtype, x_dtype, rank, tokens, transposed)
        got = agreeing(y, x, left, right, *(sign * c for sign in signs), transposed=transposed)
        assert not torch.equal(got, y)


@pytest.mark.parametrize(("rank", "dtype"), in_turn((3, 40, 70), DTYPES), ids=str)
def test_x_is_not_rounded(dtype, rank):
    """Numbers beyond the bits of a 16-bit y, whose sum is within them."""
    y, x, left, right, c = exact(dtype, FLOAT32, rank, 35, False)
    x, right = torch.cat([x + 4096, torch.full_like(x, -4096)], 1), torch.cat([right, right])
    got = agreeing(y, x, left, right, c)
    assert not torch.equal(got, after(y, x.to(BFLOAT16), left, right, c))


@pytest.mark.parametrize(("rank", "dtype"), in_turn((1, 16, 33, 130), DTYPES), ids=str)
def test_row_indices(dtype, rank):
    for x_dtype in INDICES:
        for tokens, signs in ((1, [1]), (67, [1]), (70, [1, -1])):
            y, x, left, right, c = exact(dtype, x_dtype, rank, tokens, True)
            agreeing(y, x, left, right, *(sign * c for sign in signs), transposed=True)
            agreeing(y, x, left.to(dtype), right.to(dtype), 2 * c, transposed=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_rank(dtype):
    for x_dtype in (dtype, torch.int64):
        y, x, left, right, c = exact(dtype, x_dtype, 512, 34, True)
        agreeing(y, x, left, right, c, -c, transposed=True)


@pytest.mark.parametrize(("rank", "dtype"), in_turn((3, 40, 70), DTYPES), ids=str)
def test_leading_dimensions(dtype, rank):
    """Halves are of the leading dimension, which need not be that of the tokens."""
    y, x, left, right, c = exact(dtype, dtype, rank, 66, False)
    got = agreeing(y.view(2, 11, 3, M), x.view(2, 11, 3, N), left, right, c, -c)
    assert_same_bits(got.view(66, M), after(y, x, left, right, c, -c))
    assert_same_bits(got[0].reshape(33, M), after(y[:33], x[:33], left, right, c))
    assert_same_bits(got[1].reshape(33, M), after(y[33:], x[33:], left, right, -c))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (9, 1, 1), (0, 5, 7), (5, 0, 7), (1, 200, 1)], ids=str)
def test_small_and_empty(shape):
    tokens, columns, inner = shape
    for dtype in DTYPES:
        for rank in (1, 20, 70):
            left, right = whole((columns, rank), 1, 1), whole((inner, rank), 1, 2)
            y, x = weights([(tokens, columns)], dtype)[0], whole((tokens, inner), 2, 3).to(dtype)
            agreeing(y, x, left, right, permutation(rank, 5))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (2, 0, 1, 4, 3)], ids=["even", "uneven"])
@pytest.mark.parametrize(("rank", "dtype"), in_turn((3, 33, 70), DTYPES), ids=str)
def test_operands_of_every_slice(dtype, rank, order):
    """Cores, coefficients and factors, any number of them, wherever they are: evenly apart in memory or not."""

    def several(make):
        made = torch.stack([make(seed) for seed in range(5)])
        return [made[i] for i in order]

    cores = several(lambda seed: permutation(rank, seed))
    lefts, rights = (several(lambda seed, size=size: whole((size, rank), 1, 10 + seed)) for size in (M, N))
    for x_dtype in (dtype, torch.int64):
        y, x, left, right, _ = exact(dtype, x_dtype, rank, 5 * 13, True)
        agreeing(y, x, left, right, *cores, transposed=True)
        agreeing(y, x, lefts, right, *cores, transposed=True)
        results = []
        for backend in ("triton", "reference"):
            got, scales = y.clone(), several(lambda seed: torch.tensor(2.0 ** (seed - 2)))
            options = {"coefficients": torch.stack(scales), "transposed": True, "backend": backend}
            ops.lowrank_forward_(got, x, left, rights, **options)
            results.append(got)
        assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_factors_are_those_of_draw(dtype):
    """More than a program draws, of keys beyond 2**63; of a shard its rows of the unsharded ones."""
    rank, keys = 17, [[2**63 + 5, 8], [9, 2**64 - 1]]
    for span, first in ((None, (0, 0)), ((3 * 1000 + 40, 1000), (3, 40))):
        for x_dtype in (dtype, torch.int64):
            y, x, *_ = exact(dtype, x_dtype, rank, 34, True)
            left, right = ([draw((size, rank), key, 7, offset=skipped * rank) for key in own]
                           for size, skipped, own in zip((M, N), first, keys, strict=True))  # fmt: skip
            options = {"coefficients": [0.01, -0.02], "transposed": True, "backend": "triton"}
            got, want = y.clone(), y.clone()
            ops.lowrank_forward_(got, x, *keys, shape=(M, N), rank=rank, tensor_id=7, span=span, **options)
            ops.lowrank_forward_(want, x, left, right, **options)
            assert_same_bits(got, want)
            assert not torch.equal(got, y)


# ---- memory --------------------------------------------------------------------------------------------------------


def poisoned(tensor, offset: int):
    """The tensor as part of memory that is NaN around it, that memory, and what of it the tensor is."""
    memory = torch.full((tensor.numel() + 300,), math.nan, dtype=tensor.dtype)
    part = slice(offset, offset + tensor.numel())
    memory[part] = tensor.flatten()
    return memory[part].view(tensor.shape), memory, part


@pytest.mark.parametrize("offset", [1, 256])
@pytest.mark.parametrize(("rank", "dtype"), in_turn((3, 33, 70), DTYPES), ids=str)
def test_nothing_else_is_read_or_written(dtype, rank, offset):
    """Aligned and not; rows of x apart in memory."""
    for x_dtype in (dtype, FLOAT32, torch.int64):
        transposed = x_dtype in INDICES
        y, x, left, right, c = exact(dtype, x_dtype, rank, 37, transposed)
        want = after(y, x, left, right, c, transposed=transposed, backend="reference")
        y, memory, part = poisoned(y, offset)
        if not transposed:
            apart = torch.full((37, N + 19), math.nan, dtype=x_dtype)
            apart[:, 16 : 16 + N] = x
            x = apart[:, 16 : 16 + N]
        left, right, c = (poisoned(f, offset)[0] for f in (left, right, c))
        before = [f.clone() for f in (x, left, right, c)]
        ops.lowrank_forward_(y, x, left, right, [c], transposed=transposed, backend="triton")
        assert_same_bits(y, want)
        assert memory[: part.start].isnan().all() and memory[part.stop :].isnan().all()
        for f, b in zip((x, left, right, c), before, strict=True):
            assert torch.equal(f, b)


@pytest.mark.parametrize(("rank", "dtype"), in_turn((3, 33, 70), DTYPES), ids=str)
def test_a_token_that_is_not_finite_is_its_own(dtype, rank):
    y, x, left, right, c = exact(dtype, dtype, rank, 70, False)
    want = after(y, x, left, right, c)
    bad = x.clone()
    bad[5, 7], bad[40, 69] = math.nan, math.inf
    got = after(y, bad, left, right, c)
    others = torch.ones(70, dtype=torch.bool)
    others[[5, 40]] = False
    assert_same_bits(got[others], want[others])
    assert not got[~others].isfinite().all(1).any()


def test_x_in_other_layouts():
    y, x, left, right, c = exact(BFLOAT16, BFLOAT16, 3, 37, False)
    want = after(y, x, left, right, c)
    assert_same_bits(after(y, x.T.contiguous().T, left, right, c), want)
    one = x[:1].expand(37, N)
    assert_same_bits(after(y, one, left, right, c), after(y, one.contiguous(), left, right, c))
    assert_same_bits(after(y, x.repeat_interleave(2, 1)[:, ::2], left, right, c), want)


# ---- accuracy ------------------------------------------------------------------------------------------------------


TYPES = [(d, d) for d in DTYPES] + [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT16), (FLOAT32, BFLOAT16)]


@pytest.mark.parametrize(("rank", "types"), in_turn(RANKS, TYPES, times=3), ids=str)
def test_error_is_at_most_twice_that_of_pytorch(rank, types):
    """Largest and root mean square error against float64. PyTorch's has x as it is, both factors and x F N rounded."""
    dtype, x_dtype = types
    transposed = bool(RANKS.index(rank) % 2)
    columns, inner = (N, M) if transposed else (M, N)
    left, right, c = weights([(M, rank), (N, rank), (rank, rank)], seed=1)
    (y,), (x,) = weights([(36, columns)], dtype), weights([(36, inner)], x_dtype, seed=2)
    got = after(y, x, left, right, c, transposed=transposed)
    into, out, n = (left, right, c) if transposed else (right, left, c.T)
    wanted = y.double() + x.double() @ into.double() @ n.double() @ out.double().T
    plain = torch.addmm(y, (x.float() @ into.to(dtype).float() @ n).to(dtype), out.to(dtype).T)
    own, other = got.double() - wanted, plain.double() - wanted
    assert own.abs().max() <= 2 * other.abs().max()
    assert own.square().mean().sqrt() <= 2 * other.square().mean().sqrt()


# ---- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "rank", "names"),
    [
        (FLOAT32, FLOAT32, 32, "project expand"),
        (FLOAT32, FLOAT32, 33, "project mix expand"),
        (BFLOAT16, FLOAT32, 64, "project expand"),
        (BFLOAT16, BFLOAT16, 65, "project mix expand"),
        (BFLOAT16, torch.int64, 3, "mix expand"),
        (FLOAT32, torch.int32, 130, "mix expand"),
    ],
    ids=str,
)
def test_launches(monkeypatch, dtype, x_dtype, rank, names):
    found = []
    monkeypatch.setattr(forward, "launch", lambda kernel, *_, **__: found.append(kernel.fn.__name__))
    y, x, left, right, c = exact(dtype, x_dtype, rank, 3, True)
    after(y, x, left, right, c, transposed=True)
    assert found == [f"{name}_kernel" for name in names.split()]
