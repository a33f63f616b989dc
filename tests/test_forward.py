"""lowrank_forward_: accuracy against float64, its sources of Z, layouts, threads, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch
from helpers import DTYPES, assert_same_bits, clones, weights
from refusals import KEYS, refused

from benchmarks import forward
from pgap_kernels import noise, ops

BACKENDS = ("reference", "cpu")
RANKS = (1, 3, 8, 16, 33, 64, 200)
CORE, SIGN = (noise.derive(5, 1, role) for role in (noise.Role.CORE, noise.Role.SIGN))
IDENT = noise.tensor_id("layer")
TABLE = torch.ops.pgap_kernels


def problem(rank, dtype=torch.float32, x_dtype=None, transposed=False, rows=(37,), shape=(70, 391), seed=0):
    """(y, x, A, B, C, Z) of a weight of that shape; x D is about as large as y."""
    m, n = shape
    into, out_of = (m, n) if transposed else (n, m)
    y, x, left, right, c, z = weights(
        [(*rows, out_of), (*rows, into), (m, rank), (n, rank), (rank, rank), (rank, rank)], seed=seed
    )
    left /= rank * math.sqrt(max(into, 1))
    return y.to(dtype), x.to(x_dtype or dtype), left, right, c, z


def moved(y, x, left, right, **options):
    y = y.clone()
    ops.lowrank_forward_(y, x, left, right, **options)
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
    """Over x of every dtype, both orders and every kind of core. At rank 1 all of a token's errors are one number's,
    times the factor: too few for their largest to be compared, so ``test_rounds_once`` alone bounds it."""
    got, other, exact = [], [], []
    for seed, (x_dtype, transposed, kind) in enumerate(itertools.product(DTYPES, (False, True), ("c", "z", "both"))):
        rows = (301,) if rank == 1 else (37,)
        y, x, left, right, c, z = problem(rank, dtype, x_dtype, transposed, rows, seed=seed)
        core, z = None if kind == "z" else c, None if kind == "c" else z
        whole = (0 if core is None else core) + (0 if z is None else 0.25 * z)
        options = {"core": core, "z": z, "coefficient": 0.25, "transposed": transposed, "backend": backend}
        got.append(moved(y, x, left, right, **options).flatten())
        other.append(plain(y, x, left, right, whole, transposed).flatten())
        exact.append((y.double() + applied(x, direction(left, right, whole), transposed)).flatten())
    assert_twice_as_good(torch.cat(got), torch.cat(other), torch.cat(exact), largest=rank > 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums(backend, transposed):
    """Many blocks of inputs: a sum that ran through all of them in one chain would be three times as far off."""
    y, x, left, right, c, _ = problem(8, transposed=transposed, shape=(8200, 40) if transposed else (40, 8200))
    got = moved(torch.zeros_like(y), x, left, right, core=c, transposed=transposed, backend=backend)
    exact = applied(x, direction(left, right, c), transposed)
    assert_twice_as_good(got, plain(torch.zeros_like(y), x, left, right, c, transposed), exact)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_once(backend, dtype, rank):
    """Within half an ulp of y's dtype, plus what the float32 sums may lose: nothing is rounded to 16 bits early."""
    y, x, left, right, c, _ = problem(rank, dtype)
    got = moved(y, x, left, right, core=c, backend=backend)
    exact = y.double() + applied(x, direction(left, right, c), False)
    products = x.double().abs() @ right.double().abs() @ c.double().abs().T @ left.double().abs().T
    terms = (len(right) + 2 * rank + 3) * 2.0**-24
    lost = terms / (1 - terms) * products + 2.0**-24 * (y.double().abs() + products)
    info = torch.finfo(dtype)
    half_ulp = torch.maximum(exact.abs() + lost, torch.tensor(info.smallest_normal)) * info.eps / 2
    assert ((got.double() - exact).abs() <= half_ulp + lost).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", (3, 16, 64))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_layer_with_the_weight_moved(backend, dtype, rank, transposed):
    """The layer's own output and the op, against the layer whose weight is W + A (C + a Z) B^T."""
    _, x, left, right, c, z = problem(rank, dtype, transposed=transposed)
    (w,) = weights([(70, 391)], dtype, seed=3, scale=0.1)
    d = direction(left, right, c.double() + 0.25 * z.double())

    def layer(inputs, weight):
        return inputs @ weight if transposed else torch.nn.functional.linear(inputs, weight)

    got = moved(layer(x, w), x, left, right, core=c, z=z, coefficient=0.25, transposed=transposed, backend=backend)
    assert_twice_as_good(got, layer(x, (w + d).to(dtype)), layer(x.double(), w.double() + d))


