"""Zeroth-order steps in Lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from support.trainer_tiny import digest

from pgap_kernels.integrations.lightning import ZOLightningMixin
from pgap_kernels.optim import make_optimizer

pytestmark = pytest.mark.slow  # importing Lightning takes longer than all else

MODES = {
    "inplace": ("mezo", {"mode": "inplace"}),
    "two_pass": ("mezo", {"mode": "inplace", "two_pass": True}),
    "scratch": ("mezo", {"mode": "scratch"}),
    "window": ("pgap", {"mode": "folded", "merge": "window", "rank": 2, "probes": 2, "window": 5}),
}


class Tiny(ZOLightningMixin, lightning.LightningModule):
    def __init__(self, mode="inplace", scheduled=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.mode, self.scheduled, self.losses = mode, scheduled, []

    def zo_loss(self, batch, batch_idx):
        x, y = batch
        assert not torch.is_grad_enabled()
        return nn.functional.cross_entropy(self.layers(x.to(self.layers[0].weight.dtype)).float(), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(self.trainer.callback_metrics["train_loss"].item())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.zo_loss(batch, batch_idx))

    def configure_optimizers(self):
        method, options = MODES[self.mode]
        optimizer = make_optimizer(method, self, lr=1e-2, seed=3, **options)
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)]


def data(varied):
    """Eight batches; all alike if they do not vary, as where Lightning goes on in an epoch is its own matter."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(32 if varied else 4, 6, generator=made).repeat(1 if varied else 8, 1)
    return DataLoader(TensorDataset(x, torch.arange(4).repeat(8) % 3), batch_size=4)


def fit(module, folder, steps=8, resume=None, validate=True, varied=False, devices=1, **options):
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, check_val_every_n_epoch=None, val_check_interval=4,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)], **options,
    )  # fmt: skip
    trainer.fit(module, data(varied), data(varied) if validate else None, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_those_of_a_loop_by_hand(mode, tmp_path):
    module = Tiny(mode)
    trainer = fit(module, tmp_path, validate=False, varied=True)
    by_hand = Tiny(mode)
    optimizer = by_hand.configure_optimizers()
    losses = []
    for number, batch in enumerate(data(True)):

        def closure(batch=batch):
            with torch.no_grad():
                return by_hand.zo_loss(batch, 0)

        losses.append(optimizer.step(closure))
        if number == 3:  # Lightning saves there, which merges
            optimizer.merge()
    optimizer.merge()
    assert module.losses == pytest.approx(losses, rel=1e-6) and digest(module) == digest(by_hand)
    assert trainer.global_step == 8 and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumes_to_the_same_bits(mode, tmp_path):
    whole = Tiny(mode)
    fit(whole, tmp_path)
    resumed = Tiny(mode)
    fit(resumed, tmp_path / "again", resume=tmp_path / "step=4.ckpt")
    assert digest(resumed) == digest(whole)


def test_schedulers_step_with_the_optimizer(tmp_path):
    module = Tiny(scheduled=True)
    trainer = fit(module, tmp_path, steps=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("mode", ["scratch", "window"])
def test_precisions(mode, precision, tmp_path):
    module = Tiny(mode)
    fit(module, tmp_path, precision=precision)
    state = module.zo.state[module.layers[0].weight] if mode == "window" else {}
    assert all(value.dtype == torch.float32 for value in state.values())
    assert len(set(module.losses)) > 4


def test_another_fit_draws_other_noise(tmp_path):
    module = Tiny()
    fit(module, tmp_path)
    fit(module, tmp_path)
    assert module.zo.steps == 16


def test_an_exception_leaves_no_perturbed_weights(tmp_path):
    class Failing(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                raise ZeroDivisionError

        def configure_optimizers(self):
            return make_optimizer("mezo", self, lr=0.0, eps=0.1, mode="inplace", two_pass=True)

    module = Failing()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, validate=False)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)


class OwnStep(Tiny):
    def training_step(self, batch, batch_idx):
        return self.zo_loss(batch, batch_idx)


class EverySecond(Tiny):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "frequency": 2}}


class Automatic(Tiny):
    automatic_optimization = True


class Adam(Tiny):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Plateau(Tiny):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "train_loss"}]


class Nothing(Tiny):
    def zo_loss(self, batch, batch_idx):
        super().zo_loss(batch, batch_idx)


def test_a_loss_that_is_none(tmp_path):
    with pytest.raises(TypeError, match=r"^zo_loss: returned NoneType; accepted: a scalar tensor"):
        fit(Nothing(), tmp_path, validate=False)


def test_the_order_of_the_classes():
    with pytest.raises(TypeError, match=r"^Late: got ZOLightningMixin behind LightningModule"):
        type("Late", (lightning.LightningModule, ZOLightningMixin), {})


@pytest.mark.parametrize("cls, options, message", [
    (Plateau, {}, "configure_optimizers: got ReduceLROnPlateau"),
    (Tiny, {"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
    (Tiny, {"gradient_clip_val": 1.0}, "gradient_clip_val"),
    (OwnStep, {}, "training_step: got OwnStep's own, with which nothing would be trained"),
    (EverySecond, {}, "configure_optimizers: got a scheduler with frequency=2"),
    (Automatic, {}, "automatic_optimization: got True; accepted: False"),
    (Adam, {}, r"configure_optimizers: got Adam; accepted: one optimizer of pgap_kernels\.optim"),
])  # fmt: skip
def test_refusals(cls, options, message, tmp_path):
    module = cls()
    before = digest(module)
    # Lightning itself refuses some of them with manual optimisation, by the same names.
    with pytest.raises(Exception, match=message):
        fit(module, tmp_path, **options)
    assert digest(module) == before


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_make_the_same_updates(tmp_path):
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tests / "support" / "lightning_ranks.py"), str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and len(first.split()) == len(MODES)
