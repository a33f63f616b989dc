"""Which backend serves an op, and the package without its extension."""

import os
import shutil
import subprocess
import sys
import threading
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from support.cases import ROWS
from support.helpers import bits
from support.refusals import refused

import pgap_kernels
from pgap_kernels import backends, ops, use_backend


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
    ops.dense_perturb_([torch.zeros(3)], [(1, 0.5)], tensor_ids=[1])


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
    for row in {row.op: row for row in ROWS.values()}.values():
        refused(
            row.op, row.arguments(), ValueError, "^PGAP_BACKEND: got 'cuda'; accepted: 'cpu', 'triton', 'reference'"
        )


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
