"""Methods beyond a single step: P-GAP's mean, the same run on every backend, learning, and how time is accounted."""

from __future__ import annotations

import copy

import pytest
import torch
from support.contract import Contract, build
from support.methods import METHODS, ROWS
from support.models import INPUTS, LABELS, Losses, Words, assert_same_weights, classifier, snapshot
from torch import nn
from torch.nn import functional as F

from pgap_kernels import cpu, ops
from pgap_kernels.optim import LOREN, PGAP, PIZO, AdaLeZO, scores

ROW = {row.id: row for row in ROWS}


MEANS = [("per_matrix", 3.0), ("global", 1.0)]
MORE_MEANS = [("per_matrix", 0.0), ("per_matrix", 1.0), ("fixed", 3.0)]


@pytest.mark.parametrize("xi, delta", [*MEANS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_MEANS)])
def test_pgap_estimator_mean(xi, delta):
    """The mean:  E[rho Z] = M + (delta - 1) a S^, plus delta (sum of the other a) S^ if matrices share a sign.

    A loss that is linear, <T, W>, has rho = <T, D> whatever eps and W; eps = 1 makes its float32 rounding negligible.
    """
    steps, model = 500, nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3, 5))
    slope = {"a": ops.draw((4, 3), 1, 1).double(), "b": ops.draw((3, 5), 2, 2).double()}
    opt = PGAP(model, lr=1e-3, eps=1.0, rank=2, window=steps, probes=64, xi=xi, delta=delta, scale="paper",
               eps_probe=1.0, seed=5, mode="inplace")  # fmt: skip
    calls = []

    def closure():
        calls.append((model.a.double(), model.b.double()))
        return sum((slope[n] * p).sum() for n, p in zip("ab", calls[-1], strict=True))

    opt.step(closure)
    start = snapshot(model)
    del calls[:]
    for _ in range(steps - 1):
        opt.step(closure)
    basis = {name: [t.double() for t in basis] for name, basis in opt.bases.items()}
    m = {n: u.T @ slope[n] @ v for n, (u, _, v) in basis.items()}
    unit = {n: (s / s.norm()).diag() for n, (_, s, _) in basis.items()}
    along = {n: (unit[n] * m[n]).sum() for n in m}
    directions = {n: torch.stack([(p[i] - q[i]) / 2 for p, q in zip(calls[::2], calls[1::2], strict=True)])
                  for i, n in enumerate("ab")}  # fmt: skip
    rho = sum((slope[n] * directions[n]).sum((1, 2)) for n in "ab")
    for n in "ab":
        u, _, v = basis[n]
        samples = rho[:, None, None] * (u.T @ directions[n] @ v)
        mean, sigma = samples.mean(0), samples.std(0) / len(samples) ** 0.5
        shared = 0.0 if xi == "per_matrix" else delta * (sum(along.values()) - along[n])
        expected = m[n] + ((delta - 1) * along[n] + shared) * unit[n]
        assert ((mean - expected).abs() <= 5 * sigma).all()
        wrong = m[n] + (delta * along[n] + shared) * unit[n]  # what (delta - 1) -> delta would give
        assert ((mean - wrong).abs() > 5 * sigma).any()
        # What was applied is the same sum; losses of size 1e2 are rounded to float32.
        applied = -(snapshot(model)[n].double() - start[n].double()) / opt.param_groups[0]["lr"] / len(samples)
        assert (u.T @ applied @ v - mean).abs().max() <= 1e-3 * mean.abs().max()


def test_points_that_do_not_fill_a_forward_are_filled_up():
    """A pool of 3 in forwards of 2: two forwards, then one for both signs; three more have looked whether rows mix."""
    model, closures = Words(), []
    for members in (1, 2):
        net = copy.deepcopy(model)
        opt = PIZO(net, lr=1e-3, pool=3, alpha=0.4, mode="scratch", members=members)
        closures.append(Losses(net, stacked=members == 2))
        opt.step(closures[-1])
    alone, stacked = closures
    assert (alone.calls, stacked.calls) == (5, 3 + 3)
    losses = stacked.seen[6:]
    assert losses[2] == losses[3] and losses[:3] + losses[4:] == pytest.approx(alone.seen, abs=1e-6)


def test_scores():
    """Pure functions of losses, by hand."""
    losses = [3.0, 1.0, 2.0, 1.0]
    assert scores.spsa(3.0, 1.0, 0.5) == 2.0
    assert scores.leave_one_out(losses) == pytest.approx([1.25 / 3, -0.75 / 3, 0.25 / 3, -0.75 / 3])
    assert scores.top_minus_rest(losses, 1) == [-1 / 3, 1.0, -1 / 3, -1 / 3]  # of a tie the lower index
    assert scores.top_minus_rest(losses, 2) == [-0.5, 0.5, -0.5, 0.5]
    assert scores.best_only(losses) == [0.0, 1.0, 0.0, 0.0]
    spread = (11 / 16) ** 0.5
    assert scores.standardised(losses) == pytest.approx([1.25 / spread, -0.75 / spread, 0.25 / spread, -0.75 / spread])
    assert scores.standardised(losses, base=1.0, ddof=1)[0] == pytest.approx(2.0 / (11 / 12) ** 0.5)
    assert scores.standardised([2.0, 2.0]) == [0.0, 0.0]
    assert scores.standardised([0.1] * 3, base=0.2) == [0.0] * 3, "though the mean of them is not 0.1"
    assert scores.standardised([3.0, 1.0], floor=3.0) == [0.5, -0.5]


