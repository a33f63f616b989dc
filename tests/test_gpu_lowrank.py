"""On a GPU: low-rank passes are as accurate as PyTorch's, round once, and depend on their own matrix only."""

from __future__ import annotations

import pytest
import torch
from support import gpu
from support.bounds import Bounded, known, scalar
from support.gpu import moved
from support.helpers import DTYPES, assert_all_same, assert_same_bits, ops, poison, weights

from pgap_kernels import noise, reference

pytestmark = gpu.marks

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Both sides of every bucket of the configuration, powers of two and their neighbours.
RANKS = (1, 2, 3, 8, 9, 15, 16, 17, 32, 33, 64, 100, 256, 512)
CORES = ("none", "diagonal", "full", "regenerated")
IDS = [noise.tensor_id(f"w{i}") for i in range(3)]
LEFT, RIGHT, CORE, SIGN = (
    noise.derive(4, 1, role) for role in (noise.Role.LEFT, noise.Role.RIGHT, noise.Role.CORE, noise.Role.SIGN)
)
ROUNDING = {"rounding": "stochastic", "rounding_key": noise.derive(4, 1, noise.Role.ROUNDING)}


def shapes_of(rank: int) -> list[tuple[int, int]]:
    """A square of the rank's size and rectangles both ways, with ragged last tiles."""
    return [(rank, rank), (rank + 131, 2 * rank + 197), (2 * rank + 165, rank + 67)]


def stored(rank: int, dtype=torch.float32):
    """(W, A, B) with float32 factors, on the CPU."""
    shapes = shapes_of(rank)
    return (
        weights(shapes, dtype, seed=rank),
        weights([(m, rank) for m, _ in shapes], seed=1),
        weights([(n, rank) for _, n in shapes], seed=2),
    )


def core_of(kind: str, rank: int):
    """The core as the op takes it, on the CPU, and as matrices."""
    count = len(IDS)
    if kind == "none":
        return None, [torch.eye(rank)] * count
    if kind == "diagonal":
        values = weights([(rank,)] * count, seed=3)
        return values, [v.diag() for v in values]
    if kind == "full":
        matrices = weights([(rank, rank)] * count, seed=4)
        return matrices, matrices
    return CORE, [ops.draw((rank, rank), CORE, i) for i in IDS]


def perturbed(w, left, right, core=None, **options):
    """The weights after the pass on the device, on the CPU; tensors are given on the CPU."""
    tensors = moved(w)
    options = {"tensor_ids": IDS[: len(w)], "backend": "triton", **options}
    ops.lowrank_perturb_(tensors, moved(left), moved(right), core=moved(core), **options)
    return [t.cpu() for t in tensors]


def sums_by_fma(dtype, rank: int) -> bool:
    """Whether an element's sum is one chain of fma's; tensor cores may sum tiles of other widths in another order."""
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(gpu.DEVICE)[0] == 9
    return rank < 16 or (dtype == torch.float32 and not hopper)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def sum_error(size, terms: int, dtype):
    """What a sum of products may be off by, given the sum of their magnitudes.

    float32: IEEE products in any order, far below TF32; or three TF32 products for each, summed by tensor cores, which
    may cut off where others round. Two halves of 11 bits leave 2^-24 of a number, and one of four products is left out:
    3 x 2^-24 of a product, and 3 sums of twice that for each. 16-bit W goes through tensor cores, too, and P through
    three TF32 products; both are small beside the rounding of P and B.
    """
    by_fma = sums_by_fma(dtype, terms)
    roundings = terms + 2 if by_fma else 9 * (terms + 2) if dtype == torch.float32 else 16 * (terms + 2)
    return roundings * 2.0**-24 / (1 - roundings * 2.0**-24) * size


def bounded(x, a, c, b, coefficient: float, decay: float) -> Bounded:
    """W - d W + a A C B^T in float64, and what P = A C, its rounding and that of B, and the sums may be off by."""
    dtype, rank = x.dtype, a.shape[1]
    info, wide = torch.finfo(dtype), [t.double() for t in (a, c, b)]
    p = wide[0] @ wide[1]
    if torch.equal(c, torch.eye(rank)):
        p_error = (a.to(dtype).double() - wide[0]).abs()
    else:
        p_error = sum_error(wide[0].abs() @ wide[1].abs(), rank, dtype)
        if dtype != torch.float32:
            p_error += info.eps / 2 * (p.abs() + p_error) + info.smallest_normal * info.eps / 2
    b_error = (b.to(dtype).double() - wide[2]).abs()
    p_size, b_size = p.abs() + p_error, wide[2].abs() + b_error
    error = p_error @ b_size.T + p.abs() @ b_error.T + sum_error(p_size @ b_size.T, rank, dtype)
    value = known(x.float())
    return value + (scalar(coefficient) * Bounded(p @ wide[2].T, error) - scalar(decay) * value)


