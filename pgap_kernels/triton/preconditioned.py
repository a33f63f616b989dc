"""Weights and their state in one read and one write; rules and scalars in ``ops.preconditioned``.

g = sum_j c_j z_j estimates the gradient, b = sum_j r_j z_j takes the perturbation off
new state and delta by the rule;  delta = fma(-d, W, delta) if d != 0
W <- round(W + delta)
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import PreconditionedArguments
from .cache import broadcast_scalars, counter_table, keys_on, to_device_cached
from .config import FOUR_EACH
from .guard import guard
from .launch import launch, noise_on
from .noise import group_words
from .rounding import add_delta, negative_zero, stochastic, update_of
from .table import EXTRA0, EXTRA1, IN, OUT, dense_table
from .tiles import BLOCK, address, counters, load_lane, locate, pick_lane, store_lane, tile_noise, unstack

STATE0, STATE1 = EXTRA0, EXTRA1


class PreconditionedScalars(NamedTuple):
    """Keys, and tables of scalars with a column for each tensor."""

    keys: Tensor
    gradient: Tensor  # c, a row for each draw
    restore: Tensor  # r, a row for each draw
    rule: Tensor  # the rule's scalars, a row for each
    decay: Tensor  # d, one row
    rounding_key: Tensor | None


@triton.jit
def apply_rule(tile, lane, z, g, b, place0, place1, scalars_ptr, stride, RULE: tl.constexpr):
    """delta of one lane; its state, at two addresses, is read and written.

    The i-th scalar, in the order of the rule's ``scalars()``, is at ``scalars_ptr + i * stride``.
    """
    state0 = load_lane(tile, place0, lane, tl.float32)
    if RULE == "perturb":
        delta = tl.div_rn(b, tl.sqrt_rn(state0))
    elif RULE == "around":
        delta = tl.fma(state0, tl.load(scalars_ptr), b)
    elif RULE == "adamu":
        y = state0 + b
        m = tl.fma(g, tl.load(scalars_ptr + 3 * stride), tl.load(scalars_ptr + 4 * stride) * y)
        v = tl.fma(g * g, tl.load(scalars_ptr + 5 * stride), tl.load(scalars_ptr + 6 * stride) * (y * y))
        quotient = tl.div_rn(m, tl.sqrt_rn(v + tl.load(scalars_ptr + 7 * stride)))
        delta = tl.fma(quotient, -tl.load(scalars_ptr), tl.load(scalars_ptr + stride) * m)
        state0 = tl.load(scalars_ptr + 2 * stride) * m
    elif RULE == "momentum":
        state0 = tl.fma(state0, tl.load(scalars_ptr + stride), g)
        delta = tl.fma(state0, -tl.load(scalars_ptr), b)
    elif RULE == "hizoo":
        scaled = tl.load(scalars_ptr + 2 * stride) * state0
        new = tl.fma(scaled, z * z, tl.load(scalars_ptr + stride) * state0)
        delta = tl.fma(tl.div_rn(g, tl.sqrt_rn(new)), -tl.load(scalars_ptr), tl.div_rn(b, tl.sqrt_rn(state0)))
        state0 = new
    else:
        state0 = tl.fma(state0, tl.load(scalars_ptr + stride), tl.load(scalars_ptr + 2 * stride) * g)
        state1 = load_lane(tile, place1, lane, tl.float32)
        if RULE == "adam":
            state1 = tl.fma(state1, tl.load(scalars_ptr + 3 * stride), tl.load(scalars_ptr + 4 * stride) * (g * g))
            divisor = tl.sqrt_rn(state1 * tl.load(scalars_ptr + 5 * stride)) + tl.load(scalars_ptr + 6 * stride)
        else:
            if RULE == "helene_refresh":
                state1 = tl.fma(state1, tl.load(scalars_ptr + 6 * stride), tl.load(scalars_ptr + 7 * stride) * (g * g))
            floor = tl.load(scalars_ptr + 4 * stride)
            raised = tl.where(state1 > floor, state1, floor)
            divisor = tl.fma(raised, tl.load(scalars_ptr + 3 * stride), tl.load(scalars_ptr + 5 * stride))
        delta = tl.fma(tl.div_rn(state0, divisor), -tl.load(scalars_ptr), b)
        if RULE != "helene":  # which only reads h
            store_lane(tile, place1, lane, state1, tl.float32)
    if RULE != "perturb" and RULE != "around":  # which only read it
        store_lane(tile, place0, lane, state0, tl.float32)
    return delta


@triton.jit(do_not_specialize=["draws", "stride"])
def preconditioned_kernel(
    table,
    skip_ptr,
    counters_ptr,
    scalars,
    draws,
    stride,  # columns of the tables of scalars
    NOISE: tl.constexpr,
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """One tile of one tensor; formula at the top of the file."""
    tile = locate(table)
    if tl.load(skip_ptr) != 0:
        return
    counter = counters(counters_ptr)
    # Addresses are computed before the first store: after one, the compiler would read the table again.
    place0 = address(tile, STATE0, tl.float32)
    place1 = place0  # not used by rules with one state
    if RULE == "adam" or RULE == "helene" or RULE == "helene_refresh":
        place1 = address(tile, STATE1, tl.float32)
    source, target = address(tile, IN, UPDATE.dtype), address(tile, OUT, UPDATE.dtype)
    decay = tl.load(scalars.decay + tile.scalar)
    g = tl.full((BLOCK // 8, 8, 2, 2), negative_zero(), tl.float32)  # +0 + -0 would be +0
    b, z = g, g
    for j in range(draws):
        z = tile_noise(tile, counter, tl.load(scalars.keys + j), NOISE)
        g = tl.fma(z, tl.load(scalars.gradient + j * stride + tile.scalar), g)
        b = tl.fma(z, tl.load(scalars.restore + j * stride + tile.scalar), b)
    g0, g1, g2, g3 = unstack(g)
    b0, b1, b2, b3 = unstack(b)
    z0, z1, z2, z3 = unstack(z)  # for HiZOO, which has one draw
    x0, x1, x2, x3 = counter, counter, counter, counter  # placeholders: read only if rounding is stochastic
    if UPDATE.stochastic:
        x0, x1, x2, x3 = group_words(tile.group, counter, tile.tensor_id, tl.load(scalars.rounding_key))
    for lane in range(4):
        z_g_b = (pick_lane(lane, z0, z1, z2, z3), pick_lane(lane, g0, g1, g2, g3), pick_lane(lane, b0, b1, b2, b3))
        delta = apply_rule(tile, lane, *z_g_b, place0, place1, scalars.rule + tile.scalar, stride, RULE)
        value = add_delta(load_lane(tile, source, lane, UPDATE.dtype), delta, decay, UPDATE)
        if UPDATE.stochastic:
            value = stochastic(value, pick_lane(lane, x0, x1, x2, x3), UPDATE.dtype)
        store_lane(tile, target, lane, value, UPDATE.dtype)


def preconditioned_(weights, out, state0, state1, arguments: PreconditionedArguments):
    """``ops.preconditioned_update_`` and ``ops.preconditioned_perturb_`` in one launch."""
    device, decay = weights[0].device, arguments.decay
    given = (arguments.gradient, arguments.restore, arguments.scalars, decay)
    (gradient, restore, rule, decays), per_tensor = broadcast_scalars(device, *given)
    table = dense_table(out, weights, arguments.tensor_ids, arguments.slices, per_tensor, state0, state1)
    keys = to_device_cached(device, arguments.keys)
    launch(
        preconditioned_kernel,
        table.programs,
        device,
        FOUR_EACH,
        table=table.pointers,
        skip_ptr=guard(device, *given),
        counters_ptr=counter_table(device),
        scalars=PreconditionedScalars(keys, gradient, restore, rule, decays, keys_on(device, arguments.rounding_key)),
        draws=len(keys),
        stride=gradient.shape[1],
        NOISE=noise_on(device, arguments.distribution, arguments.tier),
        RULE=arguments.rule,
        UPDATE=update_of(weights[0], decay, arguments.rounding_key),
    )
