"""AGZO (2601.17261): perturbations in the row space of a layer's inputs.

    H (n x tokens): the layer's inputs in the forward at W; Omega (tokens x r) Gaussian
    A = qr(H Omega), then K times A <- qr(H (H^T A))
    D = R A^T on linear layers' weights, R (m x r) Gaussian, unscaled; dense noise z on the rest
    g = (L(W + mu D) - L(W)) / mu,  W <- (1 - lr wd) W - lr g D

``sides=2`` takes the two-sided estimate instead (third-party); the forward that captures H is then not counted here.
"""

from torch import Tensor

from .common import Loss, State, Weights, descend, orthonormal, perturbed, two_sided


def basis(H: Tensor, omega: Tensor, iterations: int = 3) -> Tensor:
    """A (n, r)."""
    A = orthonormal(H @ omega)
    for _ in range(iterations):
        A = orthonormal(H @ (H.T @ A))
    return A


def step(
    weights: Weights,
    loss: Loss,
    A: Weights,
    R: Weights,
    z: Weights,
    state: State,
    *,
    lr: float,
    mu: float,
    weight_decay: float = 0.0,
    sides: int = 1,
) -> tuple[Weights, State]:
    """``A`` and ``R`` of linear layers' weights, ``z`` of the other tensors. Forwards: W, +D; with two sides +D, -D."""
    direction = {**{name: R[name] @ A[name].T for name in A}, **z}
    if sides == 1:
        clean = loss(weights)
        g = (loss(perturbed(weights, direction, mu)) - clean) / mu
    else:
        g = two_sided(loss, weights, direction, mu)
    return descend(weights, {name: g * direction[name] for name in weights}, lr, weight_decay), state
