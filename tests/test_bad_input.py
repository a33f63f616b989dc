"""Every refusal of the ops names its argument, and nothing has been written; and the package without its extension."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import bits

import pgap_kernels
from pgap_kernels import ops

OPS = ("dense_perturb_", "assemble_gradient_", "lowrank_perturb_")
WHOLE_SHAPES = [(6, 8), (5, 7)]


def good(op: str, dtype=torch.float32) -> dict:
    """Arguments that the op accepts, on two matrices."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in WHOLE_SHAPES]
    if op == "assemble_gradient_":
        return {"gradients": tensors, "draws": [(1, 0.5), (2, 0.25)], "tensor_ids": [1, 2]}
    if op == "dense_perturb_":
        return {"weights": tensors, "draws": [(1, 0.5), (2, 0.25)], "tensor_ids": [1, 2]}
    left = [torch.randn(m, 2, generator=generator) for m, _ in WHOLE_SHAPES]
    right = [torch.randn(n, 2, generator=generator) for _, n in WHOLE_SHAPES]
    return {"weights": tensors, "left": left, "right": right, "coefficient": 0.5, "tensor_ids": [1, 2]}


def storages(value) -> list[torch.Tensor]:
    """The whole storages behind every tensor in an argument that has values to look at."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            return []
        return [torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())]
    return [s for v in value for s in storages(v)] if isinstance(value, (list, tuple)) else []


def pattern(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).clone()


def refused(op: str, arguments: dict, error, match: str) -> None:
    behind = storages(list(arguments.values()))
    before, versions = [pattern(s) for s in behind], [t._version for t in flat(arguments)]
    with pytest.raises(error, match=match):
        getattr(ops, op)(**arguments)
    assert all(torch.equal(pattern(s), b) for s, b in zip(behind, before, strict=True))
    assert [t._version for t in flat(arguments)] == versions


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def written(op: str) -> str:
    """Name of the list that the op writes."""
    return "gradients" if op == "assemble_gradient_" else "weights"


@pytest.mark.parametrize("op", OPS)
def test_the_good_arguments_are_accepted(op):
    arguments = good(op)
    before = [t.clone() for t in arguments[written(op)]]
    getattr(ops, op)(**arguments)
    assert not any(torch.equal(t, b) for t, b in zip(arguments[written(op)], before, strict=True))


# ---- tensors -------------------------------------------------------------------------------------------------------

OVERLAPPING = torch.zeros(64)
TENSORS = {
    "not a list": (torch.zeros(6, 8), TypeError, ": got Tensor"),
    "a string": ("w", TypeError, ": got str"),
    "none": (None, TypeError, ": got NoneType"),
    "a generator": ((t for t in [torch.zeros(6, 8)]), TypeError, ": got generator"),
    "empty": ([], ValueError, ": got an empty list"),
    "a number": ([torch.zeros(6, 8), 1.0], TypeError, r"\[1\]: got float"),
    "float64": ([torch.zeros(6, 8).double()] * 2, TypeError, r"\[0\]: got dtype torch.float64"),
    "int32": ([torch.zeros(6, 8).int()] * 2, TypeError, r"\[0\]: got dtype torch.int32"),
    "complex": ([torch.zeros(6, 8).cfloat()] * 2, TypeError, r"\[0\]: got dtype torch.complex64"),
    "meta": ([torch.zeros(6, 8), torch.zeros(5, 7, device="meta")], ValueError, r"\[1\]: got torch.float32 on meta"),
    "sparse": ([torch.zeros(6, 8).to_sparse()] * 2, TypeError, r"\[0\]: got layout torch.sparse_coo"),
    "transposed": ([torch.zeros(6, 8), torch.zeros(7, 5).T], ValueError, r"\[1\]: got shape \(5, 7\) with strides"),
    "expanded rows": ([torch.zeros(1, 8).expand(6, 8), torch.zeros(5, 7)], ValueError, r"\[0\]: got shape .* strides"),
    "expanded columns": (
        [torch.zeros(6, 1).expand(6, 8), torch.zeros(5, 7)],
        ValueError,
        r"\[0\]: got shape .* strides",
    ),
    "overlapping rows": (
        [OVERLAPPING.as_strided((6, 8), (4, 1)), torch.zeros(5, 7)],
        ValueError,
        r"\[0\]: got shape .* do not overlap",
    ),
    "every other column": ([torch.zeros(6, 16)[:, ::2], torch.zeros(5, 7)], ValueError, r"\[0\]: got shape .* strides"),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("op", OPS)
def test_tensor_lists(op, case):
    value, error, match = TENSORS[case]
    refused(op, {**good(op), written(op): value}, error, f"^{written(op)}{match}")


@pytest.mark.parametrize("op", ["dense_perturb_", "lowrank_perturb_"])
def test_mixed_dtypes(op):
    arguments = good(op)
    arguments["weights"][1] = arguments["weights"][1].bfloat16()
    refused(op, arguments, ValueError, r"^weights\[1\]: got torch.bfloat16 .*accepted: torch.float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_float32(dtype):
    refused("assemble_gradient_", good("assemble_gradient_", dtype), TypeError, r"^gradients\[0\]: got dtype .*16")


@pytest.mark.parametrize("op", ["dense_perturb_", "assemble_gradient_"])
@pytest.mark.parametrize("bad", [torch.zeros(16)[::2], torch.zeros(1).expand(9), torch.zeros(2, 6, 8).transpose(1, 2)])
def test_vectors_and_stacks(op, bad):
    refused(op, {**good(op), written(op): [bad, torch.zeros(3)]}, ValueError, rf"^{written(op)}\[0\]: got shape")


def overlaps() -> dict[str, list[torch.Tensor]]:
    whole = torch.zeros(12, 20)
    return {
        "duplicate": [whole, whole],
        "view of the whole": [whole, whole.view(12, 20)],
        "rows that meet": [whole[:5], whole[4:]],
        "columns that meet": [whole[:, :9], whole[:, 8:]],
        "columns that meet a row later": [whole[:, 5:], whole[1:, :6]],
        "one element": [whole.view(-1)[:50].view(5, 10), whole.view(-1)[49:99].view(5, 10)],
        "an inner block": [whole, whole[3:5, 2:4]],
        "wrapped columns": [whole.view(-1)[5:225].view(11, 20)[:, 10:], whole[:, 14:16]],
        "other width": [whole.view(6, 40)[:, 19:30], whole[:, :2]],
        "a row in a block": [whole[4:5], whole[:, 3:9]],
    }


@pytest.mark.parametrize("case", overlaps())
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("op", OPS)
def test_overlapping_tensors(op, order, case):
    tensors = overlaps()[case][::order]
    arguments = {**good(op), written(op): tensors}
    if op == "lowrank_perturb_":
        arguments.update(left=1, right=2, rank=1)
    refused(op, arguments, ValueError, rf"^{written(op)}\[\d\] overlaps {written(op)}\[\d\]")


@pytest.mark.parametrize("op", OPS)
def test_three_tensors_of_which_two_overlap(op):
    whole = torch.zeros(12, 20)
    arguments = {**good(op), written(op): [whole[:, 15:], whole[:, :8], whole[:, 7:15]], "tensor_ids": [1, 2, 3]}
    if op == "lowrank_perturb_":
        arguments.update(left=1, right=2, rank=1)
    refused(op, arguments, ValueError, rf"^{written(op)}\[\d\] overlaps")


def apart() -> dict[str, list[torch.Tensor]]:
    whole = torch.zeros(12, 20)
    return {
        "columns": [whole[:, :7], whole[:, 7:8], whole[:, 8:]],
        "columns in disorder": [whole[:, 8:], whole[:, :7], whole[:, 7:8]],
        "rows": [whole[:3], whole[3:4], whole[4:]],
        "blocks": [whole[:6, :10], whole[6:, :10], whole[:6, 10:], whole[6:, 10:]],
        "interleaved rows": [whole.view(6, 40)[:, :20], whole.view(6, 40)[:, 20:]],
        "a block and part of one row": [whole[:, :5], whole[2:3, 5:]],
    }


@pytest.mark.parametrize("case", apart())
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_one_storage_that_share_nothing(op, case):
    tensors = apart()[case]
    arguments = {**good(op), written(op): tensors, "tensor_ids": list(range(len(tensors)))}
    if op == "lowrank_perturb_":
        arguments.update(left=1, right=2, rank=1)
    getattr(ops, op)(**arguments)
    assert all((t != 0).all() for t in tensors)


# ---- scalars -------------------------------------------------------------------------------------------------------

SCALARS = [
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    (1e39, ValueError),
    (10**400, ValueError),
    ([0.1, math.nan], ValueError),
    ([0.1, 0.2, 0.3], ValueError),
    ([], ValueError),
    ("0.1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (1j, TypeError),
    ([0.1, "x"], TypeError),
    (torch.tensor(math.nan), ValueError),
    (torch.tensor([0.1, math.inf]), ValueError),
    (torch.tensor(1e300, dtype=torch.float64), ValueError),
    (torch.tensor(1), TypeError),
    (torch.zeros(3), TypeError),
]


@pytest.mark.parametrize(("value", "error"), SCALARS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", OPS)
def test_coefficients(op, value, error):
    if op == "lowrank_perturb_":
        refused(op, {**good(op), "coefficient": value}, error, "^coefficient: got")
    else:
        refused(op, {**good(op), "draws": [(1, 0.5), (2, value)]}, error, r"^draws\[1\] coefficient: got")


@pytest.mark.parametrize(("value", "error"), SCALARS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", ["dense_perturb_", "lowrank_perturb_"])
def test_decays(op, value, error):
    refused(op, {**good(op), "decay": value}, error, "^decay: got")


KEYS = [
    (-1, ValueError),
    (1 << 64, ValueError),
    (1.0, TypeError),
    (True, TypeError),
    (None, TypeError),
    (torch.tensor(1.0), TypeError),
    (torch.tensor(1, dtype=torch.int32), TypeError),
    (torch.tensor([1, 2]), TypeError),
]


@pytest.mark.parametrize(("key", "error"), KEYS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", ["dense_perturb_", "assemble_gradient_"])
def test_draw_keys(op, key, error):
    refused(op, {**good(op), "draws": [(1, 0.5), (key, 0.5)]}, error, r"^draws key\[1\]: got")


@pytest.mark.parametrize(
    ("name", "key", "error"),
    [(name, *case) for name in ("left", "right", "core") for case in KEYS if (name, case[0]) != ("core", None)],
    ids=lambda v: repr(v)[:24],
)
def test_factor_keys(name, key, error):
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), name: key}, error, f"^{name}: got")


@pytest.mark.parametrize(("key", "error"), KEYS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", ["dense_perturb_", "lowrank_perturb_"])
def test_rounding_keys(op, key, error):
    arguments = {**good(op, torch.bfloat16), "rounding": "stochastic", "rounding_key": key}
    refused(op, arguments, ValueError if key is None else error, "^rounding_key")


@pytest.mark.parametrize(
    ("draws", "error"),
    [
        ([], ValueError),
        (None, ValueError),
        (3, ValueError),
        ([1], TypeError),
        ([(1,)], TypeError),
        ([(1, 2, 3)], TypeError),
    ],
)
@pytest.mark.parametrize("op", ["dense_perturb_", "assemble_gradient_"])
def test_draws(op, draws, error):
    refused(op, {**good(op), "draws": draws}, error, r"^draws(\[0\])?: got")


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([1], ValueError),
        ([1, 2, 3], ValueError),
        ([1, -1], ValueError),
        ([1, 1 << 32], ValueError),
        ([1, 1.0], TypeError),
        ([1, True], TypeError),
        ([1, "w"], TypeError),
        (7, TypeError),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_tensor_ids(op, ids, error):
    refused(op, {**good(op), "tensor_ids": ids}, error, "^tensor_ids")


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("distribution", "uniform", "'normal', 'rademacher'"),
        ("tier", "exactly", "'exact', 'fast'"),
        ("rounding", "up", "'nearest', 'stochastic'"),
        ("backend", "gpu", "cpu, reference"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_unknown_options(op, name, value, match):
    if (op, name) in {
        ("lowrank_perturb_", "distribution"),
        ("lowrank_perturb_", "tier"),
        ("assemble_gradient_", "rounding"),
    }:
        refused(op, {**good(op), name: value}, TypeError, name)  # no such argument
    else:
        refused(op, {**good(op), name: value}, ValueError, f"^{name}: got '{value}'; accepted: .*{match}")


@pytest.mark.parametrize("op", ["dense_perturb_", "lowrank_perturb_"])
def test_stochastic_rounding_needs_a_key(op):
    arguments = {**good(op, torch.float16), "rounding": "stochastic"}
    refused(op, arguments, ValueError, "^rounding_key: got None")


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("PGAP_BACKEND", "cuda")
    for op in OPS:
        refused(op, good(op), ValueError, "^backend: got 'cuda'; accepted: .*cpu, reference")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backend_in_the_environment(monkeypatch, name):
    """The variable decides, an argument overrides it."""
    monkeypatch.setenv("PGAP_BACKEND", name)
    called = []
    for module in (pgap_kernels.ops.backends.cpu, pgap_kernels.ops.backends.reference):
        original = module.dense_perturb_

        def spy(*args, module=module, original=original):
            called.append(module.name)
            original(*args)

        monkeypatch.setattr(module, "dense_perturb_", spy)
    ops.dense_perturb_(**good("dense_perturb_"))
    other = "cpu" if name == "reference" else "reference"
    ops.dense_perturb_(**good("dense_perturb_"), backend=other)
    assert called == [name, other]


# ---- slices and out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "error", "match"),
    [
        ([(0, 8)], ValueError, ": got 1"),
        ([(0, 8)] * 3, ValueError, ": got 3"),
        ([(-1, 8), (0, 7)], ValueError, r"\[0\] base"),
        ([(0, -8), (0, 7)], ValueError, r"\[0\] row_stride"),
        ([(0, 8), (0.0, 7)], TypeError, r"\[1\] base"),
        ([(0, 8), (0, True)], TypeError, r"\[1\] row_stride"),
        ([(1 << 63, 8), (0, 7)], ValueError, r"\[0\] base"),
        ([(0, 1 << 63), (0, 7)], ValueError, r"\[0\] row_stride"),
        ([(0, 7), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row"),
        ([(0, 0), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row"),
        ([(3, 10), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row"),
        ([(0, 8), (2**63 - 20, 7)], ValueError, r"\[1\]: .*(below 2\*\*63|unsharded row)"),
        ([(0, 2**62), (0, 7)], ValueError, r"\[0\]: .*below 2\*\*63"),
        ([(0, 8), (0,)], ValueError, r"\[1\]"),
        ([(0, 8), 5], TypeError, r"\[1\]"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_slices(op, spans, error, match):
    refused(op, {**good(op), "slices": spans}, error, f"^slices{match}")


def outs() -> dict:
    whole = torch.zeros(100)
    return {
        "one short": (lambda w: [torch.zeros(6, 8)], ValueError, "out: got 1"),
        "other shape": (lambda w: [torch.zeros(6, 8), torch.zeros(7, 5)], ValueError, r"out\[1\]: got shape \(7, 5\)"),
        "same count, other shape": (lambda w: [torch.zeros(6, 8), torch.zeros(35)], ValueError, r"out\[1\]: got shape"),
        "other dtype": (
            lambda w: [torch.zeros(6, 8).half(), torch.zeros(5, 7).half()],
            TypeError,
            r"out\[0\]: got dtype",
        ),
        "meta": (
            lambda w: [torch.zeros(6, 8, device="meta"), torch.zeros(5, 7, device="meta")],
            ValueError,
            "out: got",
        ),
        "not a list": (lambda w: torch.zeros(6, 8), TypeError, "out: got Tensor"),
        "empty": (lambda w: [], ValueError, "out: got an empty list"),
        "transposed": (lambda w: [torch.zeros(8, 6).T, torch.zeros(5, 7)], ValueError, r"out\[0\]: got shape"),
        "the weights": (lambda w: w, ValueError, "out.*overlaps"),
        "one weight": (lambda w: [torch.zeros(6, 8), w[1]], ValueError, "out.*overlaps"),
        "itself": (lambda w: [whole[:48].view(6, 8), whole[47:82].view(5, 7)], ValueError, r"out.*overlaps"),
        "shifted": (
            lambda w: [w[0].view(-1).as_strided((6, 8), (8, 1)), torch.zeros(5, 7)],
            ValueError,
            "out.*overlaps",
        ),
    }


@pytest.mark.parametrize("case", outs())
@pytest.mark.parametrize("op", ["dense_perturb_", "lowrank_perturb_"])
def test_out(op, case):
    make, error, match = outs()[case]
    arguments = good(op)
    refused(op, {**arguments, "out": make(arguments["weights"])}, error, f"^{match}")


# ---- low rank ------------------------------------------------------------------------------------------------------


def factor(*shapes, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


LOW_RANK = {
    "vector weight": ({"weights": factor((6, 8), (7,))}, r"weights\[1\]: got shape \(7,\)"),
    "stack": ({"weights": factor((6, 8), (5, 7, 2))}, r"weights\[1\]: got shape"),
    "left of wrong height": ({"left": factor((6, 2), (6, 2))}, r"left\[1\]: got shape \(6, 2\)"),
    "right of wrong height": ({"right": factor((8, 2), (5, 2))}, r"right\[1\]: got shape \(5, 2\)"),
    "left transposed": ({"left": factor((2, 6), (2, 5))}, r"left\[0\]: got shape"),
    "left of two ranks": ({"left": factor((6, 2), (5, 3))}, r"left\[1\]: got shape"),
    "left a vector": ({"left": factor((6,), (5,))}, r"left\[0\]: got shape"),
    "left one short": ({"left": factor((6, 2))}, "left: got 1 tensors"),
    "left strided": ({"left": [torch.ones(2, 6).T, torch.ones(2, 5).T]}, r"left\[0\]: got strides"),
    "left of a rank of its own": ({"left": factor((6, 3), (5, 3))}, "rank: got left 3, right 2"),
    "rank against factors": ({"rank": 3}, "rank: got left 2, right 2, rank 3"),
    "no rank": ({"left": 1, "right": 2}, "rank: got None"),
    "rank 0": ({"left": 1, "right": 2, "rank": 0}, "rank: got 0; accepted: 1 to 5"),
    "rank negative": ({"left": 1, "right": 2, "rank": -1}, "rank: got -1; accepted: 1 to 5"),
    "rank too high": ({"left": 1, "right": 2, "rank": 6}, "rank: got 6; accepted: 1 to 5"),
    "factors too wide": ({"left": factor((6, 6), (5, 6)), "right": factor((8, 6), (7, 6))}, "rank: got 6"),
    "factors of no width": ({"left": factor((6, 0), (5, 0)), "right": factor((8, 0), (7, 0))}, "rank: got 0"),
    "core one short": ({"core": factor((2, 2))}, "core: got 1 tensors"),
    "core too long": ({"core": factor((3,), (3,))}, r"core\[0\]: got shape \(3,\)"),
    "core not square": ({"core": factor((2, 3), (2, 3))}, r"core\[0\]: got shape \(2, 3\)"),
    "cores of two kinds": ({"core": factor((2,), (2, 2))}, r"core\[1\]: got shape \(2, 2\)"),
    "core transposed": ({"core": [torch.ones(2, 2).T, torch.ones(2, 2)]}, r"core\[0\]: got shape"),
    "core of rank 3": ({"core": factor((2, 2, 1), (2, 2, 1))}, r"core\[0\]: got shape"),
    "ids missing, left drawn": ({"left": 1, "tensor_ids": None}, "tensor_ids: got None"),
    "ids missing, right drawn": ({"right": 1, "tensor_ids": None}, "tensor_ids: got None"),
    "ids missing, core drawn": ({"core": 1, "tensor_ids": None}, "tensor_ids: got None"),
    "ids missing, stochastic": (
        {"rounding": "stochastic", "rounding_key": 1, "tensor_ids": None},
        "tensor_ids: got None",
    ),
}


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank(case):
    change, match = LOW_RANK[case]
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), **change}, ValueError, f"^{match}")


@pytest.mark.parametrize("name", ["left", "right", "core"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_factor_dtypes(name, dtype):
    """float32 or the weight's own."""
    shapes = {"left": [(6, 2), (5, 2)], "right": [(8, 2), (7, 2)], "core": [(2, 2), (2, 2)]}[name]
    change = {name: factor(*shapes, dtype=dtype)}
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), **change}, TypeError, rf"^{name}\[0\]: got dtype {dtype}")


