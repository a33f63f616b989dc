"""One op in a training loop of your own: a step of MeZO is three passes over the weights, and keeps one number.

W + eps z, W - eps z, and back to W with the update: z comes from a key, the same in all three, and is never stored.
"""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from pgap_kernels import dense_perturb_, noise

LR, EPS, EPOCHS = 3e-2, 1e-3, 60

if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    x = torch.randn(256, 20)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > x[:, 1]).long()), batch_size=64, shuffle=True)

    weights = [p.data for p in model.parameters()]
    ids = [noise.tensor_id(name) for name, _ in model.named_parameters()]
    with torch.no_grad():
        for epoch in range(EPOCHS):
            for number, (inputs, labels) in enumerate(loader):
                key = noise.derive(seed=0, step=epoch * len(loader) + number, role=noise.Role.DENSE)
                dense_perturb_(weights, [(key, EPS)], tensor_ids=ids)
                plus = cross_entropy(model(inputs), labels).item()
                dense_perturb_(weights, [(key, -2 * EPS)], tensor_ids=ids)
                minus = cross_entropy(model(inputs), labels).item()
                slope = (plus - minus) / (2 * EPS)
                dense_perturb_(weights, [(key, EPS - LR * slope)], tensor_ids=ids)
        accuracy = (model(x).argmax(1) == loader.dataset.tensors[1]).float().mean().item()
    print(f"last loss {plus:.3f}, accuracy {accuracy:.2f}")