def assert_accurate(got, w, left, right, cores, coefficient: float, decay: float, stochastic: bool = False) -> None:
    """Every weight within the bound of the formula; the root mean square error at most twice PyTorch's on the CPU, in
    the dtype of W. (The largest of some thousand errors is a matter of luck, so it is held to the bound.)"""
    dtype = w[0].dtype
    own, other = [], []
    for g, x, a, c, b in zip(got, w, left, cores, right, strict=True):
        want = bounded(x, a, c, b, coefficient, decay)
        assert want.stored(dtype, stochastic).holds(g)
        p = a.to(dtype) if torch.equal(c, torch.eye(len(c))) else a.to(dtype) @ c.to(dtype)
        plain = torch.addmm(x, p, b.to(dtype).T, beta=1 - decay, alpha=coefficient)
        own.append((g.double() - want.value).flatten())
        other.append((plain.double() - want.value).flatten())
    own, other = torch.cat(own), torch.cat(other)
    assert stochastic or own.square().mean().sqrt() <= 2 * other.square().mean().sqrt()


def with_cores(ranks, cores=CORES) -> list[tuple]:
    """Every rank in every dtype. A core is made into P before a pass, so the kinds take turns."""
    dtypes = enumerate(DTYPES)
    return [(dtype, rank, cores[(i + j) % len(cores)]) for i, dtype in dtypes for j, rank in enumerate(ranks)]


@pytest.mark.parametrize(("dtype", "rank", "core"), with_cores(RANKS), ids=str)
def test_accuracy(dtype, rank, core):
    """Without decay for odd ranks, with it for even ones."""
    w, left, right = stored(rank, dtype)
    given, matrices = core_of(core, rank)
    decay = 0.0 if rank % 2 else 0.1
    got = perturbed(w, left, right, given, coefficient=0.3, decay=decay)
    assert_accurate(got, w, left, right, matrices, 0.3, decay)


@pytest.mark.parametrize(
    ("dtype", "rank", "core"),
    with_cores([1, 3, 15, 16, 33, 100], ("none", "full", "regenerated", "regenerated")),
    ids=str,
)
def test_factors_drawn_from_keys(dtype, rank, core):
    w, _, _ = stored(rank, dtype)
    shapes = shapes_of(rank)
    left = [ops.draw((m, rank), LEFT, i) for (m, _), i in zip(shapes, IDS, strict=True)]
    right = [ops.draw((n, rank), RIGHT, i) for (_, n), i in zip(shapes, IDS, strict=True)]
    given, matrices = core_of(core, rank)
    for a, b in ((LEFT, right), (left, RIGHT), (LEFT, RIGHT)):
        got = perturbed(w, a, b, given, coefficient=0.3, rank=rank)
        assert_accurate(got, w, left, right, matrices, 0.3, 0.0)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once(dtype, rank):
    """Factors that W's dtype holds are not rounded again, and nothing is rounded to it early."""
    rounding = {} if rank % 2 else ROUNDING
    w, left, right = stored(rank, dtype)
    left, right = ([f.to(dtype) for f in factors] for factors in (left, right))
    got = perturbed(w, left, right, coefficient=0.25, **rounding)
    eyes = [torch.eye(rank)] * len(w)
    assert_accurate(got, w, left, right, eyes, 0.25, 0.0, stochastic=bool(rounding))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_pass_rounds_the_float32_pass(dtype):
    """Sums of few products are made alike for every dtype, so the float32 pass gives what is rounded."""
    w, left, right = stored(3, dtype)
    left, right = ([f.to(dtype).float() for f in factors] for factors in (left, right))
    options = {"coefficient": 0.125, "decay": 0.1}
    got = perturbed(w, left, right, **options, **ROUNDING)
    wide = perturbed([x.float() for x in w], left, right, **options)
    for g, value, ident in zip(got, wide, IDS, strict=True):
        words = reference.words(0, value.numel(), ident, ROUNDING["rounding_key"], value.device).view(value.shape)
        assert_same_bits(g, reference.stochastic_round(value, words, dtype))


