"""preconditioned_update_ and preconditioned_perturb_ on the Triton kernel: the very bits of the reference."""

import functools
import itertools
import math

import pytest
import torch
from support.agreement import SHAPES
from support.cases import IDS, KEYS, RULES, Case, perturb_arguments, update_arguments
from support.helpers import assert_all_same, clones, ops


def update(**options) -> Case:
    """A call of ``preconditioned_update_``; what it writes are weights and state."""
    build = functools.partial(update_arguments, **{"shapes": SHAPES, **options})
    return Case("preconditioned_update_", build, ("weights", "state"))


def perturb(**options) -> Case:
    """A call of ``preconditioned_perturb_``; the curvature is watched, and may not change."""
    build = functools.partial(perturb_arguments, **{"shapes": SHAPES, **options})
    return Case("preconditioned_perturb_", build, ("weights", "curvature", *(("out",) if options.get("out") else ())))


def test_a_learning_rate_for_each_tensor_or_one_for_all():
    """All tables of scalars get the width of the widest."""
    for lr, restore, decay in itertools.product(
        (0.1, [0.1, 0.2, 0.3]), (0.5, [0.5, 0.0, -0.5]), (0.0, [0.0, 0.1, 0.2])
    ):
        results = []
        for backend in ("triton", "reference"):
            w, state = [torch.ones(5) for _ in range(3)], [torch.ones(5) for _ in range(3)]
            options = {"tensor_ids": IDS[:3], "restore": [restore], "decay": decay, "backend": backend}
            ops.preconditioned_update_(w, [state], [(KEYS[0], 0.7)], ops.MomentumRule(lr), **options)
            results.append(w + state)
        assert_all_same(*results)


STATES = [0.0, -0.0, 1e-45, 1e-38, 1e-20, 1.0, 3e38, math.inf, math.nan, -1.0]


@pytest.mark.parametrize("rule", [*RULES, "perturb"])
def test_special_states(rule):
    """States that are 0, subnormal, huge, infinite, negative: divisions and roots round as the reference's."""
    results = []
    for backend in ("triton", "reference"):
        case = perturb(shapes=[(400,)]) if rule == "perturb" else update(rule=rule, shapes=[(400,)], decay=0.1)
        arguments = case.build()
        states = [arguments["curvature"]] if rule == "perturb" else arguments["state"]
        for state in states:
            state[0].copy_(torch.tensor(STATES * 40))
        getattr(ops, case.op)(**arguments, backend=backend)
        results.append([*arguments["weights"], *(t for state in states for t in state)])
    assert_all_same(*results)


@pytest.mark.parametrize("rule", RULES)
def test_state_and_weights_misaligned(rule):
    """One element off what a vector access wants: the same bits, and nothing around is written."""

    def shifted(tensors, by):
        buffers = [torch.full((t.numel() + 40,), math.nan, dtype=t.dtype) for t in tensors]
        return [b[by : by + t.numel()].view(t.shape).copy_(t) for b, t in zip(buffers, tensors, strict=True)], buffers

    plain = update_arguments(rule, torch.bfloat16, shapes=[(4100,)], rounding="stochastic")
    apart = update_arguments(rule, torch.bfloat16, shapes=[(4100,)], rounding="stochastic")
    apart["weights"], buffers = shifted(apart["weights"], 17)
    moved = [shifted(state, 16 if i else 19) for i, state in enumerate(apart["state"])]
    apart["state"] = [views for views, _ in moved]
    ops.preconditioned_update_(**plain, backend="triton")
    ops.preconditioned_update_(**apart, backend="triton")
    for got, want in zip([apart["weights"], *apart["state"]], [plain["weights"], *plain["state"]], strict=True):
        assert_all_same(got, want)
    for (buffer,) in [buffers, *(around for _, around in moved)]:
        assert buffer.isnan().sum() == 40


def test_perturb_by_a_curvature_of_one_is_the_dense_pass():
    arguments = perturb_arguments(torch.float16, shapes=SHAPES, rounding="stochastic", decay=0.1)
    arguments["curvature"] = [torch.ones_like(h) for h in arguments["curvature"]]
    dense = {name: value for name, value in arguments.items() if name != "curvature"}
    dense["weights"] = clones(dense["weights"])
    ops.preconditioned_perturb_(**arguments, backend="triton")
    ops.dense_perturb_(**dense, backend="triton")
    assert_all_same(arguments["weights"], dense["weights"])
