"""benchmarks.report: the page of rows that were measured, and rows that were made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import machine
from benchmarks.kernels import __main__ as kernels
from benchmarks.report import __main__ as report
from pgap_kernels import extension

TEMPLATE = Path(__file__).parents[1] / "docs" / "benchmarks.in.md"
FACTS = {"processor": "some CPU", "torch": "2.x", "python": "3.x", "caches": {"L1": "32K"}, "command": "python -m it"}


def kernel_row(provider: str, seconds: float | None, run: int = 1, isa: str | None = None, **options) -> dict:
    row = {"op": "dense", "dtype": "float32", "rank": None, "threads": 2, "shape": [8192, 8192], "megabytes": 256.0}
    row |= {"run": run, "provider": provider, "isa": isa} | options
    if seconds is None:
        return row | {"unmeasured": "about 9.0 s a call, too long for --budget 0.5"}
    return row | {"seconds": seconds, "floor_ratio": seconds / 0.01, "speedup_vs_idiom": 0.2 / seconds}


def kernel_rows() -> list[dict]:
    rows = []
    for run, seconds in ((1, 0.02), (2, 0.025), (3, 0.021)):
        rows += [kernel_row("floor", 0.01, run), kernel_row("ours", seconds, run, "avx512")]
        rows += [kernel_row("idiom", 0.2, run), kernel_row("reference", None, run)]
    return rows


def step_row(**options) -> dict:
    row = {"model": "smollm2", "tokens": 32, "dtype": "float32", "threads": 2, "run": 1, "batch": 16, "rank": None}
    row |= {"provider": "ours", "method": "mezo", "mode": "inplace", "forward": 1.0, "perturb": 0.1, "total": 1.1}
    row |= {"ratio": 1.2, "ratio_own": 1.1, "peak_memory": 12.0}
    return row | {"refresh": None, "refresh_share": None} | options


@pytest.fixture
def folders(tmp_path):
    """Where data and template are; the page goes beside the latter."""
    data, docs = tmp_path / "data", tmp_path / "docs"
    for folder in (data, docs):
        folder.mkdir()
    (docs / "benchmarks.in.md").write_text(TEMPLATE.read_text())
    return data, docs


def write(file: Path, rows: list[dict], facts: dict = FACTS) -> None:
    machine.write(file, facts, rows)


def run(folders) -> int:
    return report.main(["--data", str(folders[0]), "--docs", str(folders[1])])


def test_page(folders):
    data, docs = folders
    rows = kernel_rows()  # of three runs, two of them in one file: files are told apart
    write(data / "kernels.json", [r for r in rows if r["run"] < 3])
    write(data / "kernels_targets.json", [r | {"run": 1} for r in rows if r["run"] == 3])
    refreshed = step_row(method="pgap", mode="folded", rank=16, refresh=9.0, refresh_share=0.08)
    write(data / "step.json", [step_row(), step_row(run=2, ratio_own=1.3), refreshed])
    assert run(folders) == 0
    page = (docs / "benchmarks.md").read_text()
    assert "{{" not in page
    lines = page.splitlines()
    assert "| dense normal, float32, avx512 | 8192 x 8192 | 2 | ≤ 3.2x floor | 2.10x (2.00 to 2.50) | met |" in lines
    step = "| MeZO in place: step / its two forwards (inplace, 2 threads) |  |  | ≤ 1.15 |"
    assert f"{step} 1.200 (1.100 to 1.300) | **missed** |" in lines
    assert any(line.startswith("| low rank, rank 16, float32 |") and "not measured" in line for line in lines)
    assert "| dense normal | float32 | 256 | 2 | 10 | 2.10 | too slow | 20.00 | 9.5x (8.0 to 10.0) |" in lines
    ratios = "1.20 (1.20 to 1.20) | 1.20 (1.10 to 1.30)"
    assert f"| ours mezo inplace | 1.000 | 0.100 | 1.100 | {ratios} |  |  | 12 |" in lines
    assert "| ours pgap folded 16 | 1.000 | 0.100 | 1.100 | 1.20 | 1.10 | 9.00 | 8.0% | 12 |" in lines
    assert "| caches | L1 32K |" in lines and "python -m it" in lines
    for name in ("kernels", "kernels_size", "step"):
        assert f"(figures/{name}.png)" in page
        assert (docs / "figures" / f"{name}.png").stat().st_size > 0


@pytest.mark.skipif(extension.unavailable is not None, reason="the C++ extension is not built")
def test_what_the_kernels_command_writes(folders, set_threads, capsys):
    data, docs = folders
    tiny = "--op rademacher lowrank forward host --dtype float32 --provider ours idiom addmm_ --shape 64 64 --rank 16"
    kernels.main(
        [*tiny.split(), "--tokens", "4", "--threads", "1", "--repeats", "1", "--json", str(data / "kernels.json")]
    )
    assert run(folders) == 0
    page = (docs / "benchmarks.md").read_text()
    for name in ("low rank 16", "low rank in the forward 16 4 tokens", "224 tensors of 16 weights"):
        assert f"{name} | float32 |" in page


def test_refusals(folders, capsys):
    data, docs = folders
    assert run(folders) == 2
    assert "has no kernels*.json or step*.json" in capsys.readouterr().err
    write(data / "kernels.json", kernel_rows())
    write(data / "kernels_other.json", kernel_rows(), FACTS | {"processor": "another CPU"})
    assert run(folders) == 2
    assert "accepted: files of one machine" in capsys.readouterr().err
    (data / "kernels_other.json").write_text("[]")
    assert run(folders) == 2
    assert "accepted: files of benchmarks.kernels --json" in capsys.readouterr().err
    (data / "kernels_other.json").unlink()
    (docs / "benchmarks.in.md").write_text("{{everything}}")
    assert run(folders) == 2
    assert "the template has {{everything}}; accepted: targets, machine" in capsys.readouterr().err
    assert not (docs / "benchmarks.md").exists()
