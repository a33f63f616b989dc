"""How a new weight is made from the old one and rounded to its dtype, by the noise contract (docs/noise_v1.md)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted

# Triton's interpreter truncates to bfloat16, where compiled code rounds; under it the rounding is done on the bits.
INTERPRETED = tl.constexpr(interpreted())
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Update(NamedTuple):
    """Constants of a kernel that writes weights."""

    dtype: tl.dtype
    decay: bool  # some weight may have a decay
    stochastic: bool  # stochastic rounding; else to nearest


def update_of(weight: Tensor, decay: Tensor | None, rounding_keys: Tensor | None) -> Update:
    """A decay on the device may be anything; rounding to float32 is to nearest."""
    decays = decay is not None and (decay.device == weight.device or bool(decay.any()))
    return Update(TYPES[weight.dtype], decays, rounding_keys is not None and weight.dtype != torch.float32)


@triton.jit
def negative_zero():
    """-0.0, to which adding any x gives x. Triton makes +0.0 of a literal -0.0."""
    return tl.full((), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def add_delta(w, delta, decay, UPDATE: tl.constexpr):
    """W + delta - decay W, in float32."""
    if UPDATE.decay:
        if decay != 0:
            delta = tl.fma(w, -decay, delta)
    return w + delta


@triton.jit
def round_to(value, TYPE: tl.constexpr):
    """To the nearest value of the type, ties to even."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        result = tl.where(value == value, up, 0x7FC0).to(tl.uint16).to(TYPE, bitcast=True)
    else:
        result = value.to(TYPE)
    return result


@triton.jit
def stochastic(value, word, TYPE: tl.constexpr):
    """Away from zero iff the top 16 bits s of the word give s 2^-16 < (|v| - lo) / (hi - lo), compared exactly.

    The result is a value of the type, still as float32.
    """
    if TYPE == tl.float32:
        result = value
    else:
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        s = word >> 16
        if TYPE == tl.bfloat16:  # the dropped half is the fraction, for normal and subnormal values alike
            up = tl.where(s < (bits & 0xFFFF), 0x10000, 0).to(tl.uint32)
            chosen = ((bits & 0xFFFF0000) + up).to(tl.float32, bitcast=True)
            beyond = magnitude > 0x7F7F0000
        else:
            up = tl.where(s < ((magnitude & 0x1FFF) << 3), 0x2000, 0).to(tl.uint32)
            normal = ((bits & 0xFFFFE000) + up).to(tl.float32, bitcast=True)
            # Below 2^-14 half precision has a fixed step; the quotient by it is exact.
            units = tl.minimum(magnitude.to(tl.float32, bitcast=True), 1.0) * 16777216.0
            whole = units.to(tl.int32).to(tl.float32)
            up_small = tl.where(s.to(tl.int32).to(tl.float32) * 1.52587890625e-05 < units - whole, 1.0, 0.0)
            small = ((whole + up_small) * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | (bits & 0x80000000)
            chosen = tl.where(magnitude >= 0x38800000, normal, small.to(tl.float32, bitcast=True))
            beyond = magnitude > 0x477FE000
        result = tl.where(beyond, round_to(value, TYPE).to(tl.float32), chosen)
    return result
