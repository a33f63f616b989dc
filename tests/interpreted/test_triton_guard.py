"""A scalar on the device that is not finite: the pass writes nothing and leaves a mark. The host does not look at it,
so the ops are called below their checks here, with what would be on a GPU."""

import math

import pytest
import torch
from agreement import assert_all_same
from helpers import clones, weights

from pgap_kernels import raise_if_skipped
from pgap_kernels.triton import launch

TABLE = torch.ops.pgap_kernels
BAD = (math.inf, -math.inf, math.nan)
CPU = [torch.device("cpu")]
KEYS = torch.tensor([3, -4])
NOISE = ([1, 2], [0, 7, 0, 9], "normal", "exact", "triton")


def table(rows: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((rows, 2), value)


def given(w) -> dict[str, tuple]:
    """By name of the op: the op, its arguments in order, and which of them are scalars the guard has to see."""
    state = [torch.ones_like(t) for t in w]
    second = [torch.ones_like(t) for t in w]
    left, right = [torch.ones(len(w[0]), 2)], [torch.ones(w[0].shape[1], 2)]
    one = torch.tensor([0.5])
    small = ([1], [0, 7], 2, "diagonal", one, [], "triton")
    return {
        "dense": (TABLE.dense_perturb_, (w, KEYS, table(2), table(1), None, [2], *NOISE), (2, 3)),
        "stages": (TABLE.dense_perturb_, (w, KEYS, table(2), table(3), None, [1, 0, 1], *NOISE), (2, 3)),
        "assemble": (TABLE.assemble_gradient_, (w, KEYS, table(2), *NOISE), (2,)),
        "masked": (
            TABLE.masked_perturb_,
            (w, KEYS, table(2), table(1), None, "threshold", KEYS[:1], table(1), [], *NOISE),
            (2, 3, 7),
        ),
        "update": (
            TABLE.preconditioned_update_,
            (w, state, second, KEYS, table(2), table(2), table(7), "adam", table(1), None, *NOISE),
            (4, 5, 6, 8),
        ),
        "perturb": (TABLE.preconditioned_perturb_, (w, state, KEYS, table(2), table(1), None, *NOISE), (3, 4)),
        "anchor": (TABLE.anchor_affine_, (w, state, [], table(1), None, [1, 2], [0, 7, 0, 9], "triton"), (3,)),
        "low rank": (
            TABLE.lowrank_perturb_,
            (w[:1], left, right, [torch.ones(2)], torch.tensor([1, 2, 3]), one, one, None, *small),
            (5, 6),
        ),
    }


@pytest.mark.parametrize("name", given(weights([(5, 7), (9,)])))
def test_nothing_is_written_and_a_mark_stays(name):
    w = weights([(5, 7), (9,)])
    op, arguments, scalars = given(w)[name]
    watched = [*w, *(t for a in arguments[1:3] if isinstance(a, list) for t in a)]
    before = clones(watched)
    for i, at in enumerate(scalars):
        broken = list(arguments)
        values = broken[at] if not isinstance(broken[at], list) else broken[at][0]
        values = values.clone()
        values.view(-1)[-1] = BAD[i % 3]
        broken[at] = [values] if isinstance(broken[at], list) else values
        op(*broken)
        assert_all_same(watched, before)
        assert launch.take_skipped() == CPU
        assert launch.take_skipped() == []
    op(*arguments)
    assert not any(torch.equal(t, b) for t, b in zip(w[: len(arguments[0])], before, strict=False))
    assert launch.take_skipped() == []


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 255, 256, 599])
def test_every_scalar_of_a_long_table_is_looked_at(at, bad):
    """The guard walks over blocks of 256."""
    w, coefficients = [torch.zeros(3)], torch.ones(1, 600)
    coefficients[0, at] = bad
    TABLE.dense_perturb_(w, KEYS[:1], coefficients, torch.zeros(1, 1), None, [1], [1], [0, 3], *NOISE[2:])
    assert (w[0] == 0).all() and launch.take_skipped() == CPU


def test_the_largest_numbers_are_finite():
    w, largest = [torch.zeros(3)], torch.full((1, 1), -torch.finfo(torch.float32).max)
    TABLE.dense_perturb_(w, KEYS[:1], largest, torch.zeros(1, 1), None, [1], [1], [0, 3], *NOISE[2:])
    assert (w[0] != 0).all() and launch.take_skipped() == []


def test_marks_of_several_passes_are_one_and_of_their_device():
    w, bad = [torch.zeros(3)], torch.full((1, 1), math.nan)
    for _ in range(2):
        TABLE.dense_perturb_(w, KEYS[:1], bad, torch.zeros(1, 1), None, [1], [1], [0, 3], *NOISE[2:])
    raise_if_skipped("meta")
    with pytest.raises(FloatingPointError, match="a pass on cpu wrote nothing"):
        raise_if_skipped("cpu")
    raise_if_skipped("cpu")


def test_a_device_without_a_number_is_every_such_device(monkeypatch):
    """raise_if_skipped("cuda") is what one writes; flags are kept for cuda:0 and cuda:1."""
    flags = {torch.device(f"cuda:{i}"): torch.tensor([i], dtype=torch.int32) for i in range(2)}
    monkeypatch.setattr(launch, "_sticky", flags)
    assert launch.take_skipped(torch.device("cuda:0")) == []
    assert launch.take_skipped(torch.device("cuda")) == [torch.device("cuda:1")]
    assert launch.take_skipped() == []
