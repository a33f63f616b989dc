"""Every op refuses a bad value of every argument by its name, before anything is written (what the checks themselves
refuse is test_checks.py); which backend serves, and the package without its extension."""

import math
import os
import shutil
import subprocess
import sys
import threading
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from support.helpers import bits
from support.refusals import refused

import pgap_kernels
from pgap_kernels import backends, ops, use_backend

WITH_OUT = ("dense_perturb_", "masked_perturb_", "preconditioned_perturb_", "lowrank_perturb_", "anchor_affine_")
ROUNDING = (*WITH_OUT, "preconditioned_update_")
OPS = (*ROUNDING, "assemble_gradient_")
WITH_DECAY = tuple(op for op in ROUNDING if op != "anchor_affine_")
WITH_DRAWS = tuple(op for op in OPS if op not in ("lowrank_perturb_", "anchor_affine_"))
READING = ("seeded_dot", "squared_norms")
# What an op needs beside weights, draws and ids; the low-rank op is apart.
EXTRAS = {
    "dense_perturb_": lambda w: {},
    "assemble_gradient_": lambda w: {},
    "masked_perturb_": lambda w: {"threshold": 0.5},
    "preconditioned_update_": lambda w: {"state": [like(w, 0.0)], "rule": ops.MomentumRule(0.1)},
    "preconditioned_perturb_": lambda w: {"curvature": like(w, 2.0)},
    "anchor_affine_": lambda w: {"anchors": like(w, 1.0), "coefficient": 0.5},
}
SHAPES = [(6, 8), (5, 7)]


def like(tensors: list[torch.Tensor], value: float) -> list[torch.Tensor]:
    """Contiguous float32 tensors of their shapes."""
    return [torch.full(t.shape, value) for t in tensors]