@pytest.mark.parametrize("name", ["left", "right", "core"])
def test_factor_devices(name):
    shapes = {"left": [(6, 2), (5, 2)], "right": [(8, 2), (7, 2)], "core": [(2, 2), (2, 2)]}[name]
    change = {name: [t.to("meta") for t in factor(*shapes)]}
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), **change}, ValueError, f"^{name}: got 2 tensors on meta")


@pytest.mark.parametrize("rank", [1.5, "2", True])
def test_rank_is_an_integer(rank):
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), "left": 1, "right": 2, "rank": rank}, TypeError, "^rank")


# ---- aligned core --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"singular_values": []}, ValueError, "singular_values: got an empty list"),
        ({"singular_values": torch.ones(2)}, TypeError, "singular_values: got Tensor"),
        ({"singular_values": factor((2,), (2, 2))}, ValueError, r"singular_values\[1\]: got shape \(2, 2\)"),
        ({"singular_values": factor((2,), (0,))}, ValueError, r"singular_values\[1\]: got shape \(0,\)"),
        ({"singular_values": factor((2,), (2,), dtype=torch.float64)}, TypeError, r"singular_values\[0\]: got dtype"),
        ({"delta": -0.1}, ValueError, "delta: got -0.1"),
        ({"delta": math.nan}, ValueError, "delta: got nan"),
        ({"delta": math.inf}, ValueError, "delta: got inf"),
        ({"delta": "x"}, (TypeError, ValueError), "delta"),
        ({"key": -1}, ValueError, "key"),
        ({"key": 1.0}, TypeError, "key"),
        ({"sign_key": 1 << 64}, ValueError, "key, sign_key"),
        ({"tensor_ids": [1]}, ValueError, "tensor_ids: got 1 ids for 2"),
        ({"tensor_ids": [1, -1]}, ValueError, r"tensor_ids\[1\]"),
        ({"sign_key": 1, "sign_ids": [1]}, ValueError, "sign_ids: got 1 ids for 2"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
    ],
)
def test_aligned_core(change, error, match):
    arguments = {"singular_values": factor((2,), (3,)), "key": 1, "tensor_ids": [1, 2], "delta": 0.5, **change}
    refused("aligned_core", arguments, error, f"^{match}")


