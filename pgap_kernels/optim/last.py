"""What the last step of an optimizer saw."""

from __future__ import annotations

import math
from typing import NamedTuple

from .signal import Signal


class LastStep(NamedTuple):
    """What a step saw, on the host; as before any step by default.

    Attributes:
        loss: what ``step`` returned: the mean at the perturbed weights, NaN if the step was skipped.
        losses: at every point, in the order of the forwards, those of a refresh included; of each group of
            examples where there are ``groups``.
        rho: the slope along each direction of the step, (L+ - L-) / (2 eps) or a one-sided difference / eps, with the
            eps of the first weight. Empty for methods that only rank or scale losses.
        refreshed: whether the method made new subspaces, or a new estimate of curvature, in this step.
        skipped: whether the step was skipped for a loss that is not finite; ``losses`` has it.
        signal: what the losses say about the gradient, where they were losses per row.
    """

    loss: float = math.nan
    losses: tuple[float, ...] = ()
    rho: tuple[float, ...] = ()
    refreshed: bool = False
    skipped: bool = False
    signal: Signal = Signal()
