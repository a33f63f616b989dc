"""From losses to coefficients: pure functions of the losses of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spsa(plus: float, minus: float, eps: float) -> float:
    """rho = (L+ - L-) / (2 eps), the projected gradient of a two-sided pair."""
    return (plus - minus) / (2 * eps)


def centred(losses: Sequence[float]) -> list[float]:
    """L_k - mean L."""
    mean = math.fsum(losses) / len(losses)
    return [loss - mean for loss in losses]


def leave_one_out(losses: Sequence[float]) -> list[float]:
    """(L_k - mean L) / (K - 1) of K one-sided losses: 1/K of how each differs from the mean of the others (RLOO)."""
    return [difference / (len(losses) - 1) for difference in centred(losses)]


def standardised(losses: Sequence[float], base: float | None = None, ddof: int = 0, floor: float = 0.0) -> list[float]:
    """(L_k - base) / sqrt(var L + floor), the base being the mean by default; zeros where that root is 0."""
    differences = centred(losses)
    variance = math.fsum(d**2 for d in differences) / (len(losses) - ddof) + floor
    same = min(losses) == max(losses)  # whose mean may differ from them in its last bit
    if variance == 0 or (same and floor == 0):
        return [0.0] * len(losses)
    if base is not None:
        differences = [loss - base for loss in losses]
    return [d / math.sqrt(variance) for d in differences]


def top_minus_rest(losses: Sequence[float], top: int) -> list[float]:
    """+1/top for the ``top`` smallest losses, -1/(M - top) for the others; ties go to the lower index (MeZO-GV)."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    best = {*order[:top]}
    return [1 / top if i in best else -1 / (len(losses) - top) for i in range(len(losses))]


def best_only(losses: Sequence[float]) -> list[float]:
    """1 for the smallest loss, 0 for the others; ties go to the lower index (MeZO-Greedy)."""
    best = min(range(len(losses)), key=losses.__getitem__)
    return [float(i == best) for i in range(len(losses))]
