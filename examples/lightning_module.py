"""A LightningModule with forward passes only: saving, resuming, callbacks and schedulers are Lightning's.

    python examples/lightning_module.py

Write `zo_loss` instead of `training_step`.
"""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from pgap_kernels.integrations.lightning import ZOLightningMixin
from pgap_kernels.optim import make_optimizer


class Classifier(ZOLightningMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))

    def zo_loss(self, batch, batch_idx):  # instead of training_step
        x, y = batch
        return cross_entropy(self.layers(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = make_optimizer("mezo", self, lr=3e-2)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 400)]


def main():
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    data = TensorDataset(x, (x[:, 0] > x[:, 1]).long())
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=100, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    (result,) = trainer.validate(module, DataLoader(data, batch_size=256), verbose=False)
    print(f"accuracy {result['accuracy']:.2f} after {module.zo.steps} steps")
    return result["accuracy"]


if __name__ == "__main__":
    main()