def test_slopes_are_told_where_steps_take_them():
    """`last.rho`, one for each direction; none where losses are only ranked or scaled."""
    counts = {"agzo": 1, "hizoo": 1, "zo-muon": 3, "loren": 4, "pgap": 1, "fzoo": 0, "eggroll": 0}
    for name, count in counts.items():
        _, optimizer, closure = build(ROW[name], "inplace")
        optimizer.step(closure)
        assert len(optimizer.last.rho) == count, name


def test_loren_decays_its_curvature():
    """By its own learning rate; of a loss that does not change, a has no gradient."""
    model = nn.Linear(3, 2)
    opt = LOREN(model, lr=0.0, weight_decay=0.5, curvature="learned", lr_a=0.2, seed=3, mode="inplace")
    opt.step(lambda: model.weight.sum() * 0)
    a = opt.state[model.weight]["a"].clone()
    opt.step(lambda: model.weight.sum() * 0)
    assert torch.equal(opt.state[model.weight]["a"], a * (1 - 0.2 * 0.5))


def test_adalezo_weighs_layers_by_the_chances_that_they_were_drawn_with():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    opt = AdaLeZO(model, share=0.2, interval=2, lr=0.01, mode="inplace")
    x, seen = torch.ones(2, 3), []
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
        seen.append((opt.drawn, opt.chances))
    assert seen[0] == seen[1] and seen[1][1] != seen[2][1]


def test_time_is_accounted_once():
    _, opt, closure = build(ROW["pgap"], "inplace")
    opt.step(closure)
    assert all(seconds > 0 for seconds in opt.seconds.values())
    before = dict(opt.seconds)
    opt.step(closure)
    assert opt.seconds["refresh"] == before["refresh"]
    assert opt.seconds["forward"] > before["forward"] and opt.seconds["perturb"] > before["perturb"]


# ---- backends and learning ------------------------------------------------------------------------------------------

DENSE = [row for row in METHODS if "rank" not in row.options]


@pytest.mark.skipif(
    cpu.refusal("dense_perturb_", torch.device("cpu"), torch.float32) is not None, reason="no C++ extension"
)
@pytest.mark.parametrize("row", DENSE)
def test_backends_give_dense_methods_the_same_bits(row, monkeypatch):
    models = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("PGAP_BACKEND", backend)
        model, opt, closure = build(row, "inplace", **({"kappa": 1, "iterations": 1} if row.id == "dizo" else {}))
        for _ in range(2 if row.id == "dizo" else 1):
            opt.step(closure)
        models.append(model)
    assert_same_weights(*models)


@pytest.mark.parametrize("row", [row for row in METHODS if row not in DENSE])
def test_low_rank_methods_keep_the_contract_on_the_reference(row, monkeypatch):
    """Products may be summed in another order there."""
    monkeypatch.setenv("PGAP_BACKEND", "reference")
    contract = Contract(row, "inplace")
    for _ in range(2):
        contract.step()
    contract.finish()


RATES = {"mezo-3": 0.03, "pgap": 0.03, "pizo-greedy": 0.02, "helene": 0.05, "lozo": 0.02, "lozo-m": 0.02, "dizo": 0.03}
RATES |= {"eggroll": 30.0, "agzo": 0.1, "loren": 0.003, "mezo-momentum": 0.005, "mezo-adam": 0.02, "hizoo": 0.02}
RATES |= {"fzoo": 0.05, "sparse-mezo": 0.05, "subzero": 0.03, "svd-0": 0.03, "tezo-momentum": 0.1, "zo-muon": 0.1}
RATES |= {"lezo": 0.05, "adalezo": 0.05, "zo-adamu": 0.03}


@pytest.mark.parametrize("row", METHODS)
def test_learning(row):
    """Every method halves the loss of a small classification in 200 steps."""
    model = classifier()
    own = {"lr": RATES[row.id], "eps": 1e-3, "mode": "auto"}
    own |= {"select": ["*.weight"], "kappa": 20, "s": 0.1} if row.id == "dizo" else {"weight_decay": 0.0}
    own |= {"alpha": 1e-6} if row.id == "hizoo" else {"sparsity": 0.2} if row.id == "sparse-mezo" else {}
    own |= {"window": 20} if "window" in row.options else {}
    opt = row.make(model, **{**row.options, **own})
    losses = [opt.step(lambda: F.cross_entropy(model(INPUTS), LABELS)) for _ in range(200)]
    assert sum(losses[-5:]) / 5 < losses[0] / 2
