"""The noise contract in plain PyTorch, bit for bit: fma is emulated, square roots go through float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import KEY_INCREMENTS, MASK32, MULTIPLIERS, ROUNDS

# Coefficients of docs/noise_v1.md, highest power first; every one is a float32.
_LOG = (
    0.018356049433350563,
    -0.035056427121162415,
    0.05750589445233345,
    -0.10655020922422409,
    0.2118314653635025,
    -0.47113385796546936,
)
_LOG_SCALE = -1.6525916635146132e-07
_SIN = (0.5577369928359985, -2.543327808380127, 5.16733455657959, -3.1415886878967285)
_COS = (0.21807317435741425, -1.331023931503296, 4.058268070220947, -4.934784889221191, 0.9999998807907104)


def fma(a: Tensor | float, b: Tensor, c: Tensor | float) -> Tensor:
    """Correctly rounded a * b + c in float32: exact product in float64, the sum rounded to odd, then to float32.

    Rounded to odd, the float64 sum still tells on which side of a float32 tie the exact sum lies.
    """
    product = b.double() * a if isinstance(a, float) else b.double() * a.double()
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    odd = bits + torch.where(inexact, torch.where(away, 1, -1), 0)
    return odd.view(torch.float64).float()


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = fma(coefficients[0], x, coefficients[1])
    for coefficient in coefficients[2:]:
        value = fma(value, x, coefficient)
    return value


def _float_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of 32-bit words (held in int64) -> the two normals of each pair, float32."""
    u = _float_bits((a >> 9) | 0x3F800000) - 0.999999940395355224609375
    bits = u.view(torch.int32)
    i = (bits - 0x3F800000).float()
    s = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32) - 1.5
    square = fma(_LOG_SCALE, i, fma(-s, s, 0.25) * _horner(s, _LOG))
    radius = square.double().sqrt().float()  # torch's float32 sqrt is not correctly rounded
    radius = torch.where(b >= 1 << 31, -radius, radius)
    y = _float_bits(((b >> 8) & 0x007FFFFF) | 0x3F800000) - 1.5
    w = y * y
    return radius * (y * _horner(w, _SIN)), radius * _horner(w, _COS)


def philox(c0: Tensor, c1: Tensor, tensor_id: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 of counters (c0, c1, tensor_id, 0); words are held in int64."""
    x0, x1 = c0, c1
    x2, x3 = torch.full_like(c0, tensor_id), torch.zeros_like(c0)
    k0, k1 = key & MASK32, key >> 32 & MASK32
    for _ in range(ROUNDS):
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]  # wraps modulo 2**64, which leaves both words correct
        x0, x1, x2, x3 = (p1 >> 32 & MASK32) ^ x1 ^ k0, p1 & MASK32, (p0 >> 32 & MASK32) ^ x3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return x0, x1, x2, x3


def _group_words(begin: int, count: int, tensor_id: int, key: int, device: torch.device) -> tuple[tuple, int]:
    """Words of the whole groups that hold elements begin .. begin+count, as four (groups, 1024) lanes, and the skip."""
    first, last = begin >> 12, (begin + count - 1) >> 12
    group = torch.arange(first, last + 1, device=device, dtype=torch.int64)[:, None]
    r = torch.arange(1024, device=device, dtype=torch.int64)[None, :]
    c0, c1 = (group << 10 & MASK32) | r, (group >> 22).expand(-1, 1024)
    return philox(c0, c1, tensor_id, key), begin - (first << 12)


def words(begin: int, count: int, tensor_id: int, key: int, device: torch.device) -> Tensor:
    """The 32-bit word of each element begin .. begin+count, in int64."""
    lanes, skip = _group_words(begin, count, tensor_id, key, device)
    return torch.stack(lanes, dim=1).flatten()[skip : skip + count]


def noise(begin: int, count: int, tensor_id: int, key: int, distribution: str, device: torch.device) -> Tensor:
    """z of the logical elements begin .. begin+count, float32."""
    if distribution == "rademacher":
        first = begin >> 5
        packed = words(first, ((begin + count - 1) >> 5) - first + 1, tensor_id, key, device)
        bits = packed[:, None] >> torch.arange(32, device=device) & 1
        return (2.0 * bits - 1.0).float().flatten()[begin & 31 : (begin & 31) + count]
    (x0, x1, x2, x3), skip = _group_words(begin, count, tensor_id, key, device)
    lanes = (*box_muller(x0, x1), *box_muller(x2, x3))
    return torch.stack(lanes, dim=1).flatten()[skip : skip + count]


def stochastic_round(value: Tensor, word: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to ``dtype``: up in magnitude iff word's top 16 bits * 2**-16 < (|v| - lo) / (hi - lo)."""
    nearest = value.to(dtype)
    if dtype == torch.float32:
        return nearest
    magnitude = value.abs().double()
    low = value.abs().to(dtype)
    low = torch.where(low.double() > magnitude, (low.view(torch.int16) - 1).view(dtype), low)
    high = (low.view(torch.int16) + 1).view(dtype)
    fraction = (magnitude - low.double()) / (high.double() - low.double())
    up = (word >> 16).double() * 2.0**-16 < fraction
    rounded = torch.where(up, high, low).copysign(value.to(dtype))
    return torch.where(magnitude <= torch.finfo(dtype).max, rounded, nearest)
