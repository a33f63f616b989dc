"""HELENE: hyper-parameters of a group are those of its weights alone."""

import torch

from pgap_kernels.optim import HELENE


def trained(**of_first_group) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    first, _, last = ([(f"{i}.{name}", p) for name, p in m.named_parameters()] for i, m in model.named_children())
    groups = [{"params": first, **of_first_group}, {"params": last}]
    optimizer = HELENE(groups, lr=1e-2, batch_size=4, model=model, refresh_every=2)
    x = torch.ones(4, 6)
    optimizer.step(lambda: model(x).square().mean())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: torch.tensor(1.0 + optimizer.perturbation.passes_this_step))  # another loss at each point
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


def test_hyper_parameters_of_a_group_do_not_reach_another():
    plain = trained()
    for changed in ({"beta1": 0.5}, {"beta2": 0.5}, {"gamma": 5.0}):
        own = trained(**changed, floor=1e-6)
        same = [torch.equal(a, b) for a, b in zip(plain, own, strict=True)]
        assert same == [False, False, True, True], changed