def factor(*shapes, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


def good(op: str, dtype=torch.float32) -> dict:
    """Arguments that the op accepts, on two matrices."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    if op in READING:
        return {"tensors": tensors, **({"key": 1, "tensor_ids": [1, 2]} if op == "seeded_dot" else {})}
    draws = {"draws": [(1, 0.5), (2, 0.25)]} if op in WITH_DRAWS else {}
    if op != "lowrank_perturb_":
        return {first(op): tensors, "tensor_ids": [1, 2], **draws, **EXTRAS[op](tensors)}
    factors = {"left": factor((6, 2), (5, 2)), "right": factor((8, 2), (7, 2))}
    return {"weights": tensors, **factors, "coefficient": 0.5, "tensor_ids": [1, 2]}


def first(op: str) -> str:
    """Name of the list that the op works on."""
    return "tensors" if op in READING else "gradients" if op == "assemble_gradient_" else "weights"


@pytest.mark.parametrize("op", OPS)
def test_the_good_arguments_are_accepted(op):
    arguments = good(op)
    before = [t.clone() for t in arguments[first(op)]]
    getattr(ops, op)(**arguments)
    assert not any(torch.equal(t, b) for t, b in zip(arguments[first(op)], before, strict=True))


# ---- every argument of every op ------------------------------------------------------------------------------------

# By argument: which ops take it, a bad value, the error.
ARGUMENTS = {
    "draws": (WITH_DRAWS, [(1,)], TypeError, r"draws\[0\]: got"),
    "a draw's key": (WITH_DRAWS, [(1, 0.5), (1 << 64, 0.5)], ValueError, r"draws key\[1\]: got"),
    "a draw's coefficient": (WITH_DRAWS, [(1, 0.5), (2, math.nan)], ValueError, r"draws\[1\] coefficient: got nan"),
    "coefficient": (("lowrank_perturb_", "anchor_affine_"), math.inf, ValueError, "coefficient: got inf"),
    "decay": (WITH_DECAY, [0.1, math.nan], ValueError, "decay: got nan"),
    "tensor_ids": ((*OPS, "seeded_dot"), [1, 1 << 32], ValueError, r"tensor_ids\[1\]: got"),
    "slices": ((*OPS, "seeded_dot"), [(0, 7), (0, 7)], ValueError, r"slices\[0\]: .*end within an unsharded row"),
    "distribution": ((*WITH_DRAWS, "seeded_dot"), "uniform", ValueError, "distribution: got 'uniform'; accepted: 'no"),
    "tier": ((*WITH_DRAWS, "seeded_dot"), "exactly", ValueError, "tier: got 'exactly'; accepted: 'exact', 'fast'"),
    "rounding": (ROUNDING, "up", ValueError, "rounding: got 'up'; accepted: 'nearest', 'stochastic'"),
    "out": (WITH_OUT, factor((6, 8), (7, 5)), ValueError, r"out\[1\]: got shape \(7, 5\)"),
    "key": (("seeded_dot",), 1.0, TypeError, r"key\[0\]: got 1.0"),
    "anchors": (("anchor_affine_", "squared_norms"), factor((6, 8)), ValueError, "anchors: got 1 tensors"),
    "deltas": (("anchor_affine_",), factor((6, 8), (7, 5)), ValueError, r"deltas\[1\]: got shape \(7, 5\)"),
    "curvature": (("preconditioned_perturb_",), factor((6, 8), (35,)), ValueError, r"curvature\[1\]: got shape"),
    "rule": (("preconditioned_update_",), "adam", TypeError, "rule: got 'adam'; accepted: MomentumRule, AdamRule"),
    "restore": (("preconditioned_update_",), [0.1, math.nan], ValueError, r"restore\[1\]: got nan"),
}
CASES = [(op, name) for name, (takers, *_) in ARGUMENTS.items() for op in takers]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_bad_value(op, name):
    _, value, error, match = ARGUMENTS[name]
    argument = "draws" if name.startswith("a draw's") else name
    refused(op, {**good(op), argument: value}, error, f"^{match}")


@pytest.mark.parametrize("op", [*OPS, *READING])
def test_weights(op):
    name, tensors = first(op), factor(*SHAPES)
    refused(op, {**good(op), name: [t.double() for t in tensors]}, TypeError, rf"^{name}\[0\]: got dtype torch.float64")
    refused(op, {**good(op), name: [tensors[0], tensors[1].bfloat16()]}, (TypeError, ValueError), rf"^{name}\[1\]: got")
    refused(op, {**good(op), name: [tensors[0], torch.ones(7, 5).T]}, ValueError, rf"^{name}\[1\]: got shape \(5, 7\)")


@pytest.mark.parametrize("op", OPS)
def test_weights_that_overlap(op):
    w = factor((12, 7))[0]
    refused(op, {**good(op), first(op): [w[:6], w[5:10]]}, ValueError, rf"^{first(op)}\[1\] overlaps {first(op)}\[0\]")


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_over_the_weights(op):
    arguments = good(op)
    out = [torch.zeros(6, 8), arguments["weights"][1]]
    refused(op, {**arguments, "out": out}, ValueError, r"^out \+ weights\[\d\] overlaps")


@pytest.mark.parametrize("op", ROUNDING)
def test_stochastic_rounding_needs_a_key(op):
    arguments = {**good(op, torch.float16), "rounding": "stochastic"}
    refused(op, arguments, ValueError, "^rounding_key: got None")
    refused(op, {**arguments, "rounding_key": -1}, ValueError, r"^rounding_key\[0\]: got -1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_float32(dtype):
    refused("assemble_gradient_", good("assemble_gradient_", dtype), TypeError, r"^gradients\[0\]: got dtype .*16")


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
    "ids missing, stochastic": (
        {"rounding": "stochastic", "rounding_key": 1, "tensor_ids": None},
        ValueError,
        "tensor_ids: got None",
    ),
}


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank(case):
    change, error, match = LOW_RANK[case]
    refused("lowrank_perturb_", {**good("lowrank_perturb_"), **change}, error, f"^{match}")


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


# ---- who serves ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """Names of the backends that have served ``dense_perturb_``."""
    called = []
    for module in (backends.cpu, backends.reference):

        def spy(*args, module=module, original=module.dense_perturb_):
            called.append(module.name)
            original(*args)

        monkeypatch.setattr(module, "dense_perturb_", spy)
    return called


def call() -> None:
    ops.dense_perturb_(**good("dense_perturb_"))


@pytest.mark.parametrize(("name", "other"), [("reference", "cpu"), ("cpu", "reference")])
def test_use_backend(monkeypatch, served, name, other):
    """Blocks nest, end with what was before, also after an error, and override the variable."""
    monkeypatch.setenv("PGAP_BACKEND", name)
    call()
    with use_backend(other):
        call()
        with pytest.raises(KeyError), use_backend(name):
            call()
            raise KeyError
        call()
    call()
    assert served == [name, other, name, other, name]


def test_the_choice_belongs_to_the_context(served):
    with use_backend("reference"):
        context = copy_context()
        for target in (call, lambda: context.run(call)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert served == ["cpu", "reference"]


def test_unknown_backends(monkeypatch):
    with pytest.raises(ValueError, match=r"^use_backend: got 'gpu'; accepted: 'cpu', 'triton', 'reference'"):
        use_backend("gpu")
    monkeypatch.setenv("PGAP_BACKEND", "cuda")
    for op in OPS:
        refused(op, good(op), ValueError, "^PGAP_BACKEND: got 'cuda'; accepted: 'cpu', 'triton', 'reference'")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_dtype_below_the_checks(backend):
    """Hooks call the op itself, with whatever the model has become."""
    w = [torch.zeros(3, dtype=torch.float64)]
    scalars = {"keys": torch.tensor([1]), "coefficients": torch.ones(1, 1), "decay": torch.zeros(1, 1)}
    with use_backend(backend), pytest.raises(TypeError, match=r"^dense_perturb_: got torch\.float64; .*float16"):
        torch.ops.pgap_kernels.dense_perturb_(w, **scalars, stages=[1], tensor_ids=[1])
    assert (w[0] == 0).all()


# ---- without the extension -----------------------------------------------------------------------------------------

WITHOUT_EXTENSION = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pgap_kernels import extension, ops, use_backend
    z = [ops.draw((67, 129), 5, 7, offset=1000), ops.draw((67, 129), 5, 7, offset=1000)]
    w = [torch.zeros(9, 9)]
    ops.dense_perturb_(w, [(1, 1.0)], tensor_ids=[1])
    ops.lowrank_perturb_(w, 1, 2, rank=2, coefficient=0.1, tensor_ids=[1])
assert torch.equal(*z)
assert "_C" in extension.unavailable or "extension was not built" in extension.unavailable, extension.unavailable
try:
    with use_backend("cpu"):
        ops.draw(3, 1, 2)
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