@pytest.mark.parametrize("columns", (1, 15, 31, 32, 33, 48, 95))
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_every_remainder(dtype, columns):
    y, x, left, right, c, _ = problem(5, dtype, rows=(14,), shape=(columns, 19))
    got = moved(y, x, left, right, core=c, backend="cpu")
    assert_twice_as_good(
        got, plain(y, x, left, right, c, False), y.double() + applied(x, direction(left, right, c), False)
    )


# ---- row numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("rank", (1, 8, 33, 200))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_numbers_are_rows_of_the_identity(backend, dtype, rank, index):
    for factor_dtype in dict.fromkeys([torch.float32, dtype]):
        y, _, left, right, c, z = problem(rank, dtype, transposed=True, rows=(6, 7))
        left, right = left.to(factor_dtype), right.to(factor_dtype)
        numbers = torch.randint(0, 70, (6, 7), generator=torch.Generator().manual_seed(1), dtype=index)
        numbers[0, 0], numbers[-1, -1] = 0, 69
        options = {"core": c, "z": z, "coefficient": 0.25, "transposed": True, "paired": True, "backend": backend}
        x = torch.eye(70)[numbers.long()]
        assert_same_bits(moved(y, numbers, left, right, **options), moved(y, x, left, right, **options))


# ---- where Z comes from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_regenerated_and_aligned_cores(backend, dtype):
    rank = 9
    y, x, left, right, c, _ = problem(rank, dtype)
    options = {"coefficient": torch.tensor([0.25]), "tensor_id": IDENT, "backend": backend}
    drawn = moved(y, x, left, right, z=ops.draw((rank, rank), CORE, IDENT), **options)
    assert not torch.equal(drawn, y)
    signed = torch.tensor(CORE - (CORE >> 63 << 64))
    for key in (CORE, signed, signed.view(1)):
        assert_same_bits(moved(y, x, left, right, z=key, **options), drawn)
    assert not torch.equal(moved(y, x, left, right, z=CORE, **{**options, "tensor_id": IDENT + 1}), drawn)
    values = [torch.linspace(3, 0.1, rank)]
    for signs in ({}, {"sign_key": SIGN}, {"sign_key": SIGN, "sign_ids": [4]}):
        (z,) = ops.aligned_core(values, CORE, tensor_ids=[IDENT], delta=0.5, backend=backend, **signs)
        want = moved(y, x, left, right, core=c, z=z, **options)
        got = moved(y, x, left, right, core=c, z=ops.AlignedCore(CORE, values, 0.5, **signs), **options)
        assert_same_bits(got, want)
        assert not torch.equal(want, moved(y, x, left, right, core=c, z=CORE, **options))


