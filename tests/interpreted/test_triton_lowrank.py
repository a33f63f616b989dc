"""lowrank_perturb_ on the Triton kernels: exact where arithmetic is, accurate where it is not."""

import math

import pytest
import torch
from support.helpers import DTYPES, assert_all_same, assert_same_bits, in_turn, weights
from support.lowrank_calls import (
    SHAPES,
    STOCHASTIC,
    WIDE,
    agreeing,
    assert_quotient,
    at_most_twice,
    perturbed,
    stored,
)

from pgap_kernels.triton import lowrank, rounding
from pgap_kernels.triton.config import lowrank_config

RANKS = (1, 2, 8, 9, 15, 16, 17, 32, 33, 64, 65, 130)


# ---- exact arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "dtype"), in_turn(RANKS, DTYPES, times=2), ids=str)
def test_whole_numbers(dtype, rank):
    """Nothing but the last rounding is inexact, so every rank gives the reference's bits, with every stored core."""
    w = weights(SHAPES, dtype)
    for core, options in (
        ("none", {"coefficient": 0.25}),
        ("diagonal", {"coefficient": [0.5, -0.125], "decay": [0.0, 0.25], **STOCHASTIC}),
        ("full", {"coefficient": 2.0**-6, "decay": 0.5}),
    ):
        left, right, cores = stored(rank, core)
        got = agreeing(w, left, right, core=cores, **options, **WIDE)
        assert not any(torch.equal(g, x) for g, x in zip(got, w, strict=True))


@pytest.mark.parametrize(("rank", "dtype"), in_turn((1, 9, 16, 33), DTYPES), ids=str)
def test_quotients_of_whole_numbers(dtype, rank):
    """Factors are signs, and v adds up so that the root is 16."""
    w = weights(SHAPES, dtype)
    left, right, cores = stored(rank, "diagonal")
    left, right = ([torch.where(f > 0, 1.0, -1.0) for f in side] for side in (left, right))
    below = torch.ones(rank)
    below[0] = 256.0 - rank
    options = {"core": [c.abs() + 1 for c in cores], "below": [below] * 2, "e": 1.0, **WIDE}
    agreeing(w, left, right, coefficient=[0.5, -0.125], decay=[0.0, 0.25], **STOCHASTIC, **options)
    got = agreeing(w, left, right, coefficient=2.0, **options)
    assert not any(torch.equal(g, x) for g, x in zip(got, w, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_rank(dtype):
    w = weights([(20, 70)], dtype)
    left, right, _ = stored(512, "none", [(20, 70)])
    agreeing(w, left, right, coefficient=2.0**-6, slices=[(5 * 600 + 7, 600)], **STOCHASTIC)


@pytest.mark.parametrize(("rank", "dtype"), in_turn((1, 12, 16), DTYPES), ids=str)
def test_columns_beyond_a_strip(dtype, rank):
    """A program walks over a strip of a row block; another does the rest."""
    config = lowrank_config(dtype, rank, stochastic=False, architecture="other")
    shape = (3, config.columns * config.strip + 5)
    left, right, _ = stored(rank, "none", [shape])
    agreeing(weights([shape], dtype), left, right, coefficient=0.25, slices=[(0, shape[1])])


def test_special_weights():
    special = [math.inf, -math.inf, math.nan, 1e-40, 6e-8, 65504.0, 3.38e38, 1.0]
    for dtype in DTYPES:
        w = [torch.tensor(special * 40, dtype=torch.float64).to(dtype).view(20, 16)]
        left, right, _ = stored(2, "none", [(20, 16)])
        for options in ({}, STOCHASTIC):
            agreeing(w, left, right, coefficient=0.25, decay=0.5, **options)


# ---- accuracy ------------------------------------------------------------------------------------------------------


def with_cores() -> list[tuple]:
    """The stored cores take turns: each is made into P before the pass."""
    pairs = [(d, r) for d in (torch.float32, torch.bfloat16) for r in RANKS] + [
        (torch.float16, r) for r in (2, 9, 17, 33)
    ]
    return [(dtype, rank, ("none", "diagonal", "full")[(i + i // 3) % 3]) for i, (dtype, rank) in enumerate(pairs)]


@pytest.mark.parametrize(("dtype", "rank", "core"), with_cores(), ids=str)
def test_error_is_at_most_twice_that_of_pytorch(dtype, rank, core):
    w = weights(SHAPES, dtype)
    left, right, cores = stored(rank, core, draw=lambda sizes, seed: weights(sizes, seed=seed))
    decay = 0.125 if core == "full" else 0.0
    got = perturbed(w, left, right, core=cores, coefficient=0.3125, decay=decay, **WIDE)
    matrices = [torch.eye(rank) if core == "none" else c.diag() if core == "diagonal" else c for c in cores or w]
    at_most_twice(dtype, got, w, left, right, matrices, 0.3125, decay)


@pytest.mark.parametrize(("dtype", "rank"), [*zip(DTYPES, (2, 17, 33), strict=True)], ids=str)
def test_quotients_are_within_their_bounds(dtype, rank):
    w = weights(SHAPES, dtype)
    left, right, cores = stored(rank, "diagonal", draw=lambda sizes, seed: weights(sizes, seed=seed))
    below = [1e-8 * c.square() for c in cores]
    got = perturbed(w, left, right, core=cores, below=below, e=1e-10, coefficient=3e-5, **WIDE)
    for g, x, a, b, c, v in zip(got, w, left, right, cores, below, strict=True):
        assert_quotient(g, x, a, b, c, v, e=1e-10, coefficient=3e-5)


# ---- decay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 2), (torch.float32, 16), (torch.bfloat16, 3)], ids=str)
def test_a_weight_without_decay_does_not_see_that_of_others(monkeypatch, dtype, rank, options):
    """On a GPU a list whose decay is 0 on the host has a kernel without decay; here no scalar is on the host."""
    w = weights(SHAPES, dtype)
    left, right, _ = stored(rank, "none", draw=lambda sizes, seed: weights(sizes, seed=seed))
    options = {"coefficient": 0.3, **WIDE, **options}
    beside, plain = (perturbed(w, left, right, decay=d, **options) for d in ([0.0, 0.1], 0.0))
    compiled = []

    def without(*arguments):
        compiled.append(rounding.update_of(*arguments)._replace(decay=False))
        return compiled[-1]

    monkeypatch.setattr(lowrank, "update_of", without)
    assert_all_same(perturbed(w, left, right, decay=0.0, **options), plain)
    assert compiled and not torch.equal(beside[1], plain[1])
    assert_same_bits(beside[0], plain[0])
