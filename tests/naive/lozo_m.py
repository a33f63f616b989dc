"""LOZO and LOZO-M (2410.07698): rank-r perturbations whose right factor is kept for nu steps.

    D = u v^T on matrices, dense noise z on the rest         u fresh every step, v at t mod nu = 0
    rho = (L(W + eps D) - L(W - eps D)) / (2 eps)
    LOZO:    N = rho u
    LOZO-M:  N = rho u at the first step, then
             N <- N (v_old^T v) / n                          when v changes; n: columns of W
             N <- beta N + (1 - beta) rho u
    W <- (1 - lr wd) W - lr N v^T                            the paper divides the update by r, the code does not

Other tensors follow the same rule with z for u and without the factor v.
"""

from .common import Loss, State, Weights, descend, two_sided


def step(
    weights: Weights,
    loss: Loss,
    u: Weights,
    v: Weights,
    z: Weights,
    state: State,
    *,
    lr: float,
    eps: float,
    nu: int,
    beta: float | None = None,
    divide_by_rank: bool = False,
    weight_decay: float = 0.0,
) -> tuple[Weights, State]:
    """``u`` (m, r) and ``v`` (n, r) of the matrices, ``z`` of the other tensors; ``v`` is read only at t mod nu = 0.

    ``beta=None`` is LOZO. State: t, steps taken; v; N, of every tensor.
    """
    t = state.get("t", 0)
    refresh = t % nu == 0
    right = v if refresh else state["v"]
    rho = two_sided(loss, weights, {**{name: u[name] @ right[name].T for name in u}, **z}, eps)
    N = {name: rho * noise for name, noise in {**u, **z}.items()}
    if beta is not None and state:
        for name, fresh in N.items():
            kept = state["N"][name]
            if refresh and name in u:
                kept = kept @ (state["v"][name].T @ right[name]) / len(right[name])
            N[name] = beta * kept + (1 - beta) * fresh
    update = dict(N)
    for name in u:
        update[name] = N[name] @ right[name].T / (u[name].shape[1] if divide_by_rank else 1)
    return descend(weights, update, lr, weight_decay), {"t": t + 1, "v": right, "N": N}
