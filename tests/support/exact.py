"""float32 arithmetic on fractions, where every rounding is visible."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def round32(x: Fraction) -> Fraction:
    """To the nearest float32, ties to even."""
    near = np.float32(float(x))
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    best = min(candidates, key=lambda c: (abs(Fraction(float(c)) - x), int(c.view(np.uint32)) & 1))
    return Fraction(float(best))


def scalar32(x: float) -> Fraction:
    """A float as the ops take it."""
    return Fraction(float(np.float32(x)))


def exact_dense(w: float, zs: list[float], coefficients: list[float], decay: float) -> float:
    """delta = a_1 z_1, fma(a_j, z_j, delta), fma(-d, w, delta) if d != 0, w + delta: each rounded to float32."""
    a = [scalar32(c) for c in coefficients]
    delta = round32(a[0] * Fraction(zs[0]))
    for c, z in zip(a[1:], zs[1:], strict=True):
        delta = round32(c * Fraction(z) + delta)
    if decay:
        delta = round32(-scalar32(decay) * Fraction(w) + delta)
    return float(round32(Fraction(w) + delta))
