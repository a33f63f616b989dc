"""What several methods use: points, sums of draws, the two-sided estimate, the step, an orthonormal basis."""

from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Loss = Callable[[Weights], float]
State = dict


def perturbed(weights: Weights, direction: Weights, amount: float) -> Weights:
    """W + amount D."""
    return {name: w + amount * direction[name] for name, w in weights.items()}


def combined(coefficients: list[float], draws: list[Weights]) -> Weights:
    """sum_i c_i z_i."""
    pairs = list(zip(coefficients, draws, strict=True))
    return {name: torch.stack([c * draw[name] for c, draw in pairs]).sum(0) for name in draws[0]}


def two_sided(loss: Loss, weights: Weights, direction: Weights, eps: float) -> float:
    """rho = (L(W + eps D) - L(W - eps D)) / (2 eps), SPSA (Spall, 1992)."""
    plus = loss(perturbed(weights, direction, eps))
    minus = loss(perturbed(weights, direction, -eps))
    return (plus - minus) / (2 * eps)


def descend(weights: Weights, update: Weights, lr: float, weight_decay: float = 0.0) -> Weights:
    """W <- (1 - lr wd) W - lr update; tensors of fewer than two dimensions (biases, norms) do not decay."""
    decay = {name: lr * weight_decay if w.dim() >= 2 else 0.0 for name, w in weights.items()}
    return {name: (1 - decay[name]) * w - lr * update[name] for name, w in weights.items()}


def orthonormal(matrix: Tensor) -> Tensor:
    """The Q of QR with R's diagonal >= 0, which makes it unique."""
    Q, R = torch.linalg.qr(matrix)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
