"""lowrank_forward_: accuracy against float64, slices of the rows, layouts, threads, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.helpers import DTYPES, assert_same_bits, clones, ops, weights
from support.refusals import refused

from pgap_kernels import checks, draw, noise
from pgap_kernels.arguments import ForwardArguments
from pgap_kernels.ops.forward import add_lowrank_

BACKENDS = ("reference", "cpu")
RANKS = (1, 3, 8, 16, 33, 64, 200)


def problem(rank, dtype=torch.float32, x_dtype=None, transposed=False, rows=(37,), shape=(70, 391), seed=0):
    """(y, x, A, B, C) of a weight of that shape; x D is about as large as y."""
    m, n = shape
    into, out_of = (m, n) if transposed else (n, m)
    y, x, left, right, c = weights([(*rows, out_of), (*rows, into), (m, rank), (n, rank), (rank, rank)], seed=seed)
    left /= rank * math.sqrt(max(into, 1))
    return y.to(dtype), x.to(x_dtype or dtype), left, right, c


def moved(y, x, left, right, *cores, **options):
    y = y.clone()
    ops.lowrank_forward_(y, x, left, right, list(cores), **options)
    return y


def direction(left, right, core):
    return left.double() @ core.double() @ right.double().T


def applied(x, d, transposed):
    return x.double() @ (d if transposed else d.T)


# ---- accuracy ------------------------------------------------------------------------------------------------------


def plain(y, x, left, right, core, transposed):
    """The same in PyTorch, in y's dtype."""
    x, left, right, core = (t.to(y.dtype) for t in (x, left, right, core))
    if transposed:
        return y + ((x @ left) @ core) @ right.T
    return y + ((x @ right) @ core.T) @ left.T


