"""State and weights in one pass; rules and their scalars in ``ops.preconditioned``."""

from __future__ import annotations

import torch

from ..arguments import PreconditionedArguments
from .dense import combination, decayed
from .layout import column, ints, rounded, runs
from .noise import fma


def _sqrt(x):
    return x.double().sqrt().float()  # torch's float32 sqrt is not correctly rounded


def _delta(rule, scalars, states, z, g, b):
    """delta and the new states, in the kernels' order of operations; z is the last draw."""
    if rule == "perturb":
        return b / _sqrt(states[0]), states
    if rule == "around":
        return fma(scalars[0], states[0], b), states
    if rule == "momentum":
        lr, beta = scalars
        m = fma(beta, states[0], g)
        return fma(-lr, m, b), [m]
    if rule == "adam":
        lr, beta1, rest1, beta2, rest2, correction, eps = scalars
        m = fma(beta1, states[0], rest1 * g)
        v = fma(beta2, states[1], rest2 * (g * g))
        return fma(-lr, m / (_sqrt(v * correction) + eps), b), [m, v]
    if rule == "hizoo":
        lr, rest, growth = scalars
        h = states[0]
        new = fma(growth * h, z * z, rest * h)
        return fma(-lr, g / _sqrt(new), b / _sqrt(h)), [new]
    if rule == "adamu":
        step, back, sign, beta1, rest1, beta2, rest2, eps = scalars
        y = states[0] + b
        m, v = fma(beta1, g, rest1 * y), fma(beta2, g * g, rest2 * (y * y))
        return fma(-step, m / _sqrt(v + eps), back * m), [sign * m]
    lr, beta1, anneal, gamma, floor, eps, beta2, rest2 = scalars
    m = fma(beta1, states[0], anneal * g)
    h = fma(beta2, states[1], rest2 * (g * g)) if rule == "helene_refresh" else states[1]
    scale = fma(gamma, torch.where(h > floor, h, floor), eps)
    return fma(-lr, m / scale, b), [m, h]


def preconditioned_(weights, out, state0, state1, arguments: PreconditionedArguments):
    """g, b, then the rule, then decay and one rounding."""
    device, tensor_ids, slices = weights[0].device, arguments.tensor_ids, arguments.slices
    keys, rounding_key = arguments.keys.tolist(), ints(arguments.rounding_key)
    given = (arguments.gradient, arguments.restore, arguments.scalars, arguments.decay)
    gradient, restore, scalars, decay = (x.to(device) for x in given)
    for t in range(len(weights)):
        tensors = [weights[t], out[t], state0[t], *(state1[t : t + 1])]
        own = [row[column(scalars, t)] for row in scalars]
        pairs = [list(zip(keys, x[:, column(x, t)], strict=True)) for x in (gradient, restore)]
        for begin, count, (value, written, *states) in runs(tensors, *slices[2 * t : 2 * t + 2]):
            where = (begin, count, tensor_ids[t], arguments.distribution, device)
            g, b = combination(pairs[0], *where), combination(pairs[1], *where)
            z = combination([(keys[-1], 1.0)], *where)
            weight = value.float()
            delta, new = _delta(arguments.rule, own, states, z, g, b)
            total = decayed(weight, delta, decay[0, column(decay, t)])
            key = None if rounding_key is None else rounding_key[0]
            written.copy_(rounded(total, written, key, begin, tensor_ids[t]))
            for state, updated in zip(states, new, strict=True):
                if updated is not state:
                    state.copy_(updated)
