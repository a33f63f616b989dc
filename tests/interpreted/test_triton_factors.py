"""Stored and regenerated factors of lowrank_perturb_ on the Triton kernels."""

import pytest
import torch
from support.helpers import assert_all_same, assert_same_bits, in_turn, ops, weights
from support.lowrank_calls import CORE, IDS, LEFT, RIGHT, SHAPES, WIDE, perturbed, stored

HALF_DTYPES = (torch.bfloat16, torch.float16)


CORES = [(3, "full"), (12, "diagonal"), (20, "none"), (33, "diagonal"), (65, "full")]


@pytest.mark.parametrize(("factor", "dtype"), in_turn(CORES, HALF_DTYPES), ids=str)
def test_factors_in_either_dtype(factor, dtype):
    """A factor in W's dtype is its float32 copy, which is rounded no further."""
    rank, core = factor
    left, right, cores = stored(rank, core, draw=lambda sizes, seed: weights(sizes, dtype, seed))
    wide = [values and [v.float() for v in values] for values in (left, right, cores)]
    w, options = weights(SHAPES, dtype), {"coefficient": 0.3, **WIDE}
    got = perturbed(w, left, right, core=cores, **options)
    assert_all_same(perturbed(w, wide[0], wide[1], core=wide[2], **options), got)


DRAWN = [(35, 70), (66, 36)]
DRAWN_CASES = [
    (torch.float32, 3, ("none", "diagonal", "full", "key")),
    (torch.float16, 3, ("none", "key")),
    (torch.bfloat16, 12, ("none", "diagonal", "key")),
    (torch.float32, 16, ("none", "full")),
    (torch.bfloat16, 16, ("none", "diagonal", "full", "key")),
    (torch.float32, 33, ("none", "key")),
    (torch.bfloat16, 33, ("none", "key")),
]


@pytest.mark.parametrize(("dtype", "rank", "core"), [(d, r, c) for d, r, cores in DRAWN_CASES for c in cores], ids=str)
def test_regenerated_factors_are_draws(dtype, rank, core):
    """Drawn on the way or stored: the same numbers, so the same bits."""
    w = weights(DRAWN, dtype)
    left = [ops.draw((m, rank), LEFT, i, backend="reference") for (m, _), i in zip(DRAWN, IDS, strict=False)]
    right = [ops.draw((n, rank), RIGHT, i, backend="reference") for (_, n), i in zip(DRAWN, IDS, strict=False)]
    cores = stored(rank, "none" if core == "key" else core, DRAWN, lambda sizes, seed: weights(sizes, seed=seed))[2]
    drawn = [ops.draw((rank, rank), CORE, i, backend="reference") for i in IDS[:2]] if core == "key" else cores
    cores = CORE if core == "key" else cores
    want = perturbed(w, left, right, core=drawn, coefficient=0.3)
    assert_all_same(perturbed(w, LEFT, RIGHT, core=cores, rank=rank, coefficient=0.3), want)
    assert_all_same(perturbed(w, LEFT, right, core=cores, coefficient=0.3), want)
    assert_all_same(perturbed(w, left, RIGHT, core=cores, coefficient=0.3), want)


@pytest.mark.parametrize(("rank", "dtype"), in_turn((5, 12, 20, 33, 65), (torch.float32, torch.bfloat16)), ids=str)
def test_each_factor_laid_bare(dtype, rank):
    """0 + 1 X: between identities the result is the factor itself."""
    zero, eye = [torch.zeros(rank, rank, dtype=dtype)], [torch.eye(rank)]
    options = {"coefficient": 1.0, "tensor_ids": IDS[1:2]}

    def drawn(key):
        return ops.draw((rank, rank), key, IDS[1], backend="reference").to(dtype)

    assert_same_bits(perturbed(zero, eye, eye, core=CORE, **options)[0], drawn(CORE))
    assert_same_bits(perturbed(zero, LEFT, eye, **options)[0], drawn(LEFT))
    assert_same_bits(perturbed(zero, eye, RIGHT, **options)[0], drawn(RIGHT).T.contiguous())


def test_keys_in_tensors():
    w = weights([(9, 7)])
    signed = [torch.tensor(key - (key >> 63 << 64)) for key in (LEFT, RIGHT, CORE)]
    want = perturbed(w, LEFT, RIGHT, core=CORE, rank=3, coefficient=0.25)
    got = perturbed(w, signed[0], signed[1], core=signed[2].view(1), rank=3, coefficient=torch.tensor([0.25]))
    assert_all_same(got, want)


@pytest.mark.parametrize("signs", [{}, {"sign_key": RIGHT}, {"sign_key": RIGHT, "sign_ids": [0, 0]}])
def test_aligned_core_has_the_bits_of_the_reference(signs):
    values = [torch.linspace(3, 0.01, rank) for rank in (1, 7)]
    options = {"tensor_ids": IDS[:2], "delta": 0.7, **signs}
    got, want = (ops.aligned_core(values, CORE, backend=b, **options) for b in ("triton", "reference"))
    assert_all_same(got, want)
