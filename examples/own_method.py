"""A method of your own: FZOO (arXiv 2506.09034), whose sign probes are divided by the deviation of their losses.

It says which directions it tries and what their losses mean. Modes, dtypes, param groups, checkpoints and faults are
the package's business, and this class has them all. docs/own_method.md says what else a method may do.
"""

import torch

from pgap_kernels.noise import Role
from pgap_kernels.optim import ZOOptimizer, scores


class FZOO(ZOOptimizer):
    """W <- W - lr / N sum_i (L_i - L_0) / std(L) u_i,  L_i = L(W + eps u_i),  u_i of random signs;  N + 1 forwards."""

    method = "FZOO"  # its name in checkpoints

    def __init__(self, params, lr=5e-5, eps=1e-4, weight_decay=0.0, *, probes=8, **options):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.probes = probes

    def estimate_and_update(self, evaluate):
        directions = [self.noise(self.key(Role.DENSE, i), distribution="rademacher") for i in range(self.probes)]
        clean = evaluate.loss()  # at W
        losses = evaluate.population([(u, self.radius()) for u in directions])
        terms = []
        for u, score in zip(directions, scores.standardised(losses, base=clean), strict=True):
            terms.append((u, [-lr * score / self.probes for lr in self.rates()]))  # an amount for each weight
        self.apply_update(terms)
        return sum(losses) / len(losses)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    x = torch.randn(256, 20)
    y = (x[:, 0] > x[:, 1]).long()
    optimizer = FZOO(model, lr=1e-2, eps=1e-3)
    print(optimizer.cost())
    first = torch.nn.functional.cross_entropy(model(x), y).item()
    for _ in range(200):
        loss = optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    print(f"loss {first:.3f} -> {loss:.3f} in {optimizer.steps} steps, mode {optimizer.mode}")