@pytest.mark.parametrize("core", ["none", "given"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_paired_halves(backend, dtype, transposed, core):
    """The first half of the leading dimension moves by +a, the second by -a, whatever lies behind it."""
    for rows in ((2, 1), (6, 5), (2, 53), (26,)):
        y, x, left, right, c, z = problem(16, dtype, transposed=transposed, rows=rows)
        options = {"core": c if core == "given" else None, "transposed": transposed, "backend": backend}
        got = moved(y, x, left, right, z=z, coefficient=0.25, paired=True, **options)
        half = rows[0] // 2
        for part, a in ((slice(half), 0.25), (slice(half, None), -0.25)):
            assert_same_bits(got[part], moved(y[part], x[part], left, right, z=z, coefficient=a, **options))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_in_either_dtype(backend, dtype):
    """A factor in y's dtype is its float32 copy."""
    for rank in (5, 16):
        y, x, left, right, c, _ = problem(rank, dtype)
        left, right = left.to(dtype), right.to(dtype)
        want = moved(y, x, left.float(), right.float(), core=c, backend=backend)
        assert_same_bits(moved(y, x, left, right, core=c, backend=backend), want)
        assert_same_bits(moved(y, x, left, right.float(), core=c, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_coefficient_changes_nothing(backend):
    y, x, left, right, _, z = problem(8, torch.bfloat16)
    assert_same_bits(moved(y, x, left, right, z=z, coefficient=0.0, backend=backend), y)


# ---- at once -------------------------------------------------------------------------------------------------------


# ---- threads, blocks, layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("rank", (3, 16, 33))
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_do_not_matter(set_threads, dtype, rank, paired):
    """A token's bits are its own: the same from any number of threads, and alone."""
    y, x, left, right, _, z = problem(rank, dtype, rows=(254,))
    set_threads(1)
    want = moved(y, x, left, right, z=z, paired=paired)
    set_threads(2)
    assert_same_bits(moved(y, x, left, right, z=z, paired=paired), want)
    if not paired:
        for part in (slice(0, 1), slice(7, 12), slice(45, 150), slice(253, 254)):
            assert_same_bits(moved(y[part], x[part], left, right, z=z), want[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend, dtype):
    y, x, left, right, c, _ = problem(8, dtype, rows=(4, 10))
    want = moved(y, x, left, right, core=c, backend=backend)
    wide = torch.full((4, 10, 400), float("nan"), dtype=dtype)
    wide[..., 3:394] = x
    for other in (wide[..., 3:394], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert_same_bits(moved(y, other, left, right, core=c, backend=backend), want)
    one = x[:, :1].expand_as(x)
    want = moved(y, one.contiguous(), left, right, core=c, backend=backend)
    assert_same_bits(moved(y, one, left, right, core=c, backend=backend), want)


@pytest.mark.parametrize("shape", [(1, 19), (33, 19), (70, 19)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_else_is_written(backend, dtype, shape):
    y, x, left, right, c, _ = problem(5, dtype, rows=(13,), shape=shape)
    whole = torch.full((15, shape[0]), float("nan"), dtype=dtype)
    whole[1:14] = y
    others = [x, left, right, c]
    before = clones(others)
    ops.lowrank_forward_(whole[1:14], x, left, right, core=c, backend=backend)
    assert_same_bits(whole[1:14], moved(y, x, left, right, core=c, backend=backend))
    assert whole[0].isnan().all() and whole[14].isnan().all()
    for t, b in zip(others, before, strict=True):
        assert_same_bits(t, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for rows, shape in (((0,), (4, 5)), ((2, 0), (4, 5)), ((3,), (0, 5)), ((3,), (4, 0))):
        y, x, left, right, c, z = problem(2, rows=rows, shape=shape)
        assert_same_bits(moved(y, x, left, right, core=c, z=z, backend=backend), y)


# ---- registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_version_counters(backend):
    y, x, left, right, c, z = problem(3)
    others = [x, left, right, c, z]
    before, version = [t._version for t in others], y._version
    ops.lowrank_forward_(y, x, left, right, core=c, z=z, backend=backend)
    assert y._version > version
    assert [t._version for t in others] == before


def table_arguments(dtype, kind, backend):
    y, x, left, right, c, z = problem(3, dtype, rows=(2, 3), shape=(6, 5), transposed=kind == "numbers")
    if kind == "numbers":
        x = torch.tensor([[0, 5, 2], [1, 1, 3]])
    z, keys = {"drawn": (None, [7]), "aligned": (torch.ones(3), [7, 8])}.get(kind, (z, []))
    tail = (3, [9] if kind == "aligned" else [], kind == "aligned", kind == "stored", kind == "numbers", backend)
    return y, x, left, right, c, z, torch.tensor(keys, dtype=torch.int64), torch.ones(1), torch.ones(1), *tail


@pytest.mark.parametrize("kind", ["stored", "numbers", "drawn", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype, kind):
    torch.library.opcheck(TABLE.lowrank_forward_.default, table_arguments(dtype, kind, backend))


def test_compiled_op():
    arguments = table_arguments(torch.float32, "stored", None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(y):
        TABLE.lowrank_forward_(y, *arguments[1:])
        return y + 1

    got, want = arguments[0].clone(), arguments[0].clone()
    result = step(got)
    TABLE.lowrank_forward_(want, *arguments[1:])
    assert_same_bits(got, want)
    assert_same_bits(result, want + 1)


# ---- benchmarks.forward --------------------------------------------------------------------------------------------


def test_benchmark(monkeypatch, tmp_path, capsys, set_threads):
    path = tmp_path / "rows.json"
    arguments = "--shape 48 32 --shape 32 40 --tokens 6 --rank 4 8 --threads 1 --repeats 2 --json"
    monkeypatch.setattr(sys, "argv", ["forward", *arguments.split(), str(path)])
    forward.main()
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 2 * 2 == len(capsys.readouterr().out.splitlines()) - 2
    for row in rows:
        assert all(row[name] > 0 for name in ("linear", "ours", "naive", "in_place"))
        assert row["ours_share"] == row["ours"] / row["linear"]
        assert row["threads"] == 1 and row["repeats"] == 2 and row["isa"]


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(**change) -> dict:
    """Arguments that the op accepts: y (4, 3, 6), W (6, 8), rank 2."""
    y, x, left, right, c, z = problem(2, rows=(4, 3), shape=(6, 8))
    arguments = {"outputs": y, "inputs": x, "left": left, "right": right, "core": c, "z": z, "coefficient": 0.5}
    return {**arguments, **change}


def numbered(numbers) -> dict:
    """Arguments with row numbers of A."""
    y = torch.ones(2, 3, 8)
    return {"outputs": y, "inputs": torch.tensor(numbers).view(2, 3), "transposed": True}


def test_the_good_arguments_are_accepted():
    for change in ({}, numbered([0, 1, 2, 3, 4, 5]), {"paired": True}, {"core": None}, {"z": None}):
        arguments = good(**change)
        before = arguments["outputs"].clone()
        ops.lowrank_forward_(**arguments)
        assert not torch.equal(arguments["outputs"], before)


BUFFER = torch.zeros(400)
ALIGNED = ops.AlignedCore(1, [torch.ones(2)], 0.5)
REFUSED = {
    "outputs a list": ({"outputs": [torch.ones(4, 6)]}, TypeError, "outputs: got list"),
    "outputs float64": ({"outputs": torch.ones(4, 3, 6).double()}, TypeError, "outputs: got .*float64"),
    "outputs integers": ({"outputs": torch.ones(4, 3, 6).long()}, TypeError, "outputs: got .*int64"),
    "outputs sparse": ({"outputs": torch.ones(4, 6).to_sparse()}, TypeError, "outputs: got torch.sparse_coo"),
    "outputs a vector": ({"outputs": torch.ones(6)}, ValueError, r"outputs: got shape \(6,\)"),
    "outputs strided": ({"outputs": torch.ones(4, 3, 12)[..., ::2]}, ValueError, "outputs: got shape .* strides"),
    "outputs narrow": ({"outputs": torch.ones(4, 3, 5)}, ValueError, "outputs: got 5 columns; accepted: 6"),
    "outputs of rows": (
        {"outputs": torch.ones(4, 3, 6), "transposed": True},
        ValueError,
        "outputs: got 6 columns; accepted: 8",
    ),
    "inputs none": ({"inputs": None}, TypeError, "inputs: got NoneType"),
    "inputs float64": ({"inputs": torch.ones(4, 3, 8).double()}, TypeError, "inputs: got .*float64"),
    "inputs numbers of a linear": ({"inputs": torch.ones(4, 3).long()}, TypeError, "inputs: got .*int64"),
    "inputs narrow": (
        {"inputs": torch.ones(4, 3, 7)},
        ValueError,
        r"inputs: got shape \(4, 3, 7\); accepted: \(4, 3, 8",
    ),
    "inputs short": ({"inputs": torch.ones(3, 3, 8)}, ValueError, r"inputs: got shape \(3, 3, 8\)"),
    "inputs flat": ({"inputs": torch.ones(12, 8)}, ValueError, r"inputs: got shape \(12, 8\)"),
    "numbers of bytes": (
        {**numbered([0] * 6), "inputs": torch.zeros(2, 3, dtype=torch.uint8)},
        TypeError,
        "inputs: got .*uint8",
    ),
    "numbers of another shape": (
        {**numbered([0] * 6), "inputs": torch.zeros(2, 3, 8, dtype=torch.int64)},
        ValueError,
        r"inputs: got shape \(2, 3, 8\); accepted: \(2, 3\)",
    ),
    "number too high": (numbered([0, 1, 2, 3, 4, 6]), ValueError, "inputs: got row numbers 0 to 6; accepted: 0 to 5"),
    "number negative": (numbered([0, -1, 2, 3, 4, 5]), ValueError, "inputs: got row numbers -1 to 5"),
    "left none": ({"left": None}, TypeError, "left: got NoneType"),
    "left float16": ({"left": torch.ones(6, 2).half()}, TypeError, "left: got .*float16"),
    "left a vector": ({"left": torch.ones(6)}, ValueError, r"left: got shape \(6,\)"),
    "left strided": ({"left": torch.ones(2, 6).T}, ValueError, "left: got shape .* strides"),
    "left of no rank": ({"left": torch.ones(6, 0)}, ValueError, r"left: got shape \(6, 0\)"),
    "rank too high": (
        {"left": torch.ones(6, 513), "right": torch.ones(8, 513), "core": torch.ones(513, 513), "z": None},
        ValueError,
        r"left: got shape \(6, 513\)",
    ),
    "right float16": ({"right": torch.ones(8, 2).half()}, TypeError, "right: got .*float16"),
    "right a vector": ({"right": torch.ones(8)}, ValueError, r"right: got shape \(8,\)"),
    "right of another rank": ({"right": torch.ones(8, 3)}, ValueError, r"right: got shape \(8, 3\)"),
    "right strided": ({"right": torch.ones(2, 8).T}, ValueError, "right: got shape .* strides"),
    "right of other rows": ({"right": torch.ones(7, 2)}, ValueError, r"inputs: got shape .*accepted: \(4, 3, 7\)"),
    "core a list": ({"core": [torch.ones(2, 2)]}, TypeError, "core: got list"),
    "core of one dimension": ({"core": torch.ones(2)}, ValueError, r"core: got shape \(2,\)"),
    "core float16": ({"core": torch.ones(2, 2).half()}, TypeError, "core: got .*float16"),
    "core strided": ({"core": torch.ones(2, 4)[:, ::2]}, ValueError, "core: got shape .* strides"),
    "z of another rank": ({"z": torch.ones(3, 3)}, ValueError, r"z: got shape \(3, 3\)"),
    "z float16": ({"z": torch.ones(2, 2).half()}, TypeError, "z: got .*float16"),
    "core overlaps": (
        {"outputs": BUFFER[:72].view(4, 3, 6), "core": BUFFER[70:74].view(2, 2)},
        ValueError,
        "core: shares memory",
    ),
    "z strided": ({"z": torch.ones(2, 4)[:, ::2]}, ValueError, "z: got shape .* strides"),
    "z a list": ({"z": [torch.ones(2, 2)], "tensor_id": 1}, TypeError, "z"),
    "neither": ({"core": None, "z": None}, ValueError, "core, z: got neither"),
    "id missing": ({"z": 1}, ValueError, "tensor_id: got None"),
    "id missing, aligned": ({"z": ALIGNED}, ValueError, "tensor_id: got None"),
    "id too wide": ({"z": 1, "tensor_id": 1 << 32}, ValueError, "tensor_id"),
    "id no integer": ({"z": 1, "tensor_id": 1.0}, TypeError, "tensor_id"),
    "paired without z": ({"z": None, "paired": True}, ValueError, "paired: got True with no z"),
    "paired of odd rows": (
        {"outputs": torch.ones(3, 4, 6), "inputs": torch.ones(3, 4, 8), "paired": True},
        ValueError,
        "paired: got True with 3 leading rows",
    ),
    "coefficient nan": ({"coefficient": math.nan}, ValueError, "coefficient: got nan"),
    "coefficient two": ({"coefficient": [0.1, 0.2]}, ValueError, "coefficient: got 2 values"),
    "coefficient a bool": ({"coefficient": True}, TypeError, "coefficient: got True"),
    "coefficient a string": ({"coefficient": "1"}, TypeError, "coefficient: got '1'"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
    "values of two": (
        {"z": ops.AlignedCore(1, [torch.ones(2)] * 2, 0.5), "tensor_id": 1},
        ValueError,
        r"z\.singular_values: got 2",
    ),
    "values of another rank": (
        {"z": ops.AlignedCore(1, [torch.ones(3)], 0.5), "tensor_id": 1},
        ValueError,
        r"z\.singular_values: got 1 of shape \(3,\)",
    ),
    "values strided": (
        {"z": ops.AlignedCore(1, [torch.ones(4)[::2]], 0.5), "tensor_id": 1},
        ValueError,
        r"z\.singular_values: got 1",
    ),
    "values float64": (
        {"z": ops.AlignedCore(1, [torch.ones(2).double()], 0.5), "tensor_id": 1},
        TypeError,
        r"z\.singular_values\[0\]: got dtype",
    ),
    "delta negative": ({"z": ops.AlignedCore(1, [torch.ones(2)], -0.5), "tensor_id": 1}, ValueError, r"z\.delta: got"),
    "delta nan": ({"z": ops.AlignedCore(1, [torch.ones(2)], math.nan), "tensor_id": 1}, ValueError, r"z\.delta: got"),
    "aligned key": ({"z": ops.AlignedCore(-1, [torch.ones(2)], 0.5), "tensor_id": 1}, ValueError, r"z\.key: got -1"),
    "sign ids alone": (
        {"z": ops.AlignedCore(1, [torch.ones(2)], 0.5, sign_ids=[1]), "tensor_id": 1},
        ValueError,
        r"z\.sign_ids: got ids without a sign_key",
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
}


@torch.no_grad()
@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, backend):
    """On the long way, and where plain arguments go to the kernel at once."""
    change, error, match = REFUSED[case]
    refused("lowrank_forward_", good(**{"backend": backend, **change}), error, f"^{match}")


@pytest.mark.parametrize(("key", "error"), [case for case in KEYS if not isinstance(case[0], torch.Tensor)])
def test_keys(key, error):
    change = {"core": None} if key is None else {"tensor_id": 1}
    refused("lowrank_forward_", good(z=key, **change), ValueError if key is None else error, "z: got")


@torch.no_grad()
@pytest.mark.parametrize("name", ["inputs", "left", "right", "core", "z"])
def test_devices(name):
    change = {name: good()[name].to("meta")}
    refused("lowrank_forward_", good(**change), ValueError, f"^{name}: got a tensor on meta; accepted: cpu")


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(-1, torch.int64), (6, torch.int64), (2**40, torch.int64), (-1, torch.int32), (6, torch.int32)],
)
def test_the_kernel_itself_looks_at_row_numbers(number, dtype):
    """Whoever calls it: nothing is read outside the factor and nothing is written."""
    y, left, right = torch.ones(2, 8), torch.ones(6, 2), torch.ones(8, 2)
    numbers = torch.tensor([0, number], dtype=dtype)
    with pytest.raises(RuntimeError, match=f"inputs: got row index {number}; accepted: 0 to 5"):
        torch.ops.pgap_kernels_cpu.forward(y, numbers, left, right, [torch.ones(2, 2)], True)
    assert torch.equal(y, torch.ones(2, 8))
