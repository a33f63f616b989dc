"""The doctor: a row for every op, device and dtype, the reason beside it, and known answers from every backend."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from pgap_kernels import backends, doctor
from pgap_kernels.checks import WEIGHT_DTYPES

DTYPES = [str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES]
NO_GPU = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    for name in ("PGAP_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def json_report(capsys) -> dict:
    assert doctor.main(json_output=True) == 0
    return json.loads(capsys.readouterr().out)


def text_report(capsys) -> str:
    assert doctor.main() == 0
    return capsys.readouterr().out


def test_json_has_every_op_device_and_dtype(capsys):
    rows = json_report(capsys)["choices"]
    keys = {(row["op"], row["device"], row["dtype"]) for row in rows}
    assert len(keys) == len(rows)
    single = ("assemble_gradient_", "aligned_core")
    wanted = {(op, kind, d) for op, kind, d in itertools.product(backends.OPS, ("cpu", "cuda"), DTYPES)}
    assert keys == {(op, kind, d) for op, kind, d in wanted if op not in single or d == "float32"}
    for row in rows:
        device, dtype = torch.device(row["device"]), getattr(torch, row["dtype"])
        assert row["backend"] == backends.select(row["op"], device, dtype).name
        assert row["present"] == (row["device"] == "cpu" or torch.cuda.is_available())
        for backend in backends.BACKENDS:
            reason = backend.refusal(row["op"], device, dtype)
            assert reason is None or f"{backend.name}: {reason}" in row["reason"]


def test_text_shares_rows_and_names_everything(capsys):
    text = text_report(capsys)
    for op in backends.OPS:
        assert op in text
    assert "triton: serves CUDA" in text
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split()[:4] == ["op", "device", "dtype", "backend"]
    assert len(table) < 40 and max(map(len, table)) <= 120


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_gpu_rows_say_that_there_is_none(capsys):
    rows = [row for row in json_report(capsys)["choices"] if row["device"] == "cuda"]
    assert rows and all(row["reason"].startswith("no such device here: ") for row in rows)


def test_missing_triton_is_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(backends.triton, "_missing", lambda: "Triton is not installed; install it")
    rows = [row for row in json_report(capsys)["choices"] if row["device"] == "cuda"]
    for row in rows:
        assert row["backend"] == "reference" and "triton: Triton is not installed; install it" in row["reason"]


def test_forced_backends(capsys, monkeypatch):
    monkeypatch.setenv("PGAP_BACKEND", "reference")
    for row in json_report(capsys)["choices"]:
        assert row["backend"] == "reference" and "PGAP_BACKEND=reference is set" in row["reason"]
    monkeypatch.setenv("PGAP_BACKEND", "nothing")
    assert doctor.main(json_output=True) == 1
    out, err = capsys.readouterr()
    for row in json.loads(out)["choices"]:
        assert row["backend"] == "none" and "PGAP_BACKEND=nothing is unknown" in row["reason"]
    assert err.startswith("pgap-kernels: error: PGAP_BACKEND: got 'nothing', ") and "accepted: cpu, triton" in err


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_forced_backend_that_serves_nothing_here_is_a_finding(capsys, monkeypatch):
    monkeypatch.setenv("PGAP_BACKEND", "triton")
    assert doctor.main() == 1
    assert "PGAP_BACKEND: 'triton' serves no op on the devices here" in capsys.readouterr().err


def test_every_backend_here_draws_known_answers(capsys):
    results = json_report(capsys)["self_test"]
    serving = [b.name for b in backends.BACKENDS if not b.refusal("dense_perturb_", torch.device("cpu"), torch.float32)]
    assert {f"normal, {name} on cpu" for name in serving} <= results.keys()
    assert all(results.values())


def test_interpreted_triton_draws_known_answers():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pgap_kernels", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["self_test"]
    assert results["normal, triton on cpu"] and results["rademacher, triton on cpu"]


def test_a_backend_that_fails_is_a_finding(capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(doctor, "draw", broken)
    assert doctor.main() == 1
    assert "FAIL reference on cpu: RuntimeError: no such\n" in capsys.readouterr().out


def test_a_backend_that_draws_something_else_is_a_finding(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "draw", lambda count, *args, **options: torch.ones(count))
    assert doctor.main() == 1
    assert "FAIL normal, reference on cpu" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs pipes that can break")
@pytest.mark.parametrize("command", ["doctor", "methods"])
def test_a_reader_that_has_seen_enough(command):
    """As ``| head`` has: no traceback."""
    given = [sys.executable, "-m", "pgap_kernels", command]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE and said == ""
