"""DiZO (2502.03304; code: Skilteee/DiZO@b05e73d): MeZO, and a learned distance to anchored weights.

The step is MeZO's without decay. After step t (from 0) with (t + 1) mod kappa = 0 the selected tensors are projected:

    Delta = W - W0,  n = |Delta|,  c = 1                     per tensor; then J times, each on a batch of its own:
    z clipped to |z| <= tau n / eps_p                        one scalar per tensor
    g = (L(W0 + (c + eps_p z / n) Delta) - L(W0 + (c - eps_p z / n) Delta)) / (2 eps_p)
    c <- clip(c - s g z, 1 - tau, 1 + tau)
    W <- W0 + c Delta

Divisions by n are by n + 1e-8.
"""

from torch import Tensor

from .common import Loss, State, Weights, descend, two_sided


def step(weights: Weights, loss: Loss, z: Weights, state: State, *, lr: float, eps: float) -> tuple[Weights, State]:
    rho = two_sided(loss, weights, z, eps)
    return descend(weights, {name: rho * z[name] for name in weights}, lr), state


def project(
    weights: Weights,
    losses: list[Loss],
    anchors: Weights,
    z: list[dict[str, float]],
    *,
    eps_p: float = 0.1,
    tau: float = 0.2,
    s: float = 2.0,
) -> tuple[Weights, State]:
    """``anchors``: W0 of the selected tensors; ``losses`` and ``z``: one per iteration. Returns c in the state."""
    delta = {name: weights[name] - anchor for name, anchor in anchors.items()}
    norm = {name: float(d.norm()) for name, d in delta.items()}
    c = dict.fromkeys(anchors, 1.0)

    def at(ratios: dict[str, float]) -> dict[str, Tensor]:
        return {**weights, **{name: anchors[name] + ratios[name] * delta[name] for name in anchors}}

    for loss, draws in zip(losses, z, strict=True):
        bound = {name: tau * norm[name] / eps_p for name in anchors}
        clipped = {name: min(max(draws[name], -bound[name]), bound[name]) for name in anchors}
        move = {name: eps_p * clipped[name] / (norm[name] + 1e-8) for name in anchors}
        plus = loss(at({name: c[name] + move[name] for name in anchors}))
        minus = loss(at({name: c[name] - move[name] for name in anchors}))
        g = (plus - minus) / (2 * eps_p)
        c = {name: min(max(c[name] - s * g * clipped[name], 1 - tau), 1 + tau) for name in anchors}
    return at(c), {"c": c}
