"""benchmarks.kernels: every case runs, rows are complete, and what cannot run says so."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import idioms, kernels, timing

NUMBERS = ("seconds", "host_seconds", "floor_ratio", "gb_per_s", "copy_gb_per_s", "copy_share")


@pytest.fixture
def command(monkeypatch, set_threads):
    """The command with these arguments."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["kernels", *arguments])
        kernels.main()

    return run


def test_cpu(command, tmp_path, capsys):
    path = tmp_path / "rows.json"
    command("--shape", "64", "96", "--dtype", "float32", "bfloat16", "--threads", "1", "--json", str(path))
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 5 == len(capsys.readouterr().out.splitlines()) - 1
    assert {row["op"] for row in rows} >= {"dense normal", "dense rademacher", "low rank 16", "low rank 64"}
    for row in rows:
        assert row["shape"] == [64, 96] and row["threads"] == 1 and row["isa"]
        assert all(row[name] > 0 for name in (*NUMBERS, "other_seconds", "speedup"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cases_of_a_gpu_run_on_a_cpu(dtype, monkeypatch):
    """With a compiler that fails, which is reported."""

    def broken():
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(idioms, "_compiled", broken)
    w = torch.ones(256, 264, dtype=dtype)
    rows = [row for case in kernels.gpu_cases(w) for row in kernels.measure(case, timing.on_host, 1)]
    compared = {(row["op"], row["against"]) for row in rows}
    assert len(compared) == len(rows)
    ops = {op for op, _ in compared}
    assert ops >= {"low rank 256", "dense normal, fast", "masked, share 0.5", "adam", "dense normal, 224 tensors"}
    assert ("dense normal, stochastic" in ops) == (dtype != torch.float32)
    for row in rows:
        assert all(row[name] > 0 for name in NUMBERS)
        assert ("speedup" in row) != ("error" in row)
        assert ("error" in row) == (row["against"] == "torch.compile")
    assert rows[1]["error"] == "RuntimeError: no compiler"
    assert w.isfinite().all()


def test_bytes_of_a_pass():
    w = torch.ones(256, 264)
    moved = {case.op: 2 * case.whole.nbytes + case.extra for case in kernels.gpu_cases(w)}
    assert moved["dense normal"] == 2 * 4 * 256 * 264
    assert moved["adam"] == 6 * 4 * 256 * 264
    assert moved["low rank 64"] == 2 * 4 * 256 * 264 + 4 * 64 * (256 + 264)


def test_medians_take_turns_after_a_warm_up():
    order = []

    def timer(call):
        call()
        return timing.Seconds(len(order), 0.0)

    times = timing.medians([lambda: order.append("a"), lambda: order.append("b")], timer, repeats=3, warmups=2)
    assert "".join(order) == "ab" * 5
    assert [t.done for t in times] == [7, 8]  # of 5, 7, 9 and of 6, 8, 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command("--device", "cuda")
    assert ended.value.code == 2
    assert "--device: got cuda, but PyTorch finds no CUDA or ROCm device here" in capsys.readouterr().err
