"""benchmarks.step on tiny models: rows are complete, contenders do what they are timed for, targets are told."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from support.finetune_tiny import tiny_model

from benchmarks import populations
from benchmarks.step import __main__ as step
from benchmarks.step import against, models
from benchmarks.step.contenders import Contender, Sampled, Spec, specs
from benchmarks.step.mezo import Forwards
from benchmarks.step.models import Workload
from benchmarks.step.targets import targets

OURS = [Spec("ours", "mezo", mode) for mode in ("inplace", "two_pass", "scratch")]
OURS += [Spec("ours", "pgap", mode, 4) for mode in ("inplace", "scratch", "folded", "folded, window")]
OTHERS = [Spec("published", "mezo"), Spec("torch.compile", "mezo")]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path, set_threads):
    """Models of a few hundred weights take the names of the real ones."""
    from transformers import AutoModelForCausalLM

    set_threads(1)
    folder = tiny_model(tmp_path / "llama", "llama")
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setitem(models.MODELS, "smollm2", lambda dtype: load(folder, dtype=dtype))
    monkeypatch.setitem(models.MODELS, "opt13b", lambda dtype: load(folder, dtype=dtype))
    monkeypatch.setattr(models, "BATCH", 2)
    against._workload.cache_clear()
    against._contender.cache_clear()


def weights(workload: Workload) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in workload.model.parameters() if p.requires_grad])


def contender(spec: Spec, workload: Workload) -> Contender:
    return Contender(spec, workload, tokens=4, window=10, probes=3)


# ---- contenders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*OURS, *OTHERS, Spec("forwards")], ids=str)
def test_steps_make_small_updates_and_leave_no_perturbation(spec):
    workload = Workload("smollm2", torch.float32)
    frozen = [p.detach().clone() for p in workload.model.parameters() if not p.requires_grad]
    before = weights(workload)
    own = contender(spec, workload)
    own.prepare(refresh_forwards=2)
    own.block(range(3))
    moved = (weights(workload) - before).abs().max()
    if spec.mode == "folded, window":
        assert own.optimizer.pending
        own.optimizer.merge()
        moved = (weights(workload) - before).abs().max()
    if spec.provider == "forwards":
        assert isinstance(own.optimizer, Forwards) and moved == 0 and not any(s["perturb"] for s in own.seconds)
    else:
        assert 0 < moved < 1e-4  # eps is 1e-3
    for p, old in zip((p for p in workload.model.parameters() if not p.requires_grad), frozen, strict=True):
        assert torch.equal(p, old)


def test_compiled_is_published_but_for_rounding():
    moved = []
    for spec in OTHERS:
        workload = Workload("smollm2", torch.float32)
        before = weights(workload)
        own = contender(spec, workload)
        own._make()
        own.optimizer.lr = 1e-3
        own.block(range(2))
        moved.append(weights(workload) - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=0.05, atol=1e-6)


def test_contenders_share_weights_and_not_hooks():
    workload = Workload("smollm2", torch.float32)
    scratch, plain = contender(OURS[2], workload), contender(Spec("forwards"), workload)
    scratch.prepare(refresh_forwards=2)
    for a, b in zip(scratch.model.parameters(), plain.model.parameters(), strict=True):
        assert a is b
    assert any(module._forward_hooks for module in scratch.model.modules())
    assert not any(module._forward_hooks for module in plain.model.modules())


@pytest.mark.parametrize("mode", ["inplace", "folded"])
def test_a_refresh_counts_all_its_forwards(mode):
    own = contender(Spec("ours", "pgap", mode, 4), Workload("smollm2", torch.float32))
    calls = []

    def slow() -> torch.Tensor:
        calls.append(None)
        return own.loss(own.workload.batch(4, 0))

    own._make()
    own._take(slow)
    assert len(calls) == 2 * own.probes + 2
    own.closure = lambda step: slow
    own._refresh(2)
    assert len(calls) == 2 * own.probes + 2 + 2
    assert own.optimizer.window == 10 and own.optimizer.steps == 2


def test_made_up_losses_follow_real_ones():
    closure = Sampled(lambda: torch.tensor(2.0), real=1)
    losses = [closure().item() for _ in range(3)]
    assert losses[0] == 2 and len(set(losses)) == 3 and len(closure.seconds) == 1


# ---- the program ----------------------------------------------------------------------------------------------------


def test_rows_are_complete(tmp_path, capsys):
    report = tmp_path / "step.json"
    options = "--tokens 4 --ranks 2 4 --steps 2 --probes 2 --threads 1 --runs 2"
    assert step.main([*options.split(), "--json", str(report)]) == 0
    assert "folded" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["facts"]["threads"] == 1 and found["facts"]["torch"] and found["facts"]["arguments"]["runs"] == 2
    group = 1 + len(OTHERS) + 3 + 2 * 4
    assert len(found["rows"]) == 2 * 2 * group
    assert {(r["model"], r["run"]) for r in found["rows"]} == {(m, n) for m in ("smollm2", "opt13b") for n in (1, 2)}
    for row in found["rows"]:
        assert row["total"] >= row["forward"] > 0 and row["dtype"] == "float32" and row["threads"] == 1
        assert row["ratio_own"] >= 1 and row["ratio"] > 0 and len(row["seconds_of_steps"]) == 2
        assert row["peak_tensors"] is None if row["provider"] == "torch.compile" else row["peak_tensors"] > 0
        is_pgap = row["method"] == "pgap"
        for name in ("refresh", "refresh_share", "window", "rank", "refresh_peak_tensors"):
            assert (row[name] is not None) == is_pgap, name
        if is_pgap:
            assert row["refresh_share"] == pytest.approx(row["refresh"] / (100 * row["total"]))
        assert (row["perturb"] > 0) == (row["provider"] != "forwards")
    forwards = [row["ratio"] for row in found["rows"] if row["provider"] == "forwards"]
    assert forwards == [1.0] * 4


def test_filters():
    found = specs(["mezo", "pgap"], ["inplace", "folded"], ["ours"], [4])
    assert [str(s) for s in found] == [
        "forwards", "ours mezo inplace",
        "ours pgap inplace 4", "ours pgap folded 4", "ours pgap folded, window 4",
    ]  # fmt: skip


def test_two_packages_take_the_same_steps(capsys):
    class Worker:
        ask = staticmethod(against.answer)

    options = "--model smollm2 --tokens 4 --modes folded --ranks 2 --probes 1 --rounds 2"
    _, args = step.arguments([*options.split(), "--package", str(Path(__file__).parents[1])])
    rows = against.rows({"this": Worker(), "base": Worker()}, args, {})
    cases = ["forwards", "ours pgap folded 2", "ours pgap folded, window 2"]
    turns = [("this", 1), ("base", 1), ("base", 2), ("this", 2)]
    assert [(r["case"], r["package"], r["round"]) for r in rows] == [(case, *turn) for case in cases for turn in turns]
    for row in rows:
        assert len(row["seconds_of_steps"]) == 1 and row["total"] >= row["forward"] > 0
        assert (row["refresh"] is not None) == (row["case"] != "forwards")
    assert "this/base" in capsys.readouterr().out


def row(**changes) -> dict:
    base = {"model": "smollm2", "dtype": "float32", "tokens": 32, "batch": 16, "provider": "ours", "method": "mezo"}
    return base | {"mode": "inplace", "rank": None, "threads": 2, "ratio_own": 1.1, "refresh_share": None} | changes


def test_targets_take_medians_over_runs_and_the_best_mode():
    rows = [row(ratio_own=value) for value in (1.1, 1.12, 3.0)]
    rows += [row(method="pgap", rank=16, mode="inplace", ratio_own=1.3, refresh_share=0.1)]
    rows += [row(method="pgap", rank=16, mode="folded", ratio_own=1.09, refresh_share=0.16)]
    rows += [row(mode="scratch", ratio_own=1.0), row(tokens=8, ratio_own=1.0), row(model="opt13b", ratio_own=1.0)]
    rows += [row(provider="published", mode=None, ratio_own=1.0), row(dtype="bfloat16", ratio_own=1.0)]
    found = targets(rows)
    assert [(statistics.median(t.values), t.at_most, t.met) for t in found] == [
        (1.12, 1.15, True),
        (1.09, 1.08, False),
        (0.16, 0.15, False),
    ]
    assert "folded, rank 16, 2 threads" in found[1].what
    assert targets([row(tokens=8)]) == []


def test_forwards_of_populations_are_compared_with_plain_ones(tmp_path, capsys):
    populations.main(
        ["--model", "tiny", "--tokens", "3", "--turns", "2", "--vectors", "--json", str(tmp_path / "rows.json")]
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [*populations.CASES]
    assert all(len(row["ratios"]) == 2 and min(row["ratios"]) > 0 for row in rows)
    assert "factors of rank 1" in capsys.readouterr().out
