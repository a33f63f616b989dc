"""On a GPU: a low-rank direction in the forward is as accurate as PyTorch's, and a captured one replays anew."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import gpu
from support.bounds import Bounded, known
from support.gpu import moved
from support.helpers import DTYPES, assert_same_bits, ops, weights

pytestmark = gpu.marks

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
INDICES = (torch.int64, torch.int32)
# Both sides of every bucket of the configuration.
RANKS = (1, 3, 8, 16, 17, 32, 33, 64, 65, 128, 200, 512)
M, N = 331, 264
TOKENS = 67  # twice as many where both signs are stacked


def operands(dtype, x_dtype, rank: int, tokens: int, transposed: bool):
    """y, x, A, B and two cores on the CPU."""
    left, right, c, d = weights([(M, rank), (N, rank), (rank, rank), (rank, rank)], seed=1)
    columns, inner = (N, M) if transposed else (M, N)
    (y,) = weights([(tokens, columns)], dtype, seed=2)
    if x_dtype in INDICES:
        return y, torch.arange(tokens, dtype=x_dtype) * 37 % inner, left, right, c, d
    return y, weights([(tokens, inner)], x_dtype, seed=3)[0], left, right, c, d


def after(y, x, left, right, *cores, **options):
    """y after the op on the device, on the CPU; tensors are given on the CPU."""
    y, x, left, right, cores = moved([y, x, left, right, cores])
    ops.lowrank_forward_(y, x, left, right, cores, backend="triton", **options)
    return y.cpu()


# ---- accuracy --------------------------------------------------------------------------------------------------------


def sum_error(size, terms: int, dtype):
    """What a sum of products may be off by, given the sum of their magnitudes: as in test_gpu_lowrank.py."""
    roundings = (terms + 2) * (1 if dtype == FLOAT32 else 16)
    return roundings * 2.0**-24 / (1 - roundings * 2.0**-24) * size


def bounded(y, x, into, n, out) -> Bounded:
    """y + x F N G^T in float64, and what the roundings of F, G and t, x as two 16-bit numbers, and the sums may be off
    by."""
    dtype, rank, info = y.dtype, len(n), torch.finfo(y.dtype)
    f, g, n, wide = into.double(), out.double(), n.double(), x.double()
    f_error, g_error = (f.float().to(dtype).double() - f).abs(), (g.float().to(dtype).double() - g).abs()
    high = wide.to(dtype).double() if dtype != FLOAT32 else wide
    x_error = (wide - high - (wide - high).to(dtype).double()).abs()
    f_size, g_size = f.abs() + f_error, g.abs() + g_error
    first = wide @ f
    error = wide.abs() @ f_error + x_error @ f_size + sum_error((wide.abs() + x_error) @ f_size, len(f), dtype)
    t = first @ n
    error = error @ n.abs() + sum_error((first.abs() + error) @ n.abs(), rank, dtype)
    if dtype != FLOAT32:
        error += info.eps / 2 * (t.abs() + error) + info.smallest_normal * info.eps / 2
    error = error @ g_size.T + t.abs() @ g_error.T + sum_error((t.abs() + error) @ g_size.T, rank, dtype)
    return known(y.float()) + Bounded(t @ g.T, error)


def assert_accurate(got, y, x, left, right, core, transposed: bool) -> None:
    """Every element within the bound; the root mean square error at most twice PyTorch's, in y's dtype, on the CPU."""
    dtype, wide = y.dtype, x if x.is_floating_point() else torch.eye(len(left))[x.long()]
    into, out, n = (left, right, core) if transposed else (right, left, core.T)
    want = bounded(y, wide, into, n, out)
    assert want.stored(dtype).holds(got)
    plain = torch.addmm(y, wide.to(dtype) @ into.to(dtype) @ n.to(dtype), out.to(dtype).T)
    own, other = got.double() - want.value, plain.double() - want.value
    assert own.square().mean().sqrt() <= 2 * other.square().mean().sqrt()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype, rank):
    transposed = RANKS.index(rank) % 2 == DTYPES.index(dtype) % 2
    y, x, left, right, c, _ = operands(dtype, dtype, rank, TOKENS, transposed)
    got = after(y, x, left, right, c, transposed=transposed)
    assert_accurate(got, y, x, left, right, c, transposed)
    y, x, left, right, *cores = operands(dtype, dtype, rank, 2 * TOKENS, transposed)
    got = after(y, x, left, right, *cores, transposed=transposed)
    for part, core in zip((slice(TOKENS), slice(TOKENS, None)), cores, strict=True):
        assert_accurate(got[part], y[part], x[part], left, right, core, transposed)


@pytest.mark.parametrize("x_dtype", [*DTYPES, *INDICES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_of_any_dtype(dtype, x_dtype):
    """With factors in y's dtype; one launch for all of x N, or one each."""
    for rank in (16, 65):
        check_x(dtype, x_dtype, rank)


