"""Every op refuses a bad value of every argument by its name, before anything is written (what the checks themselves
refuse is test_checks.py)."""

import inspect
import math

import pytest
import torch
from support.cases import ROWS
from support.refusals import refused

import pgap_kernels

SHAPES = [(6, 8), (5, 7)]
FORMS = {row.op: row for row in reversed(ROWS.values()) if "shapes" in dict(row.large)}
OPS = {op: set(inspect.signature(getattr(pgap_kernels.ops, op)).parameters) for op in FORMS}
LISTS = ("weights", "gradients", "tensors")  # what an op works on


def good(op: str, **changes) -> dict:
    """Arguments that the op accepts, on two matrices."""
    return FORMS[op].build(shapes=SHAPES, **changes)


def factor(*shapes, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


# ---- every argument of every op ------------------------------------------------------------------------------------

WHOLE = torch.ones(12, 7)
# By argument, for every op that has it: bad values, the error, what it says.
BAD: dict[str, list[tuple]] = {
    **{
        name: [
            ([t.double() for t in factor(*SHAPES)], TypeError, r"\[0\]: got dtype torch.float64"),
            ([torch.ones(6, 8), torch.ones(7, 5).T], ValueError, r"\[1\]: got shape \(5, 7\)"),
        ]
        for name in LISTS
    },
    "draws": [
        ([(1,)], TypeError, r"\[0\]: got"),
        ((1, 0.5), TypeError, r": got \(1, 0.5\); accepted: a list of pairs"),
        ([(1 << 64, 0.5)], ValueError, r"\[0\] key: got"),
        ([(2, math.nan)], ValueError, r"\[0\] coefficient: got nan"),
    ],
    "coefficient": [(math.inf, ValueError, ": got inf")],
    "decay": [([0.1, math.nan], ValueError, ": got nan")],
    "around": [([0.1, math.nan], ValueError, ": got nan")],
    "tensor_ids": [([1, 1 << 32], ValueError, r"\[1\]: got")],
    "slices": [([(0, 7), (0, 7)], ValueError, r"\[0\]: .*end within an unsharded row")],
    "distribution": [("uniform", ValueError, ": got 'uniform'; accepted: 'no")],
    "tier": [("exactly", ValueError, ": got 'exactly'; accepted: 'exact', 'fast'")],
    "rounding": [("up", ValueError, ": got 'up'; accepted: 'nearest', 'stochastic'")],
    "out": [(factor((6, 8), (7, 5)), ValueError, r"\[1\]: got shape \(7, 5\)")],
    "key": [(1.0, TypeError, r"\[0\]: got 1.0")],
    "anchors": [(factor((6, 8)), ValueError, ": got 1 tensors")],
    "deltas": [(factor((6, 8), (7, 5)), ValueError, r"\[1\]: got shape \(7, 5\)")],
    "curvature": [(factor((6, 8), (35,)), ValueError, r"\[1\]: got shape")],
    "rule": [("adam", TypeError, ": got 'adam'; accepted: MomentumRule, AdamRule")],
    "restore": [([math.nan], ValueError, r"\[0\]: got nan")],
}
CASES = [(op, name) for op, parameters in OPS.items() for name in BAD if name in parameters]


def test_every_argument_has_a_bad_value():
    """A new one needs a line above, or tests of its own."""
    own = {"rounding_key", "state", "threshold", "share", "bits", "left", "right", "core", "below", "e", "rank"}
    assert set().union(*OPS.values()) == {*BAD, *own}


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_bad_value(op, name):
    for value, error, match in BAD[name]:
        refused(op, {**good(op), name: value}, error, f"^{name}{match}")


@pytest.mark.parametrize("op", [op for op, row in FORMS.items() if row.written])
def test_what_is_written_may_not_overlap(op):
    arguments = good(op)
    name = next(name for name in LISTS if name in arguments)
    bad = {**arguments, name: [WHOLE[:6], WHOLE[5:10]]}
    refused(op, bad, ValueError, rf"^{name}\[1\] overlaps {name}\[0\]")
    if "out" in OPS[op]:
        out = [torch.zeros(6, 8), arguments["weights"][1]]
        refused(op, {**arguments, "out": out}, ValueError, r"^(out|weights)\[1\] overlaps (out|weights)\[1\]")


@pytest.mark.parametrize("op", [op for op, parameters in OPS.items() if "rounding_key" in parameters])
def test_stochastic_rounding_needs_a_key(op):
    arguments = {**good(op, dtype=torch.float16), "rounding": "stochastic"}
    refused(op, arguments, ValueError, "^rounding_key: got None")
    refused(op, {**arguments, "rounding_key": -1}, ValueError, r"^rounding_key\[0\]: got -1")


@pytest.mark.parametrize(
    "op", ["dense_perturb_", "masked_perturb_", "preconditioned_perturb_", "preconditioned_update_"]
)
def test_two_whole_tensors_do_not_share_an_id(op):
    refused(op, {**good(op), "tensor_ids": [7, 7]}, ValueError, "^tensor_ids: got 7 twice")


def test_gradients_are_float32():
    bad = {**good("assemble_gradient_"), "gradients": factor(*SHAPES, dtype=torch.bfloat16)}
    refused("assemble_gradient_", bad, TypeError, r"^gradients\[0\]: got dtype .*16")


# ---- low rank ------------------------------------------------------------------------------------------------------

LOW_RANK = {
    "vector weight": ({"weights": factor((6, 8), (7,))}, ValueError, r"weights\[1\]: got shape \(7,\)"),
    "left of wrong height": ({"left": factor((6, 2), (6, 2))}, ValueError, r"left\[1\]: got shape \(6, 2\)"),
    "right of wrong height": ({"right": factor((8, 2), (5, 2))}, ValueError, r"right\[1\]: got shape \(5, 2\)"),
    "left of two ranks": ({"left": factor((6, 2), (5, 3))}, ValueError, r"left\[1\]: got shape"),
    "left a vector": ({"left": factor((6,), (5,))}, ValueError, r"left\[0\]: got shape"),
    "left one short": ({"left": factor((6, 2))}, ValueError, "left: got 1 tensors"),
    "left on meta": ({"left": [t.to("meta") for t in factor((6, 2), (5, 2))]}, ValueError, "left: got 2 .* on meta"),
    "left strided": ({"left": [torch.ones(2, 6).T, torch.ones(2, 5).T]}, ValueError, r"left\[0\]: got strides"),
    "left of a rank of its own": ({"left": factor((6, 3), (5, 3))}, ValueError, "rank: got left 3, right 2"),
    "left of bfloat16": ({"left": factor((6, 2), (5, 2), dtype=torch.bfloat16)}, TypeError, r"left\[0\]: got dtype"),
    "left one tensor": ({"left": factor((6, 2))[0]}, TypeError, "left: got one tensor; accepted: a list of tensors"),
    "left no key": ({"left": -1}, ValueError, "left: got -1"),
    "rank against factors": ({"rank": 3}, ValueError, "rank: got left 2, right 2, rank 3"),
    "no rank": ({"left": 1, "right": 2}, ValueError, "rank: got None"),
    "rank 0": ({"left": 1, "right": 2, "rank": 0}, ValueError, "rank: got 0; accepted: 1 to 5"),
    "rank too high": ({"left": 1, "right": 2, "rank": 6}, ValueError, "rank: got 6; accepted: 1 to 5"),
    "rank no integer": ({"left": 1, "right": 2, "rank": 1.5}, TypeError, "rank: got 1.5"),
    "core one short": ({"core": factor((2, 2))}, ValueError, "core: got 1 tensors"),
    "core too long": ({"core": factor((3,), (3,))}, ValueError, r"core\[0\]: got shape \(3,\)"),
    "core not square": ({"core": factor((2, 3), (2, 3))}, ValueError, r"core\[0\]: got shape \(2, 3\)"),
    "cores of two kinds": ({"core": factor((2,), (2, 2))}, ValueError, r"core\[1\]: got shape \(2, 2\)"),
    "core transposed": ({"core": [torch.ones(2, 2).T, torch.ones(2, 2)]}, ValueError, r"core\[0\]: got shape"),
    "ids missing, left drawn": ({"left": 1, "tensor_ids": None}, ValueError, "tensor_ids: got None"),
    "ids missing, core drawn": ({"core": 1, "tensor_ids": None}, ValueError, "tensor_ids: got None"),
    "below alone": ({"below": factor((2,), (2,)), "e": 1.0}, ValueError, "below: got tensors without a diagonal core"),
    "below, shape": (
        {"core": factor((2,), (2,)), "below": factor((2,), (3,)), "e": 1.0},
        ValueError,
        r"below\[1\]: got shape \(3,\)",
    ),
    "below, matrices": (
        {"core": factor((2,), (2,)), "below": factor((2, 2), (2, 2)), "e": 1.0},
        ValueError,
        "below: got matrices; accepted: tensors",
    ),
    "e": (
        {"core": factor((2,), (2,)), "below": factor((2,), (2,)), "e": [0.1, 0.0]},
        ValueError,
        r"e: got \[0.1, 0.0\]; accepted: numbers > 0",
    ),
    "e missing": ({"core": factor((2,), (2,)), "below": factor((2,), (2,))}, ValueError, "below, e: got below alone"),
    "e alone": ({"e": 0.5}, ValueError, "below, e: got e alone"),
    "ids missing, stochastic": (
        {"rounding": "stochastic", "rounding_key": 1, "tensor_ids": None},
        ValueError,
        "tensor_ids: got None",
    ),
}


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank(case):
    change, error, match = LOW_RANK[case]
    arguments = {"weights": factor(*SHAPES), "left": factor((6, 2), (5, 2)), "right": factor((8, 2), (7, 2))}
    arguments |= {"coefficient": 0.5, "tensor_ids": [1, 2]}
    refused("lowrank_perturb_", {**arguments, **change}, error, f"^{match}")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"singular_values": []}, ValueError, "singular_values: got an empty list"),
        ({"singular_values": factor((2,), (2, 2))}, ValueError, r"singular_values\[1\]: got shape \(2, 2\)"),
        ({"singular_values": factor((2,), (0,))}, ValueError, r"singular_values\[1\]: got shape \(0,\)"),
        ({"singular_values": factor((2,), (2,), dtype=torch.float64)}, TypeError, r"singular_values\[0\]: got dtype"),
        ({"delta": -0.1}, ValueError, "delta: got -0.1"),
        ({"delta": math.nan}, ValueError, "delta: got nan"),
        ({"key": -1}, ValueError, "key: got -1"),
        ({"sign_key": 1 << 64}, ValueError, "sign_key: got"),
        ({"sign_ids": [1, 2]}, ValueError, "sign_ids: got ids without a sign_key"),
        ({"tensor_ids": [1]}, ValueError, "tensor_ids: got 1 ids for 2"),
        ({"sign_key": 1, "sign_ids": [1]}, ValueError, "sign_ids: got 1 ids for 2"),
    ],
)
def test_aligned_core(change, error, match):
    arguments = {"singular_values": factor((2,), (3,)), "key": 1, "tensor_ids": [1, 2], "delta": 0.5, **change}
    refused("aligned_core", arguments, error, f"^{match}")
