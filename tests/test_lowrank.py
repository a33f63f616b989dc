"""lowrank_perturb_ and aligned_core: accuracy against float64, factors, rounding, alignment."""

import math

import pytest
import torch
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, poison, weights
from support.lowrank_calls import assert_quotient
from support.refusals import refused

from pgap_kernels import noise, reference

BACKENDS = ("reference", "cpu")
HALF_DTYPES = (torch.bfloat16, torch.float16)
RANKS = (1, 2, 3, 8, 16, 33, 64)
CORES = ("none", "diagonal", "full", "regenerated")
LEFT, RIGHT, CORE, SIGN = (
    noise.derive(4, 1, role) for role in (noise.Role.LEFT, noise.Role.RIGHT, noise.Role.CORE, noise.Role.SIGN)
)
ROUNDING = {"rounding": "stochastic", "rounding_key": noise.derive(4, 1, noise.Role.ROUNDING)}
IDS = [noise.tensor_id(f"w{i}") for i in range(4)]


def with_cores(ranks) -> list[tuple]:
    """Every rank in every dtype. A core is made into P before a pass, so the kinds take turns."""
    return [(dtype, rank, CORES[(i + j) % 4]) for i, dtype in enumerate(DTYPES) for j, rank in enumerate(ranks)]


def shapes_of(rank: int) -> list[tuple[int, int]]:
    """A square of the rank's size, odd rectangles both ways, and one larger than a panel and a row block."""
    return [(rank, rank), (rank + 1, 2 * rank + 35), (2 * rank + 65, rank + 3), (131, 197)]


def stored(rank: int, core: str, dtype=torch.float32, scale: float = 1.0):
    """(W, A, B, C) with float32 factors; C as the op takes it."""
    shapes = shapes_of(rank)
    w = weights(shapes, dtype, seed=rank, scale=scale)
    left = weights([(m, rank) for m, _ in shapes], seed=1)
    right = weights([(n, rank) for _, n in shapes], seed=2)
    cores = {
        "none": None,
        "diagonal": weights([(rank,)] * len(shapes), seed=3),
        "full": weights([(rank, rank)] * len(shapes), seed=4),
        "regenerated": CORE,
    }[core]
    return w, left, right, cores


def core_matrices(cores, rank: int) -> list[torch.Tensor]:
    if cores is None:
        return [torch.eye(rank)] * len(IDS)
    if isinstance(cores, int):
        return [ops.draw((rank, rank), cores, ident) for ident in IDS]
    return [c.diag() if c.dim() == 1 else c for c in cores]


def perturbed(tensors, left, right, **options):
    tensors = clones(tensors)
    ops.lowrank_perturb_(tensors, left, right, **{"tensor_ids": IDS[: len(tensors)], **options})
    return tensors


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rank", "core"), with_cores(RANKS), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_pytorch(backend, dtype, rank, core):
    """Largest and root mean square error over the list, against float64; PyTorch's addmm in W's dtype beside it."""
    decay = 0.0 if rank % 2 else 0.1
    w, left, right, cores = stored(rank, core, dtype)
    got = perturbed(w, left, right, core=cores, coefficient=0.3, decay=decay, backend=backend)
    own, torch_own = [], []
    for i, c in enumerate(core_matrices(cores, rank)):
        exact = (1 - decay) * w[i].double() + 0.3 * left[i].double() @ c.double() @ right[i].double().T
        a, b = left[i].to(dtype), right[i].to(dtype)
        if core != "none":
            a = a @ c.to(dtype)
        plain = torch.addmm(w[i], a, b.T, beta=1 - decay, alpha=0.3)
        own.append((got[i].double() - exact).flatten())
        torch_own.append((plain.double() - exact).flatten())
    own, torch_own = torch.cat(own), torch.cat(torch_own)
    assert own.abs().max() <= 2 * torch_own.abs().max()
    assert own.square().mean().sqrt() <= 2 * torch_own.square().mean().sqrt()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quotients_are_within_their_bounds(backend, dtype, rank):
    """With second moments that no 16-bit number could hold."""
    w, left, right, cores = stored(rank, "diagonal", dtype)
    below = [1e-8 * c.square() for c in cores]
    options = {"core": cores, "below": below, "e": 1e-10, "coefficient": 3e-5, "backend": backend}
    for values in zip(perturbed(w, left, right, **options), w, left, right, cores, below, strict=True):
        assert_quotient(*values, e=1e-10, coefficient=3e-5)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_once(backend, dtype, rank):
    """With factors representable in W's dtype the result is within half an ulp, plus what a float32 sum of rank
    products may lose, of the exact one: factors are not rounded again and nothing is rounded to 16 bits early."""
    w, left, right, _ = stored(rank, "none", dtype)
    left, right = ([f.to(dtype) for f in factors] for factors in (left, right))
    got = perturbed(w, left, right, coefficient=0.25, backend=backend)
    info = torch.finfo(dtype)
    for g, x, a, b in zip(got, w, left, right, strict=True):
        exact = x.double() + 0.25 * a.double() @ b.double().T
        products = 0.25 * a.double().abs() @ b.double().abs().T
        gamma = (rank + 2) * 2.0**-24 / (1 - (rank + 2) * 2.0**-24)
        lost = gamma * products + 2.0**-24 * (x.double().abs() + products)
        half_ulp = torch.maximum(exact.abs() + lost, torch.tensor(info.smallest_normal)) * info.eps / 2
        assert ((g.double() - exact).abs() <= half_ulp + lost).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_one_needs_no_sum(dtype):
    """One product, one scaling, one addition: the same bits from both backends."""
    w, left, right, _ = stored(1, "none", dtype)
    got, want = (perturbed(w, left, right, coefficient=0.3, backend=b, **ROUNDING) for b in ("cpu", "reference"))
    assert_all_same(got, want)


