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
from refusals import KEYS, SCALARS, refused

import pgap_kernels
from pgap_kernels import backends, ops

WITH_OUT = ("dense_perturb_", "masked_perturb_", "preconditioned_perturb_", "lowrank_perturb_")
ROUNDING = (*WITH_OUT, "preconditioned_update_", "anchor_affine_")
OPS = (*ROUNDING, "assemble_gradient_")
WITH_DECAY = tuple(op for op in ROUNDING if op != "anchor_affine_")
WITH_DRAWS = tuple(op for op in OPS if op not in ("lowrank_perturb_", "anchor_affine_"))
# What an op needs beside weights, draws and ids; the low-rank op is apart.
EXTRAS = {
    "dense_perturb_": lambda w: {},
    "assemble_gradient_": lambda w: {},
    "masked_perturb_": lambda w: {"threshold": 0.5},
    "preconditioned_update_": lambda w: {"state": [like(w, 0.0)], "rule": ops.Momentum(0.1)},
    "preconditioned_perturb_": lambda w: {"curvature": like(w, 2.0)},
    "anchor_affine_": lambda w: {"anchors": like(w, 1.0), "coefficient": 0.5},
}
WHOLE_SHAPES = [(6, 8), (5, 7)]


def like(tensors: list[torch.Tensor], value: float) -> list[torch.Tensor]:
    """Contiguous float32 tensors of their shapes."""
    return [torch.full(t.shape, value) for t in tensors]


