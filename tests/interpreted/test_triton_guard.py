"""A scalar on the device that is not finite: the pass writes nothing and leaves a mark. The host does not look at it,
so the ops are called below their checks here, with what would be on a GPU."""

import math

import pytest
import torch
from support.helpers import assert_all_same, clones, weights

from pgap_kernels import raise_if_skipped, use_backend
from pgap_kernels.triton import guard

TABLE = torch.ops.pgap_kernels
BAD = (math.inf, -math.inf, math.nan)
CPU = [torch.device("cpu")]
KEYS = torch.tensor([3, -4])


@pytest.fixture(autouse=True)
def by_triton():
    with use_backend("triton"):
        yield


def rows(count: int) -> torch.Tensor:
    return torch.full((count, 2), 0.5)


def given(w) -> dict[str, tuple]:
    """By name: the op, its lists, its keywords, and which of these are scalars that the guard has to see."""
    state0, state1 = ([torch.ones_like(t) for t in w] for _ in range(2))
    ids = {"tensor_ids": [1, 2]}
    draws = {"keys": KEYS, "coefficients": rows(2), **ids}
    mask = {"mask": "threshold", "mask_key": KEYS[:1], "mask_level": rows(1), "mask_bits": []}
    update = {"gradient": rows(2), "restore": rows(2), "scalars": rows(7), "decay": rows(1)}
    one = torch.tensor([0.5])
    lowrank = {
        "left": [torch.ones(len(w[0]), 2)],
        "right": [torch.ones(w[0].shape[1], 2)],
        "core": [],
        "keys": torch.tensor([1, 2, 3]),
        "coefficient": one,
        "decay": one,
        "tensor_ids": [1],
        "rank": 2,
        "core_kind": "none",
        "below": [],
    }
    affine = {"anchors": state0, "deltas": [], "coefficient": rows(1), **ids}
    dense, both = TABLE.dense_perturb_, ("coefficients", "decay")
    return {
        "dense": (dense, (w,), {**draws, "decay": rows(1), "stages": [2]}, both),
        "stages": (dense, (w,), {**draws, "decay": rows(3), "stages": [1, 0, 1]}, both),
        "assemble": (TABLE.assemble_gradient_, (w,), draws, ("coefficients",)),
        "masked": (TABLE.masked_perturb_, (w,), {**draws, "decay": rows(1), **mask}, (*both, "mask_level")),
        "update": (
            TABLE.preconditioned_update_,
            (w, state0, state1),
            {"keys": KEYS, "rule": "adam", **update, **ids},
            tuple(update),
        ),
        "perturb": (TABLE.preconditioned_perturb_, (w,), {**draws, "decay": rows(1), "curvature": state0}, both),
        "anchor": (TABLE.anchor_affine_, (w,), affine, ("coefficient",)),
        "low rank": (TABLE.lowrank_perturb_, (w[:1],), lowrank, ("coefficient", "decay")),
    }


@pytest.mark.parametrize("name", given(weights([(5, 7), (9,)])))
def test_nothing_is_written_and_a_mark_stays(name):
    w = weights([(5, 7), (9,)])
    op, lists, keywords, scalars = given(w)[name]
    watched = [t for tensors in lists for t in tensors]
    before = clones(watched)
    for i, at in enumerate(scalars):
        broken = {**keywords, at: keywords[at].clone()}
        broken[at].view(-1)[-1] = BAD[i % 3]
        op(*lists, **broken)
        assert_all_same(watched, before)
        assert guard.take_skipped() == CPU
        assert guard.take_skipped() == []
    op(*lists, **keywords)
    assert not any(torch.equal(t, b) for t, b in zip(watched, before, strict=True))
    assert guard.take_skipped() == []


def dense(w, coefficients) -> None:
    """One draw, its coefficients as they are."""
    decay = torch.zeros(1, 1)
    TABLE.dense_perturb_(w, keys=KEYS[:1], coefficients=coefficients, decay=decay, stages=[1], tensor_ids=[1])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 255, 256, 599])
def test_every_scalar_of_a_long_table_is_looked_at(at, bad):
    """The guard walks over blocks of 256."""
    w, coefficients = [torch.zeros(3)], torch.ones(1, 600)
    coefficients[0, at] = bad
    dense(w, coefficients)
    assert (w[0] == 0).all() and guard.take_skipped() == CPU


def test_the_largest_numbers_are_finite():
    w, largest = [torch.zeros(3)], torch.full((1, 1), -torch.finfo(torch.float32).max)
    dense(w, largest)
    assert (w[0] != 0).all() and guard.take_skipped() == []


def test_marks_of_several_passes_are_one_and_of_their_device():
    w, bad = [torch.zeros(3)], torch.full((1, 1), math.nan)
    for _ in range(2):
        dense(w, bad)
    raise_if_skipped("meta")
    with pytest.raises(FloatingPointError, match="a pass on cpu wrote nothing"):
        raise_if_skipped("cpu")
    raise_if_skipped("cpu")


def test_a_device_without_a_number_is_every_such_device(monkeypatch):
    """raise_if_skipped("cuda") is what one writes; flags are kept for cuda:0 and cuda:1."""
    flags = {torch.device(f"cuda:{i}"): torch.tensor([i], dtype=torch.int32) for i in range(2)}
    monkeypatch.setattr(guard, "_sticky", flags)
    assert guard.take_skipped(torch.device("cuda:0")) == []
    assert guard.take_skipped(torch.device("cuda")) == [torch.device("cuda:1")]
    assert guard.take_skipped() == []
