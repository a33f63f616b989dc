"""W <- W - d W + sum_j a_j z(key_j), masked or not; formulas and order in ``ops.dense``."""

from __future__ import annotations

import torch

from ..arguments import AssembleArguments, DenseArguments, MaskedArguments
from .layout import column, ints, rounded, runs
from .noise import fma, noise, words


def combination(draws, begin, count, tensor_id, distribution, device):
    """sum_j a_j z(key_j) of (key, a) pairs: the first a product, then fma in list order."""
    delta = torch.zeros(count, dtype=torch.float32, device=device)
    for j, (key, a) in enumerate(draws):
        z = noise(begin, count, tensor_id, key, distribution, device)
        delta = fma(a, z, delta) if j else a * z
    return delta


def decayed(weight, delta, d):
    """W + delta - d W in float32."""
    return weight + (fma(-d, weight, delta) if d != 0 else delta)


def dense_perturb_(weights, out, arguments: DenseArguments):
    """Stage by stage; each rounds as if it were a pass of its own."""
    device, stages, tensor_ids, slices = weights[0].device, arguments.stages, arguments.tensor_ids, arguments.slices
    keys, rounding_keys = arguments.keys.tolist(), ints(arguments.rounding_keys)
    coefficients, decay = arguments.coefficients.to(device), arguments.decay.to(device)
    for t, (source, target) in enumerate(zip(weights, out, strict=True)):
        a, d = coefficients[:, column(coefficients, t)], decay[:, column(decay, t)]
        draws = list(zip(keys, a, strict=True))
        for begin, count, (value, written) in runs([source, target], *slices[2 * t : 2 * t + 2]):
            first = 0
            for stage, size in enumerate(stages):
                own = draws[first : first + size]
                delta = combination(own, begin, count, tensor_ids[t], arguments.distribution, device)
                first += size
                key = None if rounding_keys is None else rounding_keys[stage]
                value = rounded(decayed(value.float(), delta, d[stage]), target, key, begin, tensor_ids[t])
            written.copy_(value)


def assemble_gradient_(gradients, arguments: AssembleArguments):
    """G <- sum_j c_j z(key_j), float32."""
    device, tensor_ids, slices = gradients[0].device, arguments.tensor_ids, arguments.slices
    keys, coefficients = arguments.keys.tolist(), arguments.coefficients.to(device)
    for t, target in enumerate(gradients):
        draws = list(zip(keys, coefficients[:, column(coefficients, t)], strict=True))
        for begin, count, (written,) in runs([target], *slices[2 * t : 2 * t + 2]):
            written.copy_(combination(draws, begin, count, tensor_ids[t], arguments.distribution, device))


def masked_perturb_(weights, out, arguments: MaskedArguments):
    """The same with delta = -0 where the mask does not keep: adding it leaves every W as it is."""
    device, tensor_ids, slices = weights[0].device, arguments.tensor_ids, arguments.slices
    keys, rounding_key = arguments.keys.tolist(), ints(arguments.rounding_key)
    coefficients, decay = arguments.coefficients.to(device), arguments.decay.to(device)
    level = arguments.mask_level.to(device)
    for t, (source, target) in enumerate(zip(weights, out, strict=True)):
        draws = list(zip(keys, coefficients[:, column(coefficients, t)], strict=True))
        limit, done = level[0, column(level, t)], 0
        for begin, count, (value, written) in runs([source, target], *slices[2 * t : 2 * t + 2]):
            weight = value.float()
            if arguments.mask == "threshold":
                keep = weight.abs() <= limit
            elif arguments.mask == "share":
                keep = words(begin, count, tensor_ids[t], int(arguments.mask_key), device) < limit
            else:
                element = torch.arange(done, done + count, device=device)
                keep = (arguments.mask_bits[t][element >> 5] >> (element & 31) & 1) != 0
            done += count
            delta = combination(draws, begin, count, tensor_ids[t], arguments.distribution, device)
            delta = torch.where(keep, delta, -0.0)
            key = None if rounding_key is None else rounding_key[0]
            total = decayed(weight, delta, decay[0, column(decay, t)])
            written.copy_(rounded(total, target, key, begin, tensor_ids[t]))
