"""What the losses of a step say about the gradient, for free, and a step size that follows from it.

g the gradient of the mean loss, Sigma the covariance of the examples' gradients, H the Hessian of the mean loss.
Each estimate is unbiased up to O(eps^2), for directions of identity covariance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WINDOW = 50  # steps of the moving averages
_FLOOR = 0.1


class Signal(NamedTuple):
    """Estimates from one step; None if its points do not determine them.

    Of the gradient as the directions see it, <D, g> for D: where these lie in a subspace or have another scale than
    dense noise (LOZO's u v^T has r times its variance), so do the estimates.

    Attributes:
        squared_norm: |g|^2, where a direction is shared by two examples or more.
        trace: tr Sigma, likewise.
        second_moment: E |g_i|^2 = |g|^2 + tr Sigma, i counting the losses that the closure returned: where these are
            means of groups of b examples, tr Sigma / b.
        curvature: tr H, where W itself was evaluated. From one-sided differences, so the slope along the direction
            stays in it as noise, 2 |g| / eps large: hundreds of steps say little of it.
    """

    squared_norm: float | None = None
    trace: float | None = None
    second_moment: float | None = None
    curvature: float | None = None


def signal_of(rows: Tensor, groups: int, baseline: str, eps: float) -> Signal:
    """The estimates from the losses of every example at every point.

    Args:
        rows: (copies, examples), an example in the same column of every copy.
        groups: of examples that share their directions.
        baseline: as in ``Sampling``.
        eps: the smoothing radius.
    """
    f = rows.double().view(len(rows), groups, -1)
    examples, curvature = f.shape[-1], None
    if baseline == "antithetic":  # rho_i of each pair and example
        rho = (f[::2] - f[1::2]) / (2 * eps)
        products = rho[..., :, None] * rho[..., None, :]
    else:  # covariances over the directions of a group
        tried = f if baseline == "loo" else f[:-1]
        if len(tried) < 2:
            return Signal()
        curvature = float(2 * (tried - f[-1]).mean() / eps**2) if baseline == "clean" else None
        centred = (tried - tried.mean(0)) / eps
        products = torch.einsum("kgi,kgj->gij", centred, centred)[None] / (len(tried) - 1)
    diagonal = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    second_moment = float(diagonal.mean() / examples)
    if examples < 2:
        return Signal(second_moment=second_moment, curvature=curvature)
    squared_norm = float((products.sum((-2, -1)) - diagonal).mean() / (examples * (examples - 1)))
    return Signal(squared_norm, second_moment - squared_norm, second_moment, curvature)


class SignalRule:
    """eta_t = eta_0 s_t / s_0,  s = |g|^2 / (|g|^2 + tr Sigma) from moving averages, within [floor, 1] of eta_0.

    A step size that falls as the signal gives way to noise. s_0 is the first above 0 after ``window`` measured steps.
    """

    def __init__(self, window: int = _WINDOW, floor: float = _FLOOR) -> None:
        self.window, self.floor = window, floor
        self.steps, self.first = 0, 0.0
        self.squared_norm = self.second_moment = 0.0

    def note(self, signal: Signal) -> None:
        """Take in a step's estimates."""
        if signal.squared_norm is None or signal.second_moment is None:
            return
        self.steps += 1
        share = 1 / min(self.steps, self.window)  # a plain mean at first
        self.squared_norm += share * (signal.squared_norm - self.squared_norm)
        self.second_moment += share * (signal.second_moment - self.second_moment)
        if self.steps >= self.window and self.first <= 0:  # so far noise alone may have been seen
            self.first = self._ratio()

    def _ratio(self) -> float:
        if self.second_moment <= 0:
            return 0.0
        return min(max(self.squared_norm / self.second_moment, 0.0), 1.0)

    @property
    def factor(self) -> float:
        """eta_t / eta_0; 1 until ``window`` steps have been measured."""
        if self.steps < self.window or self.first <= 0:
            return 1.0
        return min(max(self._ratio() / self.first, self.floor), 1.0)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    def load(self, state: dict[str, float]) -> None:
        """Inverse of ``state``."""
        vars(self).update(state)