@pytest.mark.parametrize("rounding", [{}, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_one_to_the_bit(dtype, rounding):
    """One product, one fma, one rounding."""
    w, left, right = stored(1, dtype)
    got = perturbed(w, left, right, coefficient=0.3, **rounding)
    for g, x, a, b, ident in zip(got, w, left, right, IDS, strict=True):
        product = a.to(dtype).float() * b.to(dtype).float().T
        value = reference.fma(torch.tensor(0.3), product, x.float())
        key, words = ROUNDING["rounding_key"], reference.words
        rounded = reference.stochastic_round(value, words(0, x.numel(), ident, key, x.device).view(x.shape), dtype)
        assert_same_bits(g, rounded if rounding else value.to(dtype))


@pytest.mark.parametrize("signs", [{}, {"sign_key": SIGN}, {"sign_key": SIGN, "sign_ids": [0, 0, 0]}])
def test_aligned_core_is_the_reference_to_the_bit(signs):
    values = [torch.linspace(3, 0.01, rank) for rank in (1, 33, 512)]
    options = {"tensor_ids": IDS, "delta": 0.7, **signs}
    got = ops.aligned_core(moved(values), CORE, backend="triton", **options)
    assert_all_same([z.cpu() for z in got], ops.aligned_core(values, CORE, backend="reference", **options))


# ---- what does not matter --------------------------------------------------------------------------------------------

CASES = [(3, "full"), (9, "diagonal"), (16, "full"), (33, "none"), (64, "regenerated")]


@pytest.mark.parametrize(("rank", "core"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_and_out_do_not_matter(dtype, rank, core):
    w, left, right = stored(rank, dtype)
    given, _ = core_of(core, rank)
    options = {"coefficient": [0.1, 0.2, 0.3], "decay": [0.0, 0.01, 0.02], **ROUNDING}
    want = perturbed(w, left, right, given, **options)
    source, out = moved(w), moved(poison(w))
    more = {"tensor_ids": IDS, "out": out, "backend": "triton"}
    ops.lowrank_perturb_(source, moved(left), moved(right), core=moved(given), **options, **more)
    assert_all_same([t.cpu() for t in out], want)
    assert_all_same([t.cpu() for t in source], w)
    for order in ([0], [2], [2, 0], [2, 1, 0]):  # the first has no decay, in this list or alone

        def pick(values, order=order):
            return [values[i] for i in order] if isinstance(values, list) else values

        some = {name: pick(value) for name, value in options.items()} | {"tensor_ids": pick(IDS)}
        assert_all_same(perturbed(pick(w), pick(left), pick(right), pick(given), **some), pick(want))


@pytest.mark.parametrize("rank", [3, 9, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_written_and_nothing_else(dtype, rank):
    """Rows apart in memory, aligned and not."""
    (whole,) = weights([(190, 320)], dtype)
    for rows, columns in [((3, 180), (0, 320)), ((0, 190), (7, 301)), ((11, 61), (5, 56)), ((20, 161), (64, 320))]:
        inside = slice(*rows), slice(*columns)
        packed, shape = whole[inside].contiguous(), (rows[1] - rows[0], columns[1] - columns[0])
        left, right = weights([(shape[0], rank)], seed=1), weights([(shape[1], rank)], seed=2)
        copy = moved(whole)
        options = {"coefficient": 0.3, "tensor_ids": IDS[:1], **ROUNDING}
        ops.lowrank_perturb_([copy[inside]], moved(left), moved(right), backend="triton", **options)
        got = copy[inside].cpu().contiguous()
        assert_accurate([got], [packed], left, right, [torch.eye(rank)], 0.3, 0.0, stochastic=True)
        if sums_by_fma(dtype, rank):
            assert_same_bits(got, perturbed([packed], left, right, **options)[0])
        around = torch.ones(whole.shape, dtype=torch.bool)
        around[inside] = False
        assert_same_bits(copy.cpu()[around], whole[around])


@pytest.mark.parametrize("shard", [(7, 130, 0, 210), (0, 170, 40, 210), (33, 134, 5, 199)])
@pytest.mark.parametrize("rank", [1, 3, 9, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_slices_of_the_whole(dtype, rank, shard):
    """Factors and rounding words are drawn by the shard's place."""
    top, bottom, left, right = shard
    (w,) = weights([(170, 210)], dtype)
    local = w[top:bottom, left:right].contiguous()
    options = {"coefficient": 0.1, "rank": rank, "slices": [(top * 210 + left, 210)], **ROUNDING}
    (got,) = perturbed([local], LEFT, RIGHT, CORE, **options)
    a = ops.draw((170, rank), LEFT, IDS[0])[top:bottom]
    b = ops.draw((210, rank), RIGHT, IDS[0])[left:right]
    cores = [ops.draw((rank, rank), CORE, IDS[0])]
    assert_accurate([got], [local], [a], [b], cores, 0.1, 0.0, stochastic=True)
    if sums_by_fma(dtype, rank):
        (whole,) = perturbed([w], LEFT, RIGHT, CORE, coefficient=0.1, rank=rank, **ROUNDING)
        assert_same_bits(got, whole[top:bottom, left:right].contiguous())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_factors_in_either_dtype(dtype):
    """A factor in W's dtype is its float32 copy."""
    for rank in (8, 16, 33):
        w, left, right = stored(rank, dtype)
        left, right = ([f.to(dtype) for f in factors] for factors in (left, right))
        want = perturbed(w, left, right, coefficient=0.1)
        wide = ([f.float() for f in factors] for factors in (left, right))
        assert_all_same(perturbed(w, *wide, coefficient=0.1), want)


def test_every_run_is_the_same():
    for dtype in DTYPES:
        w, left, right = stored(100, dtype)
        given, _ = core_of("regenerated", 100)
        want = perturbed(w, left, right, given, coefficient=0.3)
        for _ in range(5):
            assert_all_same(perturbed(w, left, right, given, coefficient=0.3), want)


def test_empty_matrices():
    for shape in ((0, 5), (5, 0), (0, 0)):
        w = [torch.empty(shape), torch.ones(4, 3)]
        got = perturbed(w, LEFT, RIGHT, rank=2, coefficient=0.1)
        (want,) = perturbed(w[1:], LEFT, RIGHT, rank=2, coefficient=0.1, tensor_ids=IDS[1:2])
        assert_same_bits(got[1], want)
