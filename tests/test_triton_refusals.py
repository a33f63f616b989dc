"""What the Triton backend says where it cannot serve, in a process without its interpreter."""

import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest
import torch

from pgap_kernels import backends, ops, triton, use_backend

CUDA = torch.device("cuda")
HOW = "CPU tensors only under Triton's interpreter, TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton._missing.cache_clear()
    yield
    triton._missing.cache_clear()


@pytest.mark.parametrize("forced", ["use_backend", "PGAP_BACKEND"])
def test_cpu_tensors_without_the_interpreter(monkeypatch, forced):
    w = torch.zeros(3, 3)
    if forced == "PGAP_BACKEND":
        monkeypatch.setenv("PGAP_BACKEND", "triton")
    with use_backend("triton") if forced == "use_backend" else contextlib.nullcontext():
        with pytest.raises(ValueError, match=f"^{forced}: 'triton' does not serve dense_perturb_ on cpu .*: .*{HOW}"):
            ops.dense_perturb_([w], [(1, 0.5)], tensor_ids=[1])
        with pytest.raises(ValueError, match=f"^{forced}: 'triton' does not serve reduce on cpu .*: .*{HOW}"):
            ops.squared_norms([w])
    assert (w == 0).all()


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_is_refused_alike(op):
    assert HOW in triton.refusal(op, torch.device("cpu"), torch.float32)
    assert triton.refusal(op, torch.device("mps"), torch.float32).endswith("not mps")
    assert "torch.float64" in triton.refusal(op, CUDA, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_is_served_where_triton_is(monkeypatch, dtype):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.1+git0")
    assert triton.refusal("dense_perturb_", CUDA, dtype) is None


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = triton.refusal("dense_perturb_", CUDA, torch.float32)
    assert "not installed" in reason and "pip install 'pgap-kernels[triton]'" in reason


def test_triton_is_too_old(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.9")
    assert triton.refusal("dense_perturb_", CUDA, torch.float32) == "needs Triton 3.6 or newer, found 3.4.9"


@pytest.mark.parametrize(("version", "served"), [("3.6.0", True), ("3.4.9", False)])
def test_triton_under_another_name(monkeypatch, version, served):
    """PyTorch for ROCm and XPU brings distributions of other names, which hold the same module."""

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert (triton.refusal("dense_perturb_", CUDA, torch.float32) is None) is served


def test_a_gpu_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1 is set" in triton.refusal("dense_perturb_", CUDA, torch.float32)


def test_triton_is_imported_when_first_needed():
    code = "import sys, pgap_kernels; assert not [m for m in sys.modules if m.startswith('pgap_kernels.triton.')]"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_host_function_is_looked_up_once():
    first = triton.reduce
    assert vars(triton)["reduce"] is first is importlib.import_module("pgap_kernels.triton.reduction").reduce


def test_unknown_op():
    with pytest.raises(AttributeError, match="no attribute 'sparse_perturb_'"):
        triton.sparse_perturb_  # noqa: B018
