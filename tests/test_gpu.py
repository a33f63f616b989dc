"""On a GPU: the dense family draws and writes the bits of the reference on the CPU, sums agree, indices are 64-bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import gpu
from support.cases import CASES, COEFFICIENTS, DISTRIBUTIONS, IDS, KEYS, ROUNDINGS, SHAPES, run
from support.gpu import moved, run_there
from support.helpers import DTYPES, assert_all_same, assert_same_bits, ops, poison, serving, weights
from support.sums import REDUCED, magnitudes

from pgap_kernels import backends, noise

pytestmark = gpu.marks

DRAWS = list(zip(KEYS, COEFFICIENTS, strict=True))
TABLE = torch.ops.pgap_kernels
GIB = 1 << 30


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_serves(op, dtype):
    with serving("triton"):
        assert backends.select(op, gpu.DEVICE, dtype).name == "triton"


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_the_reference_on_the_cpu(name):
    """Ragged, strided, sharded and far-away tensors, every dtype, rounding and op; memory around them included."""
    assert_all_same(run_there(CASES[name]), run(CASES[name], "reference"))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("offset", [5, 4090, 2**31 - 7, 2**62 + 3])
def test_draw(offset, distribution):
    options = {"offset": offset, "distribution": distribution}
    got = ops.draw((3, 4099), KEYS[0], IDS[0], device=gpu.DEVICE, backend="triton", **options)
    assert got.device == gpu.DEVICE
    assert_same_bits(got.cpu(), ops.draw((3, 4099), KEYS[0], IDS[0], backend="reference", **options))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_programs(dtype, rounding):
    """Millions of weights: whole tiles and masked ones, in one list."""
    shapes = [(1 << 20,), (1000, 1024), (1023, 1025), (3,), (1 << 20,)]
    w = weights(shapes, dtype)
    there = moved(w)
    options = {"tensor_ids": IDS[:5], "decay": 0.01, **ROUNDINGS[rounding]}
    ops.dense_perturb_(there, DRAWS[:2], backend="triton", **options)
    ops.dense_perturb_(w, DRAWS[:2], **options)
    assert_all_same([t.cpu() for t in there], w)


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_with_poison_around(dtype, start):
    lengths = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 4095, 4096, 4097)
    views, starts = [], itertools.accumulate((length + 24 for length in lengths), initial=16)
    buffer = torch.full((sum(lengths) + 24 * len(lengths) + 64,), math.nan, dtype=dtype)
    for length, begin in zip(lengths, starts, strict=False):
        begin += start - begin % 16
        views.append(buffer[begin : begin + length].copy_(torch.arange(length) / 64))
    there = moved(views)
    ids = list(range(len(views)))
    ops.dense_perturb_(there, DRAWS[:2], tensor_ids=ids, backend="triton")
    ops.dense_perturb_(views, DRAWS[:2], tensor_ids=ids, backend="reference")
    assert_same_bits(there[0].as_strided(buffer.shape, (1,), 0).cpu(), buffer)


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, -6e-8, 1e-40, -1e-45, 65504.0, -65504.0, 3.38e38, 1e-3, 1.0]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("coefficient", [0.0, 1e-42, 1e-7, 100.0, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_weights(dtype, coefficient, rounding):
    """Infinities, NaN, subnormal values, overflow; nothing is flushed to zero."""
    w = [torch.tensor(SPECIAL * 400, dtype=torch.float64).to(dtype)]
    there = moved(w)
    options = {"tensor_ids": IDS[:1], "decay": 0.5, **ROUNDINGS[rounding]}
    draws = [(KEYS[0], coefficient), (KEYS[1], coefficient)]
    ops.dense_perturb_(there, draws, backend="triton", **options)
    ops.dense_perturb_(w, draws, backend="reference", **options)
    assert_same_bits(there[0].cpu(), w[0])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stages(dtype, stochastic):
    """One pass of several stages, one of them without draws, each with its decay and rounding key."""
    w = weights([(), (0,), (33,), (37, 129), (4097,)], dtype)
    keys = torch.tensor([key - (key >> 63 << 64) for key in (*KEYS, *KEYS[:2])])
    many = torch.tensor([*COEFFICIENTS, 1.0, -1e-6])[:, None] * torch.arange(1.0, 6.0)
    decay, rounding = torch.tensor([[0.0], [0.1], [0.05], [0.0]]), torch.tensor([71, -72, 73, 74])
    keywords = {
        "keys": keys,
        "coefficients": many,
        "decay": decay,
        "rounding_keys": rounding if stochastic else None,
        "stages": [2, 1, 0, 2],
        "tensor_ids": IDS[:5],
    }
    there = moved(w)
    for tensors, backend in ((there, "triton"), (w, "reference")):
        with serving(backend):
            TABLE.dense_perturb_(tensors, **keywords)
    assert_all_same([t.cpu() for t in there], w)


def test_lists_order_and_single_calls_do_not_matter():
    w = weights(SHAPES, torch.bfloat16)
    options = {"backend": "triton", **ROUNDINGS["stochastic"]}
    whole = moved(w)
    ops.dense_perturb_(whole, DRAWS[:2], tensor_ids=IDS, **options)
    for order in ([8, 5, 0, 6, 2], [5], list(range(len(w)))[::-1]):
        some = moved([w[i] for i in order])
        ops.dense_perturb_(some, DRAWS[:2], tensor_ids=[IDS[i] for i in order], **options)
        assert_all_same([t.cpu() for t in some], [whole[i].cpu() for i in order])


def test_scalars_and_keys_on_the_device_are_those_of_the_host():
    w = weights(SHAPES)
    many = [0.01 * (i + 1) for i in range(len(w))]
    host, device = moved(w), moved(w)
    ops.dense_perturb_(host, [(KEYS[0], 0.25), (2**64 - 2, many)], tensor_ids=IDS, decay=0.125, backend="triton")
    key, a, d = moved([torch.tensor(KEYS[0] - (KEYS[0] >> 63 << 64)), torch.tensor(0.25), torch.tensor([0.125])])
    ops.dense_perturb_(device, [(key, a), (2**64 - 2, many)], tensor_ids=IDS, decay=d, backend="triton")
    assert_all_same([t.cpu() for t in device], [t.cpu() for t in host])


def test_zeros_of_the_host_keep_their_signs():
    """Host scalars are kept on the device by value; 0.0 == -0.0."""
    want = {}
    for coefficient in (0.0, -0.0, 0.0):
        (g,) = poison(weights([(4099,)]))
        there = moved([g])
        ops.assemble_gradient_([g], [(KEYS[0], coefficient)], tensor_ids=IDS[:1], backend="reference")
        ops.assemble_gradient_(there, [(KEYS[0], coefficient)], tensor_ids=IDS[:1], backend="triton")
        assert_same_bits(there[0].cpu(), g)
        want[math.copysign(1, coefficient)] = g
    assert not torch.equal(want[1].signbit(), want[-1].signbit())


def test_what_a_mask_drops_keeps_its_sign_of_zero():
    w = [torch.full((5000,), -0.0)]
    there = moved(w)
    for mask in ({"share": (KEYS[1], 0.0)}, {"bits": [torch.zeros(157, dtype=torch.int32)]}):
        ops.masked_perturb_(there, [(KEYS[0], 0.5)], tensor_ids=IDS[:1], backend="triton", **moved(mask))
        assert_same_bits(there[0].cpu(), w[0])


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCED)
def test_sums_agree_with_the_reference_on_the_cpu(name):
    (got,), (want,) = run_there(REDUCED[name]), run(REDUCED[name], "reference")
    assert got.dtype == torch.float64 and ((got - want).abs() <= 1e-12 * magnitudes(REDUCED[name].build())).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_the_same_in_every_run_and_list(dtype):
    values = moved(weights([(1 << 20,), (1023, 1025), (5,)], dtype))

    def sums(which) -> torch.Tensor:
        some, ids = [values[i] for i in which], [IDS[i] for i in which]
        return torch.stack([ops.seeded_dot(some, KEYS[0], tensor_ids=ids), ops.squared_norms(some)]).cpu()

    first = sums([0, 1, 2])
    for _ in range(10):
        assert torch.equal(sums([0, 1, 2]), first)
    for order in ([2, 0], [1], [2, 1, 0]):
        assert torch.equal(sums(order), first[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_expanded_over_rows_is_the_matrix_of_equal_rows(dtype):
    for columns in (700, 8192):  # masked and whole tiles
        (row,) = moved(weights([(columns,)], dtype))
        tensors = ([row.expand(7, columns)], [row.repeat(7, 1)])
        assert torch.equal(*(ops.seeded_dot(t, KEYS[0], tensor_ids=IDS[:1], backend="triton") for t in tensors))
        assert torch.equal(*(ops.squared_norms(t, backend="triton") for t in tensors))


# ---- the fast tier ---------------------------------------------------------------------------------------------------


def test_fast_normals_are_near_the_exact_ones():
    """2**27 draws: every one of the 2**23 radii some eight times, and the angles as often as they come."""
    chunk, chunks = 1 << 24, 8
    total = square = 0.0
    fast, exact = (torch.empty(chunk, device=gpu.DEVICE) for _ in range(2))
    for i in range(chunks):
        options = {"tensor_ids": IDS[:1], "slices": [(i * chunk, 1 << 40)], "backend": "triton"}
        ops.assemble_gradient_([fast], [(KEYS[0], 1.0)], tier="fast", **options)
        ops.assemble_gradient_([exact], [(KEYS[0], 1.0)], **options)
        assert fast.isfinite().all()
        assert (fast - exact).abs().max() <= 1e-3
        total += fast.sum(dtype=torch.float64).item()
        square += fast.double().square().sum().item()
    count = chunk * chunks
    # Six sigma, and what 1e-3 in every draw could move: E |z| < 0.8.
    assert abs(total / count) <= 6 / math.sqrt(count) + 1e-3
    assert abs(square / count - 1) <= 6 * math.sqrt(2 / count) + 2 * 0.8e-3 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_tier_of_the_other_passes(dtype):
    """Draws differ by 1e-3 at most, so sums of coefficients bound what weights differ by, but for one rounding each."""
    (w,) = weights([(70001,)], dtype)
    results = []
    for tier in ("exact", "fast"):
        (there,) = moved([w])
        ops.dense_perturb_([there], DRAWS, tensor_ids=IDS[:1], tier=tier, backend="triton")
        results.append(there.double().cpu())
    exact, fast = results
    ulp = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((fast - exact).abs() <= 1e-3 * sum(map(abs, COEFFICIENTS)) * (1 + 1e-4) + ulp).all()
    options = {"tensor_ids": IDS[:1], "tier": "fast", "distribution": "rademacher", "backend": "triton"}
    (signs,) = moved([w])
    ops.dense_perturb_([signs], DRAWS, **options)
    ops.dense_perturb_([w], DRAWS, **{**options, "backend": "reference"})
    assert_same_bits(signs.cpu(), w)
    (there,) = moved([w])
    dots = [ops.seeded_dot([there], KEYS[0], tensor_ids=IDS[:1], tier=t, backend="triton") for t in ("exact", "fast")]
    assert abs(dots[0] - dots[1]).item() <= 1e-3 * there.double().abs().sum().item()


# ---- more than 2**31 elements ----------------------------------------------------------------------------------------


def needs_memory(size: int) -> None:
    torch.cuda.empty_cache()  # what PyTorch keeps of earlier tests is not free
    free = torch.cuda.mem_get_info(gpu.DEVICE)[0]
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free device memory, found {free / GIB:.1f}")


def test_a_tensor_of_more_than_2_31_elements():
    needs_memory(12 * GIB)
    count = 2**31 + 3 * 4096 + 5
    w = torch.zeros(count, dtype=torch.bfloat16, device=gpu.DEVICE)
    options = {"tensor_ids": IDS[:1], **ROUNDINGS["stochastic"]}
    ops.dense_perturb_([w], DRAWS[:2], backend="triton", **options)
    for begin, end in ((0, 9000), (2**31 - 70_001, 2**31 + 9000), (count - 5000, count)):
        want = torch.zeros(end - begin, dtype=torch.bfloat16)
        ops.dense_perturb_([want], DRAWS[:2], slices=[(begin, 1 << 40)], **options)
        assert_same_bits(w[begin:end].cpu(), want)
    # All of it is noise of that size, once: the sum is known to 3e-5 (one sigma).
    expected = count * sum(a**2 for _, a in DRAWS[:2])
    assert abs(ops.squared_norms([w], backend="triton").item() / expected - 1) <= 1e-3
    w.fill_(1.0)
    assert ops.squared_norms([w], backend="triton").item() == count


@pytest.mark.parametrize("columns", [65600, 65537], ids=["aligned", "odd"])
def test_a_matrix_of_more_than_2_31_elements(columns):
    """Rank one has one product per weight, so its bits are those of the CPU."""
    needs_memory(12 * GIB)
    rows = 32771
    assert rows * columns > 2**31
    w = torch.zeros(rows, columns, dtype=torch.bfloat16, device=gpu.DEVICE)
    keys = [noise.derive(9, 0, role) for role in (noise.Role.LEFT, noise.Role.RIGHT)]
    options = {"rank": 1, "coefficient": 0.3, "tensor_ids": IDS[:1]}
    ops.lowrank_perturb_([w], *keys, backend="triton", **options)
    for top, left in ((0, 0), (rows - 40, columns - 70), (rows // 2, columns - 70)):
        want = torch.zeros(40, 70, dtype=torch.bfloat16)
        ops.lowrank_perturb_([want], *keys, slices=[(top * columns + left, columns)], **options)
        assert_same_bits(w[top : top + 40, left : left + 70].cpu(), want)
