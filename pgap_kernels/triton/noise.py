"""The noise contract, version 1, as Triton functions (docs/noise_v1.md).

    words(block) = Philox4x32-7 of the counter (block lo, block hi, tensor id, 0)
    normal       = sqrt(-2 ln u) * (cos, sin)(angle) of the word pairs (x0, x1) and (x2, x3)
    element e    = group e >> 12, output lane (e >> 10) & 3, block (group << 10) | (e & 1023)

The exact tier is +, -, x, explicit fma, correctly rounded sqrt and integer operations: no libdevice, no inline
assembly, so the bits are those of the reference on every target. Compile with ``enable_fp_fusion=False``.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


class Noise(NamedTuple):
    """Constants of a draw."""

    distribution: str  # normal or rademacher
    fast: bool  # normals from NVIDIA's approximate units


@triton.jit
def mul_hi_lo(a, b: tl.constexpr):
    """High and low words of a 32 x 32 bit product; a uint64 multiplication compiles to one instruction."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox7(c0, c1, c2, k0, k1):
    """The four output words of counters (c0, c1, c2, 0) under the key (k0, k1); all uint32."""
    x0, x1, x2 = c0, c1, c2
    x3 = c2 ^ c2
    for _ in tl.static_range(7):
        high0, low0 = mul_hi_lo(x0, 0xD2511F53)
        high1, low1 = mul_hi_lo(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return x0, x1, x2, x3


@triton.jit
def box_muller(a, b):
    """Two words -> two normals (exact tier), in the operation order of docs/noise_v1.md."""
    u = ((a >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    bits = u.to(tl.int32, bitcast=True)
    i = (bits - 0x3F800000).to(tl.float32)
    s = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    h = tl.fma(s, 0.018356049433350563, -0.035056427121162415)
    h = tl.fma(h, s, 0.05750589445233345)
    h = tl.fma(h, s, -0.10655020922422409)
    h = tl.fma(h, s, 0.2118314653635025)
    h = tl.fma(h, s, -0.47113385796546936)
    square = tl.fma(i, -1.6525916635146132e-07, tl.fma(-s, s, 0.25) * h)
    radius = tl.sqrt_rn(square).to(tl.uint32, bitcast=True) ^ (b & 0x80000000)
    radius = radius.to(tl.float32, bitcast=True)
    y = (((b >> 8) & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    w = y * y
    p = tl.fma(w, 0.5577369928359985, -2.543327808380127)
    p = tl.fma(p, w, 5.16733455657959)
    p = tl.fma(p, w, -3.1415886878967285)
    q = tl.fma(w, 0.21807317435741425, -1.331023931503296)
    q = tl.fma(q, w, 4.058268070220947)
    q = tl.fma(q, w, -4.934784889221191)
    q = tl.fma(q, w, 0.9999998807907104)
    return radius * (y * p), radius * q


@triton.jit
def fast_box_muller(a, b):
    """The same two normals from NVIDIA's approximate units, |dz| <= 1e-3: the fast tier, for CUDA targets only."""
    u = ((a >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    # abs: near u = 1 the approximate logarithm may have the wrong sign.
    radius = tl.sqrt(tl.abs(1.3862943611198906 * libdevice.fast_log2f(u)))
    angle = ((b >> 8).to(tl.int32).to(tl.float32) - 8388608.0) * 3.7450702829e-07
    return -radius * libdevice.fast_cosf(angle), -radius * libdevice.fast_sinf(angle)


@triton.jit
def group_words(group, r, tensor_id, key):
    """Words of the counters r (below 1024) of one group of 4096 elements: lane l is that of element l * 1024 + r."""
    low = (group << 10).to(tl.uint32) | r.to(tl.uint32)
    high = (group >> 22).to(tl.uint32)
    return philox7(low, high, tensor_id, key.to(tl.uint32), (key >> 32).to(tl.uint32))


@triton.jit
def group_noise(group, r, tensor_id, key, NOISE: tl.constexpr):
    """z of the elements l * 1024 + r of a group, l = 0..3, as four tensors; r is a tile (rows, 8) of 8 i + j."""
    if NOISE.distribution == "rademacher":
        # Word e >> 5 of the stream of words: the 8 signs of a tile's row lie in one byte of one word.
        row = tl.arange(0, r.shape[0])[:, None]
        shift = ((row & 3) * 8 + tl.arange(0, 8)[None, :]).to(tl.uint32)
        base = (group & 31).to(tl.int32) * 128
        z0 = _signs(group, base + (row >> 2), shift, tensor_id, key)
        z1 = _signs(group, base + 32 + (row >> 2), shift, tensor_id, key)
        z2 = _signs(group, base + 64 + (row >> 2), shift, tensor_id, key)
        z3 = _signs(group, base + 96 + (row >> 2), shift, tensor_id, key)
    else:
        x0, x1, x2, x3 = group_words(group, r, tensor_id, key)
        if NOISE.fast:
            z0, z1 = fast_box_muller(x0, x1)
            z2, z3 = fast_box_muller(x2, x3)
        else:
            z0, z1 = box_muller(x0, x1)
            z2, z3 = box_muller(x2, x3)
    return z0, z1, z2, z3


@triton.jit
def _signs(group, word, shift, tensor_id, key):
    x0, x1, x2, x3 = group_words(group >> 5, word & 1023, tensor_id, key)
    lane = word >> 10
    x = tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))
    # The sign bit of -1.0 where the stream's bit is 0.
    return ((((x >> shift) & 1) ^ 1) << 31 | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def element_normal(e, tensor_id, key):
    """Exact normal number e (int64, any shape): one Philox call each, for small or irregular draws."""
    r = (e & 1023).to(tl.int32)
    x0, x1, x2, x3 = group_words(e >> 12, r, tensor_id, key)
    lane = ((e >> 10) & 3).to(tl.int32)
    even, odd = box_muller(tl.where(lane < 2, x0, x2), tl.where(lane < 2, x1, x3))
    return tl.where((lane & 1) == 0, even, odd)


@triton.jit
def element_word(e, tensor_id, key):
    """Word of element e (int64, any shape)."""
    x0, x1, x2, x3 = group_words(e >> 12, (e & 1023).to(tl.int32), tensor_id, key)
    lane = ((e >> 10) & 3).to(tl.int32)
    return tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))
