"""From losses to coefficients: pure functions of the losses of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spsa(plus: float, minus: float, eps: float) -> float:
    """rho = (L+ - L-) / (2 eps), the projected gradient of a two-sided pair."""
    return (plus - minus) / (2 * eps)


def leave_one_out(losses: Sequence[float], eps: float) -> list[float]:
    """(L_k - mean L) / ((K - 1) eps) of K one-sided losses: each has the mean of the others as its baseline (RLOO)."""
    mean = math.fsum(losses) / len(losses)
    return [(loss - mean) / ((len(losses) - 1) * eps) for loss in losses]


def standardised(losses: Sequence[float], base: float | None = None, ddof: int = 0) -> list[float]:
    """(L_k - base) / std of the losses, the base being their mean by default; zeros where all are equal."""
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - ddof)
    if variance == 0:
        return [0.0] * len(losses)
    return [(loss - (mean if base is None else base)) / math.sqrt(variance) for loss in losses]


def centred(losses: Sequence[float], variance_floor: float | None = None) -> list[float]:
    """L_k - mean L, divided by sqrt(var L + floor) where a floor is given."""
    mean = math.fsum(losses) / len(losses)
    scale = 1.0
    if variance_floor is not None:
        scale = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / len(losses) + variance_floor)
    return [(loss - mean) / scale for loss in losses]


def top_minus_rest(losses: Sequence[float], top: int) -> list[float]:
    """+1/top for the ``top`` smallest losses, -1/(M - top) for the others; ties go to the lower index (MeZO-GV)."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    best = {*order[:top]}
    return [1 / top if i in best else -1 / (len(losses) - top) for i in range(len(losses))]


def best_only(losses: Sequence[float]) -> list[float]:
    """1 for the smallest loss, 0 for the others; ties go to the lower index (MeZO-Greedy)."""
    best = min(range(len(losses)), key=losses.__getitem__)
    return [float(i == best) for i in range(len(losses))]
