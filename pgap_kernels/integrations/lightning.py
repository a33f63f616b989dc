"""Zeroth-order steps in Lightning, by manual optimisation: the automatic one would keep activations for a backward.

    from pgap_kernels.integrations.lightning import ZOLightningMixin

    class Mine(ZOLightningMixin, lightning.LightningModule):
        def zo_loss(self, batch, batch_idx):
            return cross_entropy(self.model(batch["x"]), batch["y"])

        def configure_optimizers(self):
            return make_optimizer("mezo", self, lr=1e-6)

Saving, resuming, callbacks and schedulers are Lightning's.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..optim import ZOOptimizer
from .ranks import broadcast_from_first, check_shares, mean_over_ranks

__all__ = ["ZOLightningMixin"]


class ZOLightningMixin:
    """Before ``LightningModule``: its ``training_step`` takes zeroth-order steps on ``zo_loss``.

    ``configure_optimizers`` returns one optimizer of this package, with or without schedulers, which step once a
    training step, whatever their ``interval`` says. Logged: ``train_loss``, in the progress bar as well. In several
    processes (strategy "ddp") losses are averaged and every process makes the same update; ``state_dict`` then is for
    all processes to call, as Lightning does.

    Raises:
        TypeError, ValueError: when fitting starts, for what cannot be served; the message names it.
    """

    automatic_optimization = False
    trainer: Any
    _steps_before = 0  # of the fits before

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        names = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in names and names.index("LightningModule") < names.index("ZOLightningMixin"):
            raise TypeError(
                f"{cls.__name__}: got ZOLightningMixin behind LightningModule, whose training_step would be called; "
                f"accepted: class {cls.__name__}(ZOLightningMixin, LightningModule)"
            )

    def zo_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, a scalar; called several times a step, without gradients."""
        raise NotImplementedError(f"{type(self).__name__}.zo_loss: write it; it returns the loss of a batch")

    def on_fit_start(self) -> None:
        trainer = self.trainer
        if type(self).training_step is not ZOLightningMixin.training_step:
            raise TypeError(
                f"training_step: got {type(self).__name__}'s own, with which nothing would be trained; accepted: that "
                "of ZOLightningMixin. Rename it to zo_loss"
            )
        sharded = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
        if found := sharded & {cls.__name__ for cls in type(trainer.strategy).__mro__}:
            raise ValueError(f"strategy: got {found.pop()}; accepted: one device, or 'ddp', with whole weights in each")
        if self.automatic_optimization:
            raise ValueError("automatic_optimization: got True; accepted: False, as the step has no backward pass")
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches: got {trainer.accumulate_grad_batches}; accepted: 1. Use larger batches, or "
                "add up several in zo_loss"
            )
        if trainer.precision == "16-mixed":
            raise ValueError(
                "precision: got '16-mixed', whose scaler asks for gradients; accepted: '32-true', 'bf16-mixed', "
                "'bf16-true', '16-true'"
            )
        for config in trainer.lr_scheduler_configs:
            if config.frequency != 1:
                raise ValueError(
                    f"configure_optimizers: got a scheduler with frequency={config.frequency}; accepted: 1, as all "
                    "step once a training step"
                )
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            raise ValueError(
                "configure_optimizers: got ReduceLROnPlateau, which waits for a metric; accepted: schedulers that step "
                "once a training step"
            )
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val: got {trainer.gradient_clip_val}; accepted: None, as there are no gradients to clip"
            )
        if len(trainer.optimizers) != 1 or not isinstance(trainer.optimizers[0], ZOOptimizer):
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise TypeError(f"configure_optimizers: got {kinds}; accepted: one optimizer of pgap_kernels.optim")
        if trainer.world_size > 1:
            check_shares(trainer.optimizers[0])
            broadcast_from_first([*self.parameters(), *self.buffers()])  # type: ignore[attr-defined]
        # Another fit goes on with other noise. (What a checkpoint says is loaded later.)
        zo = trainer.optimizers[0]
        zo.reduce_losses = mean_over_ranks  # type: ignore[method-assign]
        zo.steps = max(zo.steps, self._steps_before)
        super().on_fit_start()  # type: ignore[misc]

    def configure_callbacks(self) -> Any:
        """Those of the class, and one that leaves no perturbed weights behind an exception."""
        # Two packages are called Lightning; the callbacks that a module's Trainer knows are of its own.
        package = next(cls.__module__ for cls in type(self).__mro__ if cls.__name__ == "LightningModule")
        base = importlib.import_module(package.partition(".core")[0]).Callback
        merging = type("MergeOnException", (base,), {"on_exception": lambda _, trainer, module, error: module._merge()})
        found = super().configure_callbacks()  # type: ignore[misc]
        return [*(found if isinstance(found, Sequence) else [found]), merging()]

    @property
    def zo(self) -> ZOOptimizer:
        """The optimizer, out of Lightning's wrapper."""
        return self.optimizers(use_pl_optimizer=False)  # type: ignore[attr-defined]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> Tensor:
            with torch.no_grad():  # Lightning turns gradients on around a closure
                loss = self.zo_loss(batch, batch_idx)
            if not isinstance(loss, Tensor):
                raise TypeError(f"zo_loss: returned {type(loss).__name__}; accepted: a scalar tensor, the batch's loss")
            return loss.detach()

        loss = self.optimizers().step(closure=closure)  # type: ignore[attr-defined] # the wrapper, which counts steps
        schedulers = self.lr_schedulers() or []  # type: ignore[attr-defined]
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()
        self.log("train_loss", loss, prog_bar=True)  # type: ignore[attr-defined]

    def on_validation_start(self) -> None:
        self._merge()
        super().on_validation_start()  # type: ignore[misc]

    def state_dict(self, *given: Any, **named: Any) -> Any:
        # Lightning takes it in every process, so that merging here keeps them equal.
        self._merge()
        return super().state_dict(*given, **named)  # type: ignore[misc]

    def on_fit_end(self) -> None:
        self._merge()
        self._steps_before = self.zo.steps
        super().on_fit_end()  # type: ignore[misc]

    def _merge(self) -> None:
        fitting = getattr(self, "_trainer", None) is not None and self.trainer.optimizers
        if fitting and isinstance(self.trainer.optimizers[0], ZOOptimizer):
            self.zo.merge()