# ---- without the extension -----------------------------------------------------------------------------------------

WITHOUT_EXTENSION = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pgap_kernels import backends, cpu, ops
    z = [ops.draw((67, 129), 5, 7, offset=1000), ops.draw((67, 129), 5, 7, offset=1000)]
    w = [torch.zeros(9, 9)]
    ops.dense_perturb_(w, [(1, 1.0)], tensor_ids=[1])
    ops.lowrank_perturb_(w, 1, 2, rank=2, coefficient=0.1, tensor_ids=[1])
assert torch.equal(*z)
assert "_C" in cpu.unavailable or "extension was not built" in cpu.unavailable, cpu.unavailable
try:
    ops.draw(3, 1, 2, backend="cpu")
except ValueError as error:
    assert "does not serve assemble_gradient_" in str(error) and cpu.unavailable in str(error), error
else:
    raise AssertionError("a backend that is absent was accepted")
print(len([c for c in caught if "slow" in str(c.message)]), len(caught))
print(z[0].view(torch.int32).sum(dtype=torch.int64).item())
"""


def test_without_the_extension(tmp_path):
    """A package without _C.abi3.so works on the reference and says so once."""
    source = Path(pgap_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "pgap_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PGAP_")}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    warned, digest = done.stdout.splitlines()
    assert warned == "1 1"
    drawn = ops.draw((67, 129), 5, 7, offset=1000)
    assert int(digest) == bits(drawn).sum(dtype=torch.int64).item()