def check_x(dtype, x_dtype, rank: int) -> None:
    y, x, left, right, c, _ = operands(dtype, x_dtype, rank, TOKENS, True)
    left, right = left.to(dtype), right.to(dtype)
    got = after(y, x, left, right, c, transposed=True)
    assert_accurate(got, y, x, left.float(), right.float(), c, True)


# ---- what does not matter --------------------------------------------------------------------------------------------

CASES = [(FLOAT32, 3), (FLOAT32, 64), (BFLOAT16, 16), (FLOAT16, 64), (BFLOAT16, 100)]


@pytest.mark.parametrize(("dtype", "rank"), CASES, ids=str)
def test_a_token_does_not_depend_on_others(dtype, rank):
    """Nor on the launch it is in, nor on what other tokens have that is not finite."""
    y, x, left, right, c, d = operands(dtype, dtype, rank, 2 * TOKENS, False)
    want = after(y, x, left, right, c, d)
    for part, core in ((slice(TOKENS), c), (slice(5, 40), c), (slice(TOKENS, None), d)):
        assert_same_bits(after(y[part], x[part], left, right, core), want[part])
    bad = x.clone()
    bad[40] = math.nan
    got = after(y, bad, left, right, c, d)
    assert got[40].isnan().all()
    got[40] = want[40]
    assert_same_bits(got, want)


@pytest.mark.parametrize(("dtype", "rank"), CASES, ids=str)
def test_nothing_around_is_read_or_written(dtype, rank):
    """y one element off alignment, rows of x apart, NaN around both."""
    y, x, left, right, c, _ = operands(dtype, dtype, rank, TOKENS, False)
    memory = torch.full((y.numel() + 600,), math.nan, dtype=dtype)
    apart = torch.full((TOKENS, N + 40), math.nan, dtype=dtype)
    memory[1 : 1 + y.numel()], apart[:, 8 : 8 + N] = y.flatten(), x
    memory, apart = moved([memory, apart])
    inside = memory[1 : 1 + y.numel()].view(y.shape)
    left_there, right_there, c_there = moved([left, right, c])
    ops.lowrank_forward_(inside, apart[:, 8 : 8 + N], left_there, right_there, [c_there], backend="triton")
    assert_accurate(inside.cpu(), y, x, left, right, c, False)
    assert memory.isnan().sum() == 600


def test_every_run_is_the_same():
    for dtype, rank in CASES:
        given = operands(dtype, dtype, rank, 2 * TOKENS, False)
        want = after(*given)
        for _ in range(5):
            assert_same_bits(after(*given), want)


# ---- launches --------------------------------------------------------------------------------------------------------


def calls(dtype, rank: int):
    """A call with every tensor on the device for x as it is and for row indices, y, and what may change."""
    for x_dtype in (dtype, torch.int64):
        y, x, left, right, *cores = moved(list(operands(dtype, x_dtype, rank, 2 * TOKENS, True)))

        def call(y=y, x=x, left=left, right=right, cores=cores):
            ops.lowrank_forward_(y, x, left, right, cores, transposed=True, backend="triton")

        yield call, y, cores


@pytest.mark.parametrize(("dtype", "rank"), CASES, ids=str)
def test_a_captured_call_replays_with_what_the_core_is_then(dtype, rank):
    for call, y, inputs in calls(dtype, rank):
        start = y.clone()
        stream = torch.cuda.Stream(gpu.DEVICE)
        stream.wait_stream(torch.cuda.current_stream(gpu.DEVICE))
        with torch.cuda.stream(stream):
            call()  # compiles
        torch.cuda.synchronize(gpu.DEVICE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        results = []
        for changed in (None, *inputs):
            if changed is not None:
                changed.mul_(-0.5)
            y.copy_(start)
            graph.replay()
            results.append(y.clone())
            y.copy_(start)
            call()
            assert_same_bits(results[-1].cpu(), y.cpu())
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_a_call_does_not_wait_for_the_device():
    for call, y, _ in calls(BFLOAT16, 100):
        call()
        before, mode = y.clone(), torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert not torch.equal(y, before)


def test_launches_go_to_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    given = operands(BFLOAT16, BFLOAT16, 100, 2 * TOKENS, False)
    want = after(*given)
    y, x, left, right, *cores = moved(list(given), torch.device("cuda", 1))
    with torch.cuda.device(gpu.DEVICE):
        ops.lowrank_forward_(y, x, left, right, cores, backend="triton")
        assert torch.cuda.current_device() == gpu.DEVICE.index
    assert_same_bits(y.cpu(), want)
