"""benchmarks.methods on tiny models: published logic moves along what it evaluated; what is counted was declared."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.methods import __main__ as program
from benchmarks.methods import against, contenders
from benchmarks.methods.contenders import Spec, methods, specs
from benchmarks.methods.published import FZOO, LOREN, PIZO, PUBLISHED, ZOMuon
from benchmarks.methods.published.one_sided import OneSided
from benchmarks.step import models

# Windows that are run whole to be counted, and others of which a few steps are.
SMALL = {"pgap": {"rank": 4, "window": 30, "probes": 2, "delta": 2.0}, "svd-0": {"window": 3, "probes": 2}}
SMALL |= {"lozo": {"window": 3}, "lozo-m": {"window": 30}, "subzero": {"window": 3}, "pizo-subzero": {"window": 30}}
SMALL |= {"zo-muon": {"window": 30}}


# ---- published logic ------------------------------------------------------------------------------------------------

OPTIONS = {
    "pgap": {"rank": 2, "window": 9, "probes": 2, "delta": 2.0},
    "lozo": {"rank": 2, "window": 9},
    "lozo-m": {"rank": 2, "window": 9, "beta": 0.0},  # its moment is then that of the step
    "subzero": {"rank": 2},
    "dizo": {"select": ["weight"], "kappa": 2, "iterations": 1},
    "loren": {"beta": 0.0},
    "zo-muon": {"rank": 3, "window": 9},
}


class Published:
    """A published method on a small layer in float64, with the weights that each of its forwards saw."""

    def __init__(self, method: str, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 5).double()
        self.x = torch.randn(8, 6).double()
        options = {"lr": 0.1, "eps": 1e-3, "seed": 0, **OPTIONS.get(method, {}), **options}
        self.method = PUBLISHED[method](self.model, **options)
        self.eps, self.lr = options["eps"], options["lr"]
        self.seen: list[torch.Tensor] = []
        self.losses: list[float] = []

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The movement of a step, and what its forwards say it should have been."""
        self.seen.clear()
        self.losses.clear()

        def closure() -> torch.Tensor:
            self.seen.append(self.weights())
            self.losses.append(self.model(self.x).square().mean().item())
            return torch.tensor(self.losses[-1], dtype=torch.float64)

        before = self.weights()
        self.method.step(closure)
        if isinstance(self.method, OneSided) and not isinstance(self.method, PIZO):
            moves = [(seen - before) / self.eps for seen in self.seen]
            return self.weights() - before, ONE_SIDED[type(self.method)](self, moves)
        rho = (self.losses[-2] - self.losses[-1]) / (2 * self.eps)
        return self.weights() - before, -self.lr * rho * (self.seen[-2] - self.seen[-1]) / (2 * self.eps)


def fzoo(run, moves):
    *losses, clean = run.losses
    return -run.lr * sum((f - clean) * z for f, z in zip(losses, moves, strict=False)) / (8 * statistics.pstdev(losses))


def loren(run, moves):
    """Without momentum."""
    mean = statistics.fmean(run.losses)
    return -run.lr * sum((f - mean) * z for f, z in zip(run.losses, moves, strict=True)) / (5 * run.eps)


def zo_muon(run, moves):
    """The estimate has the update's singular vectors, and the update's singular values are near 1."""
    *losses, clean = run.losses
    mean = sum((f - clean) / run.eps * z for f, z in zip(losses, moves, strict=False)) / 4
    left, _, right = torch.linalg.svd(mean[:30].view(5, 6), full_matrices=False)
    orthogonal = torch.zeros_like(mean)
    orthogonal[:30] = (left[:, :3] @ right[:3]).flatten()
    return torch.cat([-run.lr * orthogonal[:30], -1e-7 * mean[30:]])


ONE_SIDED = {FZOO: fzoo, LOREN: loren, ZOMuon: zo_muon}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_logic_moves_along_what_it_evaluated(method):
    published = Published(method)
    published.step()
    moved, expected = published.step()
    assert expected.norm() > 1e-3
    if method == "zo-muon":  # five iterations bring singular values to between 0.7 and 1.2 only
        assert torch.cosine_similarity(moved[:30], expected[:30], dim=0) > 0.95
        assert 0.7 < moved[:30].norm() / expected[:30].norm() < 1.2
        moved[:30], expected[:30] = 0.0, 0.0
    # The alpha of HiZOO is 1e-8: its new H is its old one in eight digits.
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["lozo", "lozo-m"])
def test_published_lozo_applies_another_u_where_v_changes(method):
    moved, expected = Published(method).step()
    assert torch.cosine_similarity(moved, expected, dim=0) < 0.9


def test_published_dizo_stays_on_the_line_through_its_anchor():
    published = Published("dizo")
    anchor = published.weights()
    moved = [published.step()[0] for _ in range(3)]
    weight = slice(0, 30)
    delta, after = (moved[0] + moved[1])[weight], (published.weights() - anchor)[weight]
    ratio = after.norm() / delta.norm()
    torch.testing.assert_close(after, ratio * delta)
    assert 0.8 <= ratio <= 1.2 and abs(ratio - 1) > 1e-3
    assert not moved[2][30:].any()


# ---- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.setattr(contenders, "OPTIONS", contenders.OPTIONS | SMALL)
    monkeypatch.setattr(models, "BATCH", 2)
    against._workload.cache_clear()
    against._contender.cache_clear()


def test_every_method_in_every_mode(small, tmp_path, capsys):
    report = tmp_path / "methods.json"
    assert program.main(["--model", "tiny", "--tokens", "3", "--steps", "1", "--json", str(report)]) == 0
    assert "folded, members" in capsys.readouterr().out
    rows = json.loads(report.read_text())["rows"]
    expected = [spec for method in methods() for spec in specs(method, program.PROVIDERS)]
    assert [Spec(r["method"], r["provider"], r["mode"]) for r in rows] == expected
    assert {(spec.method, spec.provider) for spec in expected} >= {("pgap", "ours"), ("hizoo", "published")}
    for row in rows:
        where = str(row)
        assert len(row["seconds_of_steps"]) == 1 and row["total"] >= row["forward"] > 0, where
        assert row["total"] == pytest.approx(row["forward"] + row["outside"] + row["refresh"]), where
        if row["provider"] == "published":
            assert row["passes_declared"] is None and row["passes"] is None, where
        else:
            assert row["forwards"] == row["forwards_declared"], where
            assert row["passes"] == pytest.approx(row["passes_declared"]), where
            assert row["kept"] >= row["state_declared"], where


def test_two_packages_take_the_same_steps(small, capsys):
    class Worker:
        ask = staticmethod(against.answer)

    given = ["--model", "tiny", "--tokens", "3", "--only", "mezo", "--rounds", "2"]
    _, args = program.arguments([*given, "--package", str(Path(__file__).parents[1])])
    rows = against.rows({"this": Worker(), "base": Worker()}, args)
    modes = ["ours, inplace", "ours, two_pass", "ours, scratch"]
    turns = [("this", 1), ("base", 1), ("base", 2), ("this", 2)]
    assert [(r["case"], r["package"], r["round"]) for r in rows] == [(mode, *turn) for mode in modes for turn in turns]
    assert "this/base" in capsys.readouterr().out