def good(op: str, dtype=torch.float32) -> dict:
    """Arguments that the op accepts, on two matrices."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in WHOLE_SHAPES]
    draws = {"draws": [(1, 0.5), (2, 0.25)]} if op in WITH_DRAWS else {}
    if op != "lowrank_perturb_":
        return {written(op): tensors, "tensor_ids": [1, 2], **draws, **EXTRAS[op](tensors)}
    left = [torch.randn(m, 2, generator=generator) for m, _ in WHOLE_SHAPES]
    right = [torch.randn(n, 2, generator=generator) for _, n in WHOLE_SHAPES]
    return {"weights": tensors, "left": left, "right": right, "coefficient": 0.5, "tensor_ids": [1, 2]}


def on(op: str, tensors: list[torch.Tensor]) -> dict:
    """Arguments for other tensors."""
    extra = {"left": 1, "right": 2, "rank": 1} if op == "lowrank_perturb_" else EXTRAS[op](tensors)
    return {**good(op), written(op): tensors, "tensor_ids": list(range(len(tensors))), **extra}


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


@pytest.mark.parametrize("op", ROUNDING)
def test_mixed_dtypes(op):
    arguments = good(op)
    arguments["weights"][1] = arguments["weights"][1].bfloat16()
    refused(op, arguments, ValueError, r"^weights\[1\]: got torch.bfloat16 .*accepted: torch.float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_float32(dtype):
    refused("assemble_gradient_", good("assemble_gradient_", dtype), TypeError, r"^gradients\[0\]: got dtype .*16")


@pytest.mark.parametrize("op", [op for op in OPS if op != "lowrank_perturb_"])
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
    refused(op, on(op, overlaps()[case][::order]), ValueError, rf"^{written(op)}\[\d\] overlaps {written(op)}\[\d\]")


@pytest.mark.parametrize("op", OPS)
def test_three_tensors_of_which_two_overlap(op):
    whole = torch.zeros(12, 20)
    arguments = on(op, [whole[:, 15:], whole[:, :8], whole[:, 7:15]])
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
    getattr(ops, op)(**on(op, tensors))
    assert all((t != 0).all() for t in tensors)


# ---- scalars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "error"), SCALARS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", OPS)
def test_coefficients(op, value, error):
    if op not in WITH_DRAWS:
        refused(op, {**good(op), "coefficient": value}, error, "^coefficient: got")
    else:
        refused(op, {**good(op), "draws": [(1, 0.5), (2, value)]}, error, r"^draws\[1\] coefficient: got")


@pytest.mark.parametrize(("value", "error"), SCALARS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", WITH_DECAY)
def test_decays(op, value, error):
    refused(op, {**good(op), "decay": value}, error, "^decay: got")


@pytest.mark.parametrize(("key", "error"), KEYS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("op", WITH_DRAWS)
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
@pytest.mark.parametrize("op", ROUNDING)
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
@pytest.mark.parametrize("op", WITH_DRAWS)
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
        ("backend", "gpu", "cpu, .*reference"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_unknown_options(op, name, value, match):
    takes = {"distribution": WITH_DRAWS, "tier": WITH_DRAWS, "rounding": ROUNDING, "backend": OPS}
    if op not in takes[name]:
        refused(op, {**good(op), name: value}, TypeError, name)  # no such argument
    else:
        refused(op, {**good(op), name: value}, ValueError, f"^{name}: got '{value}'; accepted: .*{match}")


@pytest.mark.parametrize("op", ROUNDING)
def test_stochastic_rounding_needs_a_key(op):
    arguments = {**good(op, torch.float16), "rounding": "stochastic"}
    refused(op, arguments, ValueError, "^rounding_key: got None")


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("PGAP_BACKEND", "cuda")
    for op in OPS:
        refused(op, good(op), ValueError, "^backend: got 'cuda'; accepted: .*cpu, .*reference")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backend_in_the_environment(monkeypatch, name):
    """The variable decides, an argument overrides it."""
    monkeypatch.setenv("PGAP_BACKEND", name)
    called = []
    for module in (backends.cpu, backends.reference):
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
@pytest.mark.parametrize("op", WITH_OUT)
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
        ({"sign_key": 1 << 64}, ValueError, "sign_key: got"),
        ({"sign_ids": [1, 2]}, ValueError, "sign_ids: got ids without a sign_key"),
        ({"tensor_ids": [1]}, ValueError, "tensor_ids: got 1 ids for 2"),
        ({"tensor_ids": [1, -1]}, ValueError, r"tensor_ids\[1\]"),
        ({"sign_key": 1, "sign_ids": [1]}, ValueError, "sign_ids: got 1 ids for 2"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
    ],
)
def test_aligned_core(change, error, match):
    arguments = {"singular_values": factor((2,), (3,)), "key": 1, "tensor_ids": [1, 2], "delta": 0.5, **change}
    refused("aligned_core", arguments, error, f"^{match}")


def in_pass(**change) -> ops.AlignedCore:
    return ops.AlignedCore(**{"key": 1, "singular_values": factor((2,), (2,)), "delta": 0.5, **change})


ALIGNED_IN_PASS = {
    "values one short": ({"singular_values": factor((2,))}, ValueError, r"core\.singular_values: got 1 tensors"),
    "values of no list": ({"singular_values": torch.ones(2)}, TypeError, r"core\.singular_values: got Tensor"),
    "values of another rank": (
        {"singular_values": factor((2,), (3,))},
        ValueError,
        r"core\.singular_values\[1\]: got shape \(3,\); accepted: contiguous \(2,\)",
    ),
    "values of a matrix": (
        {"singular_values": factor((2, 2), (2,))},
        ValueError,
        r"core\.singular_values\[0\]: got shape \(2, 2\)",
    ),
    "values none": (
        {"singular_values": factor((0,), (0,))},
        ValueError,
        r"core\.singular_values\[0\]: got shape \(0,\)",
    ),
    "values strided": (
        {"singular_values": [torch.ones(2), torch.ones(4)[::2]]},
        ValueError,
        r"core\.singular_values\[1\]: got shape",
    ),
    "values of float64": (
        {"singular_values": factor((2,), (2,), dtype=torch.float64)},
        TypeError,
        r"core\.singular_values\[0\]: got dtype torch.float64",
    ),
    "values on meta": (
        {"singular_values": [s.to("meta") for s in factor((2,), (2,))]},
        ValueError,
        r"core\.singular_values: got 2 tensors on meta",
    ),
    "delta negative": ({"delta": -0.1}, ValueError, r"core\.delta: got -0.1"),
    "delta negative in a tensor": ({"delta": torch.tensor(-0.5)}, ValueError, r"core\.delta: got -0.5"),
    "delta nan": ({"delta": math.nan}, ValueError, r"core\.delta: got nan"),
    "delta of two": ({"delta": [0.1, 0.2]}, ValueError, r"core\.delta: got 2 values"),
    "delta a string": ({"delta": "x"}, TypeError, r"core\.delta: got 'x'"),
    "key": ({"key": -1}, ValueError, r"core\.key: got -1"),
    "key none": ({"key": None}, TypeError, r"core\.key: got None"),
    "sign key": ({"sign_key": 1 << 64}, ValueError, r"core\.sign_key: got"),
    "sign ids alone": ({"sign_ids": [1, 2]}, ValueError, r"core\.sign_ids: got ids without a sign_key"),
    "sign ids one short": ({"sign_key": 1, "sign_ids": [1]}, ValueError, r"core\.sign_ids: got 1 ids for 2"),
    "sign ids wide": ({"sign_key": 1, "sign_ids": [1, 1 << 32]}, ValueError, r"core\.sign_ids\[1\]"),
}


@pytest.mark.parametrize("case", ALIGNED_IN_PASS)
def test_aligned_in_the_pass(case):
    change, error, match = ALIGNED_IN_PASS[case]
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), "core": in_pass(**change)}, error, f"^{match}")


@pytest.mark.parametrize("signed", [{}, {"sign_key": 1}])
def test_aligned_in_the_pass_needs_ids(signed):
    arguments = {**good("lowrank_perturb_"), "core": in_pass(**signed), "tensor_ids": None}
    refused("lowrank_perturb_", arguments, ValueError, "^tensor_ids: got")


@pytest.mark.parametrize("rank", [-1, 0, 513])
def test_aligned_ranks(rank):
    arguments = {
        "weights": factor((520, 530)),
        "left": 1,
        "right": 2,
        "rank": rank,
        "core": ops.AlignedCore(3, factor((max(rank, 0),)), 0.5),
        "coefficient": 1.0,
        "tensor_ids": [1],
    }
    refused("lowrank_perturb_", arguments, ValueError, f"^rank: got {rank}; accepted: 1 to 512, the most")


# ---- without the extension -----------------------------------------------------------------------------------------

WITHOUT_EXTENSION = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pgap_kernels import backends, extension, ops
    z = [ops.draw((67, 129), 5, 7, offset=1000), ops.draw((67, 129), 5, 7, offset=1000)]
    w = [torch.zeros(9, 9)]
    ops.dense_perturb_(w, [(1, 1.0)], tensor_ids=[1])
    ops.lowrank_perturb_(w, 1, 2, rank=2, coefficient=0.1, tensor_ids=[1])
assert torch.equal(*z)
assert "_C" in extension.unavailable or "extension was not built" in extension.unavailable, extension.unavailable
try:
    ops.draw(3, 1, 2, backend="cpu")
except ValueError as error:
    assert "does not serve assemble_gradient_" in str(error) and extension.unavailable in str(error), error
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