def assert_twice_as_good(got, other, exact, largest=True):
    """Largest and root mean square error at most twice those of the other."""
    own, theirs = got.double() - exact, other.double() - exact
    assert not largest or own.abs().max() <= 2 * theirs.abs().max()
    assert own.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_pytorch(backend, dtype, rank):
    """Over x of every dtype and both orders. At rank 1 all of a token's errors are one number's, times the factor: too
    few for their largest to be compared, so ``test_rounds_once`` alone bounds it."""
    got, other, exact = [], [], []
    for seed, (x_dtype, transposed) in enumerate(itertools.product(DTYPES, (False, True))):
        rows = (301,) if rank == 1 else (37,)
        y, x, left, right, c = problem(rank, dtype, x_dtype, transposed, rows, seed=seed)
        got.append(moved(y, x, left, right, c, transposed=transposed, backend=backend).flatten())
        other.append(plain(y, x, left, right, c, transposed).flatten())
        exact.append((y.double() + applied(x, direction(left, right, c), transposed)).flatten())
    assert_twice_as_good(torch.cat(got), torch.cat(other), torch.cat(exact), largest=rank > 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums(backend, transposed):
    """Many blocks of inputs: a sum that ran through all of them in one chain would be three times as far off."""
    y, x, left, right, c = problem(8, transposed=transposed, shape=(8200, 40) if transposed else (40, 8200))
    got = moved(torch.zeros_like(y), x, left, right, c, transposed=transposed, backend=backend)
    exact = applied(x, direction(left, right, c), transposed)
    assert_twice_as_good(got, plain(torch.zeros_like(y), x, left, right, c, transposed), exact)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_once(backend, dtype, rank):
    """Within half an ulp of y's dtype, plus what the float32 sums may lose: nothing is rounded to 16 bits early."""
    y, x, left, right, c = problem(rank, dtype)
    got = moved(y, x, left, right, c, backend=backend)
    exact = y.double() + applied(x, direction(left, right, c), False)
    products = x.double().abs() @ right.double().abs() @ c.double().abs().T @ left.double().abs().T
    terms = (len(right) + 2 * rank + 3) * 2.0**-24
    lost = terms / (1 - terms) * products + 2.0**-24 * (y.double().abs() + products)
    info = torch.finfo(dtype)
    half_ulp = torch.maximum(exact.abs() + lost, torch.tensor(info.smallest_normal)) * info.eps / 2
    assert ((got.double() - exact).abs() <= half_ulp + lost).all()


@pytest.mark.parametrize(("rank", "transposed"), [(3, False), (16, True), (64, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_layer_with_the_weight_moved(backend, dtype, rank, transposed):
    """The layer's own output and the op, against the layer whose weight is W + A C B^T."""
    _, x, left, right, c = problem(rank, dtype, transposed=transposed)
    (w,) = weights([(70, 391)], dtype, seed=3, scale=0.1)
    d = direction(left, right, c)

    def layer(inputs, weight):
        return inputs @ weight if transposed else torch.nn.functional.linear(inputs, weight)

    got = moved(layer(x, w), x, left, right, c, transposed=transposed, backend=backend)
    assert_twice_as_good(got, layer(x, (w + d).to(dtype)), layer(x.double(), w.double() + d))


@pytest.mark.parametrize("columns", (1, 15, 31, 32, 33, 48, 95))
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_every_remainder(dtype, columns):
    y, x, left, right, c = problem(5, dtype, rows=(14,), shape=(columns, 19))
    got = moved(y, x, left, right, c, backend="cpu")
    assert_twice_as_good(
        got, plain(y, x, left, right, c, False), y.double() + applied(x, direction(left, right, c), False)
    )


# ---- row indices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "index"), [(1, torch.int64), (8, torch.int32), (33, torch.int64), (200, torch.int32)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_indices_are_rows_of_the_identity(backend, dtype, rank, index):
    for factor_dtype in dict.fromkeys([torch.float32, dtype]):
        y, _, left, right, c = problem(rank, dtype, transposed=True, rows=(6, 7))
        left, right = left.to(factor_dtype), right.to(factor_dtype)
        indices = torch.randint(0, 70, (6, 7), generator=torch.Generator().manual_seed(1), dtype=index)
        indices[0, 0], indices[-1, -1] = 0, 69
        x = torch.eye(70)[indices.long()]
        options = {"transposed": True, "backend": backend}
        want = moved(y, x, left, right, c, -c, **options)
        assert_same_bits(moved(y, indices, left, right, c, -c, **options), want)


# ---- slices of the rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_core_for_each_slice_of_the_rows(backend, dtype, transposed):
    """Slices of the leading dimension, whatever lies behind it, as if each were a call of its own."""
    for rows, count in (((2, 1), 2), ((6, 5), 2), ((2, 53), 2), ((26,), 2), ((6, 7), 3), ((8, 3), 4), ((5,), 5)):
        y, x, left, right, _ = problem(16, dtype, transposed=transposed, rows=rows)
        cores = weights([(16, 16)] * count, seed=3)
        options = {"transposed": transposed, "backend": backend}
        got = moved(y, x, left, right, *cores, **options)
        for core, *part in zip(cores, *(t.chunk(count) for t in (got, y, x)), strict=True):
            assert_same_bits(part[0], moved(*part[1:], left, right, core, **options))


def test_the_fast_path_is_the_op():
    y, x, left, right, c = problem(3, rows=(6, 5))
    want = moved(y, x, left, right, c, 2 * c, -c)
    shape, rank = [len(left), len(right)], left.shape[1]
    add_lowrank_(y, x, ForwardArguments([left], [right], [c, 2 * c, -c], [], [], shape, rank, tensor_id=0))
    assert_same_bits(y, want)


# ---- slices with directions of their own ---------------------------------------------------------------------------

KEYS = [noise.derive(3, 4, noise.Role.LEFT, i) for i in range(3)]


def of_slices(kind: str, left, right, core, slices: int) -> list[dict]:
    """What the op takes for each slice: factors that all share, one each, or a key for each; cores or coefficients."""
    drawn = {"shape": (len(left), len(right)), "tensor_id": 7, "rank": left.shape[1]}
    made = []
    for i in range(slices):
        own = {"left": left, "right": right} if kind == "shared" else {"left": [(i + 1) * left], "right": [right - i]}
        own |= {"left": [KEYS[i]], "right": [KEYS[-1 - i]], **drawn} if kind == "drawn" else {}
        own |= {"left": [KEYS[i]], **drawn} if kind == "half drawn" else {}
        made.append({**own, "cores": [(i - 1.5) * core]} if kind != "drawn" else {**own, "coefficients": [i - 1.5]})
    return made


def together(single: list[dict]) -> dict:
    """One call for all slices."""
    several = ("left", "right", "cores", "coefficients")
    return {
        name: [v for own in single for v in own[name]] if name in several and isinstance(value, list) else value
        for name, value in single[0].items()
    }


@pytest.mark.parametrize("kind", ["shared", "own", "drawn", "half drawn"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_is_a_call_of_its_own(backend, dtype, kind):
    """Whatever the others see: to the bit."""
    for rank, transposed, rows in ((1, False, (6, 5)), (8, True, (3, 7)), (19, False, (3,))):
        y, x, left, right, c = problem(rank, dtype, transposed=transposed, rows=rows)
        options = {"transposed": transposed, "backend": backend}
        single, got = of_slices(kind, left, right, c, 3), y.clone()
        ops.lowrank_forward_(got, x, **together(single), **options)
        for own, *part in zip(single, *(t.chunk(3) for t in (got, y, x)), strict=True):
            ops.lowrank_forward_(part[1], part[2], **own, **options)
            assert_same_bits(part[0], part[1])
        assert not torch.equal(got, problem(rank, dtype, transposed=transposed, rows=rows)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_factors_are_those_of_draw(backend, dtype):
    """Of a shard its rows of the unsharded ones; with indices too."""
    m, n, rank, base, stride = 70, 391, 5, 3 * 1000 + 40, 1000
    for span, rows in ((None, (0, 0)), ((base, stride), (3, 40))):
        for transposed, indices in ((False, False), (True, False), (True, True)):
            y, x, *_ = problem(rank, dtype, transposed=transposed, rows=(4, 3), shape=(m, n))
            x = torch.arange(12).view(4, 3) * 5 % m if indices else x
            left, right = (
                [draw((size, rank), key, 7, offset=first * rank) for key in keys]
                for size, first, keys in ((m, rows[0], KEYS[:2]), (n, rows[1], KEYS[1:]))
            )
            options = {"coefficients": [1.0, -0.5], "transposed": transposed, "backend": backend}
            got, want = y.clone(), y.clone()
            place = {"shape": (m, n), "rank": rank, "tensor_id": 7, "span": span}
            ops.lowrank_forward_(got, x, KEYS[:2], checks.key_tensor("keys", KEYS[1:]), **place, **options)
            ops.lowrank_forward_(want, x, left, right, **options)
            assert_same_bits(got, want)


# ---- factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_in_either_dtype(backend, dtype):
    """A factor in y's dtype is its float32 copy."""
    for rank in (5, 16):
        y, x, left, right, c = problem(rank, dtype)
        left, right = left.to(dtype), right.to(dtype)
        want = moved(y, x, left.float(), right.float(), c, backend=backend)
        assert_same_bits(moved(y, x, left, right, c, backend=backend), want)
        assert_same_bits(moved(y, x, left, right.float(), c, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_core_of_zeros_changes_nothing(backend):
    y, x, left, right, c = problem(8, torch.bfloat16)
    assert_same_bits(moved(y, x, left, right, 0 * c, backend=backend), y)


# ---- threads, blocks, layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", (3, 16, 33))
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_do_not_matter(set_threads, dtype, rank):
    """A token's bits are its own: the same from any number of threads, and alone."""
    y, x, left, right, c = problem(rank, dtype, rows=(254,))
    for cores in ([c], [c, -c]):
        set_threads(1)
        want = moved(y, x, left, right, *cores)
        set_threads(2)
        assert_same_bits(moved(y, x, left, right, *cores), want)
        for part in (slice(0, 1), slice(7, 12), slice(45, 120)):  # within the first core's rows
            assert_same_bits(moved(y[part], x[part], left, right, c), want[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend, dtype):
    y, x, left, right, c = problem(8, dtype, rows=(4, 10))
    want = moved(y, x, left, right, c, backend=backend)
    wide = torch.full((4, 10, 400), float("nan"), dtype=dtype)
    wide[..., 3:394] = x
    for other in (wide[..., 3:394], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert_same_bits(moved(y, other, left, right, c, backend=backend), want)
    one = x[:, :1].expand_as(x)
    want = moved(y, one.contiguous(), left, right, c, backend=backend)
    assert_same_bits(moved(y, one, left, right, c, backend=backend), want)


@pytest.mark.parametrize(("shape", "dtype"), [*zip([(1, 19), (33, 19), (70, 19)], DTYPES, strict=True)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_else_is_written(backend, dtype, shape):
    y, x, left, right, c = problem(5, dtype, rows=(13,), shape=shape)
    whole = torch.full((15, shape[0]), float("nan"), dtype=dtype)
    whole[1:14] = y
    others = [x, left, right, c]
    before = clones(others)
    ops.lowrank_forward_(whole[1:14], x, left, right, [c], backend=backend)
    assert_same_bits(whole[1:14], moved(y, x, left, right, c, backend=backend))
    assert whole[0].isnan().all() and whole[14].isnan().all()
    for t, b in zip(others, before, strict=True):
        assert_same_bits(t, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for rows, shape in (((0,), (4, 5)), ((2, 0), (4, 5)), ((3,), (0, 5)), ((3,), (4, 0))):
        y, x, left, right, c = problem(2, rows=rows, shape=shape)
        assert_same_bits(moved(y, x, left, right, c, backend=backend), y)


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(**change) -> dict:
    """Arguments that the op accepts: y (4, 3, 6), W (6, 8), rank 2."""
    y, x, left, right, c = problem(2, rows=(4, 3), shape=(6, 8))
    return {"outputs": y, "inputs": x, "left": left, "right": right, "cores": [c], **change}


def indexed(indices) -> dict:
    """Arguments with indices of rows of A."""
    y = torch.ones(2, 3, 8)
    return {"outputs": y, "inputs": torch.tensor(indices).view(2, 3), "transposed": True}


def test_the_good_arguments_are_accepted():
    for change in ({}, indexed([0, 1, 2, 3, 4, 5]), {"cores": weights([(2, 2)] * 4)}):
        arguments = good(**change)
        before = arguments["outputs"].clone()
        ops.lowrank_forward_(**arguments)
        assert not torch.equal(arguments["outputs"], before)


BUFFER = torch.zeros(400)
REFUSED = {
    "outputs a list": ({"outputs": [torch.ones(4, 6)]}, TypeError, "outputs: got list"),
    "outputs float64": ({"outputs": torch.ones(4, 3, 6).double()}, TypeError, "outputs: got .*float64"),
    "outputs sparse": ({"outputs": torch.ones(4, 6).to_sparse()}, TypeError, "outputs: got torch.sparse_coo"),
    "outputs a vector": ({"outputs": torch.ones(6)}, ValueError, r"outputs: got shape \(6,\)"),
    "outputs strided": ({"outputs": torch.ones(4, 3, 12)[..., ::2]}, ValueError, "outputs: got shape .* strides"),
    "outputs narrow": ({"outputs": torch.ones(4, 3, 5)}, ValueError, "outputs: got 5 columns; accepted: 6"),
    "transposed no bool": ({"transposed": None}, TypeError, "transposed: got None"),
    "outputs of rows": ({"transposed": True}, ValueError, "outputs: got 6 columns; accepted: 8"),
    "inputs none": ({"inputs": None}, TypeError, "inputs: got NoneType"),
    "inputs float64": ({"inputs": torch.ones(4, 3, 8).double()}, TypeError, "inputs: got .*float64"),
    "inputs indices of a linear": ({"inputs": torch.ones(4, 3).long()}, TypeError, "inputs: got .*int64"),
    "inputs narrow": ({"inputs": torch.ones(4, 3, 7)}, ValueError, r"inputs: got shape .*; accepted: \(4, 3, 8\)"),
    "inputs flat": ({"inputs": torch.ones(12, 8)}, ValueError, r"inputs: got shape \(12, 8\)"),
    "indices of bytes": (
        {**indexed([0] * 6), "inputs": torch.zeros(2, 3, dtype=torch.uint8)},
        TypeError,
        "inputs: got .*uint8",
    ),
    "indices of another shape": (
        {**indexed([0] * 6), "inputs": torch.zeros(2, 3, 8, dtype=torch.int64)},
        ValueError,
        r"inputs: got shape \(2, 3, 8\); accepted: \(2, 3\)",
    ),
    "index too high": (indexed([0, 1, 2, 3, 4, 6]), ValueError, "inputs: got row indices 0 to 6; accepted: 0 to 5"),
    "index negative": (indexed([0, -1, 2, 3, 4, 5]), ValueError, "inputs: got row indices -1 to 5"),
    "left none": ({"left": None}, TypeError, "left: got None; accepted: a tensor, or a list"),
    "left empty": ({"left": []}, TypeError, "left: got \\[\\]; accepted: a tensor, or a list"),
    "left of another slice": (
        {"left": weights([(6, 2), (6, 2)])},
        ValueError,
        "left: got 2; accepted: 1, one for each slice of the rows",
    ),
    "left of two shapes": ({"left": weights([(6, 2), (5, 2)]), "cores": None}, ValueError, r"left\[1\]: got shape"),
    "left of two dtypes": (
        {"outputs": torch.ones(4, 3, 6).half(), "left": [torch.ones(6, 2), torch.ones(6, 2).half()], "cores": None},
        ValueError,
        r"left\[1\]: got shape .* torch.float16",
    ),
    "keys alone": ({"left": [1]}, ValueError, "shape: got None; accepted: of the weight and its factors, as left is"),
    "keys without an id": ({"left": [1], "shape": (6, 8)}, ValueError, "tensor_id: got None"),
    "keys without a rank": (
        {"left": [1], "right": [2], "shape": (6, 8), "tensor_id": 3},
        ValueError,
        "rank: got None; accepted: of the weight",
    ),
    "another rank": ({"rank": 3}, ValueError, "rank: got 3; accepted: 1 to 512, the rank of the factors"),
    "keys of another shape": (
        {"left": [1], "shape": (5, 8), "tensor_id": 3},
        ValueError,
        "outputs: got 6 columns; accepted: 5",
    ),
    "shape of one": ({"left": [1], "shape": (6,), "tensor_id": 3}, ValueError, r"shape: got \(6,\)"),
    "an id too large": ({"left": [1], "shape": (6, 8), "tensor_id": 1 << 32}, ValueError, "tensor_id: got"),
    "a span that ends late": ({"span": (3, 8)}, ValueError, "span: got base 3 and row_stride 8"),
    "coefficients beside cores": ({"coefficients": [1.0]}, ValueError, "coefficients: got some beside cores"),
    "coefficients none": ({"cores": None, "coefficients": []}, TypeError, r"coefficients: got \[\]"),
    "coefficients infinite": (
        {"cores": None, "coefficients": [1.0, math.inf]},
        ValueError,
        r"coefficients\[1\]: got inf",
    ),
    "coefficients of a table": (
        {"cores": None, "coefficients": torch.ones(2, 2)},
        ValueError,
        r"coefficients: got torch.float32 of shape \(2, 2\)",
    ),
    "coefficients that do not divide the rows": (
        {"cores": None, "coefficients": [1.0] * 3},
        ValueError,
        "coefficients: got 3 for 4 rows",
    ),
    "left float16": ({"left": torch.ones(6, 2).half()}, TypeError, "left: got .*float16"),
    "left a vector": ({"left": torch.ones(6)}, ValueError, r"left: got shape \(6,\)"),
    "left strided": ({"left": torch.ones(2, 6).T}, ValueError, "left: got shape .* strides"),
    "left of no rank": ({"left": torch.ones(6, 0)}, ValueError, r"left: got shape \(6, 0\)"),
    "rank too high": (
        {"left": torch.ones(6, 513), "right": torch.ones(8, 513)},
        ValueError,
        r"left: got shape \(6, 513\)",
    ),
    "right of another rank": ({"right": torch.ones(8, 3)}, ValueError, r"right: got shape \(8, 3\)"),
    "right of other rows": ({"right": torch.ones(7, 2)}, ValueError, r"inputs: got shape .*accepted: \(4, 3, 7\)"),
    "cores a tensor": ({"cores": torch.ones(1, 2, 2)}, TypeError, "cores: got Tensor"),
    "cores empty": ({"cores": []}, ValueError, "cores: got an empty list"),
    "core of another rank": ({"cores": weights([(2, 2), (3, 3)])}, ValueError, r"cores\[1\]: got shape \(3, 3\)"),
    "core float16": ({"cores": [torch.ones(2, 2).half()]}, TypeError, r"cores\[0\]: got dtype torch.float16"),
    "core strided": ({"cores": [torch.ones(2, 4)[:, ::2]]}, ValueError, r"cores\[0\]: got shape .* strides"),
    "cores that do not divide the rows": (
        {"cores": weights([(2, 2)] * 3)},
        ValueError,
        "cores: got 3 for 4 rows; accepted: a number that divides them",
    ),
    "core overlaps": (
        {"outputs": BUFFER[:72].view(4, 3, 6), "cores": [torch.ones(2, 2), BUFFER[70:74].view(2, 2)]},
        ValueError,
        r"cores\[1\]: shares memory",
    ),
    "inputs overlap": (
        {"outputs": BUFFER[:72].view(4, 3, 6), "inputs": BUFFER[71:167].view(4, 3, 8)},
        ValueError,
        "inputs: shares memory",
    ),
    "strided inputs overlap": (
        {"outputs": BUFFER[100:172].view(4, 3, 6), "inputs": BUFFER[:192].view(4, 3, 16)[..., :8]},
        ValueError,
        "inputs: shares memory",
    ),
    "left overlaps": (
        {"outputs": BUFFER[:72].view(4, 3, 6), "left": BUFFER[60:72].view(6, 2)},
        ValueError,
        "left: shares memory",
    ),
    **{
        f"{name} on meta": ({name: good()[name].to("meta")}, ValueError, f"{name}: got a tensor on meta; accepted: cpu")
        for name in ("inputs", "left", "right")
    },
    "cores on meta": ({"cores": [torch.ones(2, 2, device="meta")]}, ValueError, r"cores\[0\]: got a tensor on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    change, error, match = REFUSED[case]
    refused("lowrank_forward_", good(**change), error, f"^{match}")


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(-1, torch.int64), (6, torch.int64), (2**40, torch.int64), (-1, torch.int32), (6, torch.int32)],
)
def test_the_kernel_itself_looks_at_row_indices(number, dtype):
    """Whoever calls it: nothing is read outside the factor and nothing is written."""
    y, left, right = torch.ones(2, 8), torch.ones(6, 2), torch.ones(8, 2)
    indices = torch.tensor([0, number], dtype=dtype)
    with pytest.raises(RuntimeError, match=f"inputs: got row index {number}; accepted: 0 to 5"):
        torch.ops.pgap_kernels_cpu.forward(
            y, indices, [left], [right], [torch.ones(2, 2)], [], [], [6, 8], 2, tensor_id=0, span=[], transposed=True
        )
    assert torch.equal(y, torch.ones(2, 8))
