"""The noise contract, version 1, as Triton functions (docs/noise_v1.md).

    words(block) = Philox4x32-7 of the counter (block lo, block hi, tensor id, 0)
    normal       = sqrt(-2 ln u) * (cos, sin)(angle) of the word pairs (x0, x1) and (x2, x3)

Only +, -, x, explicit fma, correctly rounded sqrt and integer operations: no libdevice, no inline assembly, so the
bits are those of the reference on every target. Compile with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl


@triton.jit
def _wide(a, b: tl.constexpr):
    """High and low words of a 32 x 32 bit product; written as one uint64 multiply it becomes one instruction."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox7(c0, c1, c2, k0, k1):
    """The four output words of counters (c0, c1, c2, 0) under the key (k0, k1); all uint32."""
    x0, x1, x2 = c0, c1, c2
    x3 = c2 ^ c2
    for _ in tl.static_range(7):
        high0, low0 = _wide(x0, 0xD2511F53)
        high1, low1 = _wide(x2, 0xCD9E8D57)
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
