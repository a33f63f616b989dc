"""benchmarks.kernels: every op runs, rows are complete, and what cannot run says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import timer
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import figure, idioms, targets
from benchmarks.kernels.ops import OPS, shape_of, weights
from benchmarks.kernels.sweep import Point, Sweep
from pgap_kernels import cpu, extension

NUMBERS = ("seconds", "host_seconds", "repeats", "floor_ratio", "gb_per_s", "megabytes")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(extension.unavailable is not None, reason="the C++ extension is not built")


@pytest.fixture
def command(set_threads):
    """The command with these arguments."""
    return lambda *arguments: kernels.main(arguments)


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile fails, at once."""

    def broken(idiom):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(idioms, "compiled", broken)


def sweep(**options) -> Sweep:
    return Sweep(torch.device("cpu"), timer.on_host, ("generic",), repeats=1, **options)


def points(*ops: str, dtype: str = "float32", shape=(64, 72)) -> list[Point]:
    return [Point(1, op, dtype, shape, 8 if OPS[op].ranked else None, 1, 16 if OPS[op].layers else None) for op in ops]


def test_command(command, tmp_path, capsys, no_compiler):
    file, figure = tmp_path / "rows.json", tmp_path / "figure.png"
    sizes = ("--shape", "64", "96", "--shape", "32", "32", "--rank", "8", "16", "--threads", "1")
    ops = ("--op", "dense", "lowrank", "host", "--dtype", "float32", "bfloat16", "--runs", "2", "--repeats", "2")
    ops += ("--budget", "100")  # whatever else the machine is doing
    before = cpu.isa()[0]
    command(*sizes, *ops, "--json", str(file), "--figure", str(figure))
    assert cpu.isa()[0] == before
    report = json.loads(file.read_text())
    assert report["facts"]["processor"] and report["facts"]["torch"]
    settings = {(r["run"], r["op"], r["dtype"], tuple(r["shape"]), r["rank"]) for r in report["rows"]}
    assert len(settings) == 2 * (2 * 2 * 3 + 1)  # runs, dtypes, shapes, dense and two ranks; and host
    isas = {r["isa"] for r in report["rows"] if r["provider"] == "ours"}
    assert isas == set(cpu.isas()[cpu.isas().index(before) :])
    for row in report["rows"]:
        if row["provider"] == "torch.compile":
            assert row["unmeasured"] == "RuntimeError: no compiler"
        else:
            assert all(row[name] > 0 for name in (*NUMBERS, "speedup_vs_idiom"))
    assert figure.stat().st_size > 0
    out = capsys.readouterr().out
    assert "low rank, rank 16, bfloat16, 64 x 96" in out and "RuntimeError: no compiler" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_op_runs_and_leaves_finite_weights(dtype, no_compiler):
    ops = [op for op in OPS if dtype in OPS[op].dtypes]
    for rows in sweep(providers=("ours", "idiom", "addmm_", "lerp", "two_passes", "to_nearest")).rows(
        points(*ops, dtype=dtype)
    ):
        assert all("seconds" in row for row in rows), rows
        assert [r["provider"] for r in rows][:3] == ["floor", "ours", "idiom"]
        floor, idiom = rows[0], rows[2]
        assert floor["floor_ratio"] == 1 and idiom["speedup_vs_idiom"] == 1
        for row in rows:
            assert row["floor_ratio"] == pytest.approx(row["seconds"] / floor["seconds"])
            assert row["speedup_vs_idiom"] == pytest.approx(idiom["seconds"] / row["seconds"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_idioms_do_what_the_ops_do(dtype):
    """Noise apart: the same scale of change, in the same tensor."""
    for op in ("dense", "rademacher", "two_draws", "masked", "stochastic", "lowrank", "forward", "list", "assemble"):
        if dtype not in OPS[op].dtypes:
            continue
        sizes = (4,) * OPS[op].ranked + (32,) * OPS[op].layers
        moved = []
        for call in ("ours", "idiom"):
            torch.manual_seed(0)
            w = weights((256, 256), dtype) / 64
            case = OPS[op].case(w, *sizes)
            start = case.whole.double()
            getattr(case, call)()
            moved.append((case.whole.double() - (0 if op == "assemble" else start)).square().mean().sqrt().item())
        assert moved[0] == pytest.approx(moved[1], rel=0.05), op


def test_compiled_idiom_runs():
    w = torch.zeros(64, 64)
    idioms.compiled(idioms.normal)(w, 1e-3)
    assert 0.9e-3 < w.std() < 1.1e-3


def test_as_on_a_gpu(capsys):
    """One build of our kernels, and a copy beside the floor."""
    made = Sweep(torch.device("cpu"), timer.on_host, copy=True, repeats=1, providers=("ours", "idiom"))
    for point, rows in zip(
        points("dense", "fast", "lowrank"), made.rows(points("dense", "fast", "lowrank")), strict=True
    ):
        assert [(r["provider"], r["isa"]) for r in rows] == [(x, None) for x in ("floor", "copy", "ours", "idiom")]
        assert rows[1]["copy_share"] == pytest.approx(1)
        assert rows[2]["copy_share"] == pytest.approx(rows[2]["gb_per_s"] / rows[1]["gb_per_s"])
        kernels.rows_table(point, rows, 1).print()
    assert "of copy" in capsys.readouterr().out


def test_what_is_too_slow_is_said_to_be():
    made = sweep(providers=("ours", "reference"), budget=1e-9)
    rows = {r["provider"]: r for rows in made.rows(points("dense", shape=(1024, 1028))) for r in rows}
    assert "seconds" in rows["floor"]
    for provider in ("ours", "reference"):
        assert rows[provider]["unmeasured"].endswith("too long for --budget 1e-09")
        assert rows[provider].keys() >= {"op", "dtype", "shape", "rank", "threads", "isa", "run"}


def test_sizes_and_bytes_of_a_pass():
    assert shape_of(256, "float32") == (8192, 8192)
    assert shape_of(512, "float32") == (8192, 16384) and shape_of(512, "bfloat16") == (16384, 16384)

    def moved(op, *sizes):
        case = OPS[op].case(torch.ones(256, 264), *sizes)
        return 2 * case.whole.nbytes + case.extra

    matrix = 4 * 256 * 264
    assert moved("dense") == 2 * matrix
    assert moved("draw") == moved("dot") == matrix
    assert moved("adam") == 6 * matrix
    assert moved("forward", 64, 32) == 4 * (32 * (2 * 256 + 264) + 64 * (256 + 264))
    assert moved("lowrank", 64) == 2 * matrix + 4 * 64 * (256 + 264)


def test_the_forward_is_compared_with_its_layer(no_compiler):
    """On the layers of models, unless others are given; the rows give the weight's shape, and the number of tokens."""
    plan = kernels.points(kernels.arguments(["--op", "forward", "--quick", "--rank", "8", "--tokens", "4", "6"])[1])
    settings = [("float32", 4), ("float32", 6), ("bfloat16", 4), ("bfloat16", 6)]
    assert [(p.shape, p.dtype, p.tokens) for p in plan] == [((576, 576), *setting) for setting in settings]
    given = ["--op", "forward", "--shape", "48", "32", "--rank", "8", "--tokens", "4", "--dtype", "float32"]
    (point,) = kernels.points(kernels.arguments([*given, "--threads", "1"])[1])
    (rows,) = sweep().rows([point])
    found = {r["provider"]: r for r in rows}
    assert set(found) == {"floor", "ours", "reference", "idiom", "torch.compile", "in_place"}
    assert all((r["shape"], r["tokens"]) == ([48, 32], 4) for r in rows)


@pytest.mark.slow  # the harness itself takes turns in test_benchmark_harness.py
def test_two_packages(command, tmp_path, capsys):
    given = ["--op", "dense", "--dtype", "float32", "--shape", "64", "64", "--threads", "1", "--repeats", "1"]
    file = tmp_path / "rows.json"
    command(*given, "--isa", cpu.isa()[0], "--rounds", "1", "--package", str(ROOT), "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    ours = f"ours {cpu.isa()[0]}"
    assert [(r["package"], r["case"]) for r in rows] == [(p, c) for p in ("this", "base") for c in ("floor", ours)]
    shown = capsys.readouterr().out
    assert "dense normal, float32, 64 x 64, threads 1" in shown and ours in shown


def test_fewer_threads_at_the_largest_size_only(monkeypatch):
    monkeypatch.setattr(kernels, "CORES", 2)
    plan = kernels.points(kernels.arguments(["--op", "dense", "host", "--dtype", "float32", "--size", "2", "1"])[1])
    at = [(p.op, p.shape, p.threads) for p in plan]
    large = (512, 1024)
    assert at == [
        ("dense", (512, 512), 2),
        *[(op, large, threads) for op in ("dense", "host") for threads in (1, 2)],
    ]


def test_targets_time_what_they_compare():
    plan = kernels.points(kernels.arguments(["--targets"])[1])
    assert {(p.op, p.dtype, p.rank) for p in plan} == {(t.op, t.dtype, t.rank) for t in targets.COMPARISONS}
    assert {p.run for p in plan} == {1, 2, 3} and {p.threads for p in plan} == {1, 2}
    assert {p.shape for p in plan if p.op == "dense" and p.dtype == "float32"} == {(8192, 8192), (8192, 16384)}
    wanted = targets.wanted(["avx2", "generic"])
    assert ("dense", "float32", None, "ours", "avx2") in wanted and ("two_draws",) not in wanted


def row(provider: str, seconds: float, run: int = 1, isa: str | None = None) -> dict:
    base = {"op": "two_draws", "dtype": "float32", "rank": None, "threads": 2, "shape": [8, 8], "megabytes": 512.0}
    return base | {"provider": provider, "isa": isa, "seconds": seconds, "run": run}


def test_targets_are_of_large_weights_and_the_best_build():
    rows = [row("ours", s, run, "avx512") for run, s in enumerate((0.8, 1.0, 0.85))]
    rows += [row("ours", 9, run, "avx2") for run in range(3)]
    rows += [row("two_passes", 1, run, "avx512") for run in range(3)]
    found = targets.targets(rows)
    assert [(str(t), t.bound, t.verdict) for t in found if t.values] == [
        ("0.85x (0.80 to 1.00)", "≤ 0.9x two_passes", "met")
    ]
    assert len(found) == len(targets.COMPARISONS)
    assert not any(t.values for t in targets.targets([r | {"megabytes": 2.0} for r in rows]))


def test_figures_of_few_rows():
    for draw in (figure.against_floor, figure.by_size):
        draw([])
    rows = [r for rows in sweep().rows(points("dense", "lowrank")) for r in rows]
    for draw in (figure.against_floor, figure.by_size):
        assert draw(rows).axes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    assert ended.value.code == 2
    assert "--device: got cuda, but PyTorch finds no CUDA or ROCm device here" in capsys.readouterr().err