# ---- factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rank", "core"), with_cores((1, 3, 16, 33)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_regenerated_factors_are_draws(backend, dtype, rank, core):
    w, _, _, cores = stored(rank, core, dtype)
    left = [ops.draw((m, rank), LEFT, i) for (m, _), i in zip(shapes_of(rank), IDS, strict=True)]
    right = [ops.draw((n, rank), RIGHT, i) for (_, n), i in zip(shapes_of(rank), IDS, strict=True)]
    options = {"coefficient": 0.1, "backend": backend}
    want = perturbed(w, left, right, core=cores, **options)
    assert_all_same(perturbed(w, LEFT, right, core=cores, **options), want)
    assert_all_same(perturbed(w, left, RIGHT, core=cores, **options), want)
    assert_all_same(perturbed(w, LEFT, RIGHT, core=cores, rank=rank, **options), want)
    if core == "regenerated":
        drawn = core_matrices(cores, rank)
        assert_all_same(perturbed(w, left, right, core=drawn, **options), want)


@pytest.mark.parametrize("core", ["none", "diagonal", "full"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_in_either_dtype(backend, dtype, core):
    """A factor in W's dtype is its float32 copy."""
    w, left, right, cores = stored(8, core, dtype)
    left, right = ([f.to(dtype) for f in factors] for factors in (left, right))
    cores = cores and [c.to(dtype) for c in cores]
    got = perturbed(w, left, right, core=cores, coefficient=0.1, backend=backend)
    wide = [[f.float() for f in factors] if factors else None for factors in (left, right, cores)]
    assert_all_same(got, perturbed(w, wide[0], wide[1], core=wide[2], coefficient=0.1, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_coefficient_changes_nothing(backend, dtype):
    w, left, right, cores = stored(8, "full", dtype)
    assert_all_same(perturbed(w, left, right, core=cores, coefficient=0.0, backend=backend), w)


# ---- lists, threads, layouts, shards -------------------------------------------------------------------------------

CASES = [(16, "full"), (33, "none"), (5, "regenerated"), (8, "diagonal")]


@pytest.mark.parametrize(("rank", "core"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_lists_and_out_do_not_matter(set_threads, dtype, rank, core):
    w, left, right, cores = stored(rank, core, dtype)
    options = {"coefficient": [0.1, 0.2, 0.3, 0.4], "decay": [0.0, 0.01, 0.02, 0.0], **ROUNDING}
    set_threads(1)
    want = perturbed(w, left, right, core=cores, **options)
    set_threads(2)
    assert_all_same(perturbed(w, left, right, core=cores, **options), want)
    out, before = poison(w), clones(w)
    ops.lowrank_perturb_(w, left, right, core=cores, tensor_ids=IDS, out=out, **options)
    assert_all_same(out, want)
    assert_all_same(w, before)
    for order in ([2], [3, 0], [3, 2, 1, 0]):

        def pick(values, order=order):
            return [values[i] for i in order] if isinstance(values, list) else values

        chosen = {name: pick(value) for name, value in options.items()}
        some = perturbed(pick(w), pick(left), pick(right), core=pick(cores), **{**chosen, "tensor_ids": pick(IDS)})
        assert_all_same(some, pick(want))


@pytest.mark.parametrize("rank", (16, 33))
@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_factors_of_shards_are_slices_of_the_whole(dtype, rank):
    """On the CPU, whose sums have one order; the reference is held to this where there are none."""
    (w,) = weights([(70, 110)], dtype)
    options = {"coefficient": 0.1, "rank": rank, "core": CORE, "backend": "cpu", **ROUNDING}
    (whole,) = perturbed([w], LEFT, RIGHT, **options)
    for top, bottom, left, right in ((7, 30, 0, 110), (0, 70, 40, 110), (33, 34, 5, 99), (60, 70, 109, 110)):
        local = w[top:bottom, left:right].contiguous()
        (got,) = perturbed([local], LEFT, RIGHT, slices=[(top * 110 + left, 110)], **options)
        assert_same_bits(got, whole[top:bottom, left:right].contiguous())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_matrices(backend):
    for shape in ((0, 5), (5, 0), (0, 0)):
        w = [torch.empty(shape), torch.ones(4, 3)]
        ops.lowrank_perturb_(w, LEFT, RIGHT, rank=2, coefficient=0.1, tensor_ids=IDS[:2], backend=backend)
        (want,) = perturbed(
            [torch.ones(4, 3)], LEFT, RIGHT, rank=2, coefficient=0.1, tensor_ids=IDS[1:2], backend=backend
        )
        assert_same_bits(w[1], want)


# ---- stochastic rounding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_pass_rounds_the_float32_pass(backend, dtype, decay):
    """With factors representable in W's dtype the float32 pass gives what is rounded (by the rounding that test_dense
    holds to its definition)."""
    w, left, right, _ = stored(8, "none", dtype)
    left, right = ([f.to(dtype).float() for f in factors] for factors in (left, right))
    options = {"coefficient": 0.125, "decay": decay, "backend": backend}
    got = perturbed(w, left, right, **options, **ROUNDING)
    wide = perturbed([x.float() for x in w], left, right, **options)
    for g, value, ident in zip(got, wide, IDS, strict=True):
        words = reference.words(0, value.numel(), ident, ROUNDING["rounding_key"], value.device).view(value.shape)
        assert_same_bits(g, reference.stochastic_round(value, words, dtype))
        assert not torch.equal(g, value.to(dtype)) or g.numel() < 100


# ---- aligned core --------------------------------------------------------------------------------------------------

SINGULAR_VALUES = [torch.linspace(3, 0.01, rank) for rank in (1, 2, 7, 16)]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_of_a_wide_matrix(dtype):
    """The C++ kernel takes its columns in blocks; the words of an element do not depend on them."""
    w, left, right = (t.to(dtype) for t in weights([(9, 8300), (9, 2), (8300, 2)]))
    got, value = w.clone(), w.float()
    for target, options in ((got, ROUNDING), (value, {})):
        factors = [left.float()], [right.float()]
        ops.lowrank_perturb_([target], *factors, coefficient=0.125, tensor_ids=IDS[:1], backend="cpu", **options)
    words = reference.words(0, value.numel(), IDS[0], ROUNDING["rounding_key"], value.device).view(value.shape)
    assert_same_bits(got, reference.stochastic_round(value, words, dtype))


@pytest.mark.parametrize("signs", ["fixed", "per matrix", "global"])
@pytest.mark.parametrize("delta", [0.0, 0.5, 4.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment(backend, delta, signs):
    """<S, Z> = xi sqrt(delta) |S|, but for the rounding of the diagonal to float32: 2**-24 |z_ii| each."""
    options = {
        "fixed": {},
        "per matrix": {"sign_key": SIGN},
        "global": {"sign_key": SIGN, "sign_ids": [0] * 4},
    }[signs]
    cores = ops.aligned_core(SINGULAR_VALUES, CORE, tensor_ids=IDS, delta=delta, backend=backend, **options)
    for s, z, ident in zip(SINGULAR_VALUES, cores, IDS, strict=True):
        sign_id = 0 if signs == "global" else ident
        xi = 1.0 if signs == "fixed" else ops.draw(1, SIGN, sign_id, distribution="rademacher").item()
        s, diagonal = s.double(), z.diagonal().double()
        rounding = 2.0**-24 * (s * diagonal.abs()).sum() * (1 + 1e-6)
        assert abs((s @ diagonal - xi * math.sqrt(delta) * s.norm()).item()) <= rounding
        start = ops.draw(z.shape, CORE, ident)
        off = ~torch.eye(len(s), dtype=torch.bool)
        assert_same_bits(z[off], start[off])
        assert not torch.equal(z.diagonal(), start.diagonal())
        # What moved the diagonal is parallel to S.
        alpha = (s @ start.diagonal().double() - xi * math.sqrt(delta) * s.norm()) / s.norm() ** 2
        want = start.diagonal().double() - alpha * s
        assert ((diagonal - want).abs() <= 2.0**-24 * want.abs() + 1e-12).all()


def test_signs_differ_between_matrices_and_agree_under_one_id():
    ids, s = list(range(64)), [torch.ones(2)] * 64

    def signs(**options):
        cores = ops.aligned_core(s, CORE, tensor_ids=ids, delta=1.0, sign_key=SIGN, **options)
        return {float(z.diagonal().sum().sign()) for z in cores}

    assert signs() == {-1.0, 1.0}
    assert len(signs(sign_ids=[7] * 64)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_align(backend):
    (core,) = ops.aligned_core([torch.zeros(5)], CORE, tensor_ids=IDS[:1], delta=0.7, backend=backend)
    assert_same_bits(core, ops.draw((5, 5), CORE, IDS[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_aligned_core_of_many_ranks_at_once(backend):
    """Ranks are padded to one another in the sums: that changes no bit, up to the largest rank."""
    values = [torch.linspace(3, 0.01, rank) for rank in (1, 3, 16, 16, 31, 32, 33, 511, 512)]
    ids, options = list(range(len(values))), {"delta": 0.7, "sign_key": SIGN, "backend": backend}
    together = ops.aligned_core(values, CORE, tensor_ids=ids, **options)
    for i, s in enumerate(values):
        assert_same_bits(together[i], ops.aligned_core([s], CORE, tensor_ids=[i], **options)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_singular_values_that_are_not_finite(backend, bad):
    values = [torch.ones(3), torch.tensor([1.0, bad, 1.0])]
    with pytest.raises(ValueError, match=r"^singular_values: got NaN or infinity"):
        ops.aligned_core(values, CORE, tensor_ids=[1, 2], delta=0.5, backend=backend)


def test_factors_may_be_shared_but_not_written_over():
    def calls(shared):
        weights, left = [torch.ones(8, 4), torch.zeros(8, 4)], torch.linspace(-1, 1, 24).view(8, 3)
        right = [torch.linspace(0, 1, 12).view(4, 3)] * 2
        ops.lowrank_perturb_(weights, [left, left if shared else left.clone()], right, coefficient=0.5)
        return weights

    assert all(map(torch.equal, calls(True), calls(False)))
    square = [torch.ones(8, 8), torch.zeros(8, 8)]
    arguments = {"weights": square, "left": square[::-1], "right": [torch.ones(8, 8)] * 2, "coefficient": 1.0}
    refused("lowrank_perturb_", arguments, ValueError, r"^left\[0\]: shares memory with weights")
    arguments |= {"left": arguments["right"], "out": [torch.zeros(8, 8), arguments["right"][0]]}
    refused("lowrank_perturb_", arguments, ValueError, r"^left\[0\]: shares memory with out")


def test_rank_of_a_shard_is_bounded_by_its_unsharded_row():
    w = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"^rank: got 9; accepted: 1 to 8"):
        ops.lowrank_perturb_([w], 1, 2, rank=9, coefficient=1.0, tensor_ids=[1], slices=[(0, 8)])
    assert (w == 0).all()
    ops.lowrank_perturb_([w], 1, 2, rank=8, coefficient=1.0, tensor_ids=[1], slices=[(0, 8)])
    assert (w != 0).all()
