"""Zeroth-order fine-tuning in the Trainer of transformers (4.56 and later): forward passes only, and its own loop.

    from pgap_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments

    arguments = ZOTrainingArguments("out", zo_method="mezo", zo_eps=1e-3, learning_rate=1e-6, max_steps=1000)
    ZOTrainer(model, arguments, train_dataset=data).train()

``training_step`` keeps the micro-batches of an accumulation; with the last of them it takes the whole step
(``ZOOptimizer.step_ahead``), and the loop's own ``optimizer.step()`` takes that up. So schedulers, callbacks, logging,
saving and resuming are the Trainer's.

In several processes (torchrun) each has its share of the batch and all make the same update: the model is not wrapped
in DDP, whose buckets are as large as the gradients that are not there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from ..losses import per_example_loss
from ..noise import canonical_name
from ..optim import Signal, ZOOptimizer
from .arguments import ZOArguments
from .ranks import broadcast_from_first, check_shares, mean_over_ranks

__all__ = ["ZOArguments", "ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments"]

_log = logging.getLogger("pgap_kernels")
_DEFAULT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Entries of param groups, as arguments. The rate of the moment is the scheduler's.
_ARGUMENTS = {"initial_lr": "learning_rate", "weight_decay": "weight_decay"}
_NO_ARGUMENTS = ("zo_params", "zo_param_names", "zo_lr")
# Options of TRL's losses that detach what has a value, and its trainers whose training_step adds nothing to a step.
_DETACHED = (("loss_type", "dft"), ("loss_type", "kto"), ("use_weighting", True))
_SAME_STEP = ("SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer")
_COUNTERS = ("_metrics", "_total_train_tokens", "_stored_metrics")  # of TRL's trainers: what a forward adds to


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):  # type: ignore[misc]
    """``TrainingArguments`` with a zeroth-order method: see ``ZOArguments``."""


class ZOTrainerMixin:
    """Before any Trainer: ``class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer)``, with arguments that have ``ZOArguments``.

    An optimizer of this package may be given as ``optimizers=(optimizer, scheduler_or_None)``; else ``args`` makes one.

    Entries of the log that have a "loss" also have ``zo_rho``, the root mean square of the slopes of the last step,
    and since the beginning ``zo_weight_passes`` and ``zo_seconds_forward``, ``_perturb``, ``_refresh``.

    Attributes:
        zo: the optimizer.

    Raises:
        TypeError, ValueError: an argument cannot be served; the message names it.
    """

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any
    state: Any

    def __init__(self, *given: Any, **named: Any) -> None:
        arguments = next((value for value in (*given, *named.values()) if isinstance(value, TrainingArguments)), None)
        if not isinstance(arguments, ZOArguments):
            raise TypeError(
                f"args: got {type(arguments).__name__}; accepted: ZOTrainingArguments, or a dataclass with ZOArguments "
                "before its TrainingArguments"
            )
        if arguments.n_gpu > 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"args: got {arguments.n_gpu} GPUs in one process (DataParallel); accepted: one. "  # type: ignore[attr-defined]
                "Launch with torchrun --nproc_per_node, or set CUDA_VISIBLE_DEVICES"
            )
        bound = inspect.signature(super().__init__).bind_partial(*given, **named).arguments
        own = (bound.get("optimizers") or (None, None))[0]
        if own is not None and not isinstance(own, ZOOptimizer):
            raise TypeError(
                f"optimizers: got {type(own).__name__}; accepted: an optimizer of pgap_kernels.optim, or None"
            )
        if bound.get("optimizer_cls_and_kwargs") is not None:
            raise ValueError("optimizer_cls_and_kwargs: accepted: None; choose args.zo_method, or pass optimizers=")
        self._check_objective(arguments)
        self._batches: list[dict[str, Any]] = []
        self._shared = False  # the first process's weights were broadcast
        super().__init__(*given, **named)
        self._dtypes = [p.dtype for p in self.model.parameters()]

    def _check_objective(self, args: Any) -> None:
        """Refuse losses whose gradient is not that of their value, as values are all that forwards show."""
        for name, value in _DETACHED:
            if getattr(args, name, None) == value:
                raise ValueError(
                    f"{name}: got {value!r}, of which a part is kept out of the gradient (detach); accepted: losses "
                    "whose value is the objective"
                )
        classes = type(self).__mro__[type(self).__mro__.index(ZOTrainerMixin) + 1 :]
        steps = next(cls for cls in classes if "training_step" in vars(cls))
        if steps is not Trainer and steps.__name__ not in _SAME_STEP:
            raise TypeError(
                f"got {steps.__name__}, whose training_step would not be called; accepted: trainers without one of "
                "their own. Move what it does into compute_loss or the data"
            )
        prepares = next(cls for cls in classes if "_prepare_inputs" in vars(cls))
        if prepares is not Trainer:
            raise TypeError(
                f"got {prepares.__name__}, which makes batches of its own in _prepare_inputs (of generated answers, "
                "whose loss has the same value at all weights); accepted: trainers whose loss's value is the objective"
            )

    # ---- before training --------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.scaler = None  # fp16's would ask for gradients

    def create_optimizer(self, model: nn.Module | None = None) -> ZOOptimizer:
        if self.optimizer is None:
            args = self.args
            if args.optim not in _DEFAULT_OPTIMIZERS:
                _log.warning(
                    "optim: got %r, which is not used; zo_method chooses the optimizer",
                    str(getattr(args.optim, "value", args.optim)),
                )
            if args.gradient_checkpointing:
                _log.warning("gradient_checkpointing: has no effect, as nothing is kept for a backward pass")
            if args.uses_default_rate and hasattr(self.model, "peft_config"):
                _log.warning(
                    "learning_rate: not given, so it is the method's %g, which is meant for whole models; adapters "
                    "usually need a larger one (MeZO's authors take 1e-4 or 5e-5 with LoRA): set learning_rate",
                    args.learning_rate,
                )
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.optimizer = args.make_optimizer(self.model, per_step, read_by=_fused_head(self.model))
        if self.args.world_size > 1 and not self._shared:
            check_shares(self.zo)
            broadcast_from_first([*self.model.parameters(), *self.model.buffers()])
            self._shared = True
        self._check_slices()
        self.zo.reduce_losses = mean_over_ranks  # type: ignore[method-assign]
        return self.optimizer

    @property
    def zo(self) -> ZOOptimizer:
        """The optimizer, out of accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _slices(self) -> int:
        return self.zo.members * self.zo.groups

    def _check_slices(self) -> None:
        """Refuse what cannot give a loss per example, or equal slices, before the first step."""
        if self._slices == 1:
            return
        args, model = self.args, self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        causal, classifies = (
            type(model).__name__ in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
            for task in ("CAUSAL_LM", "SEQUENCE_CLASSIFICATION")
        )
        computes = type(self).compute_loss  # type: ignore[attr-defined]
        if computes is not Trainer.compute_loss and not computes.__module__.startswith("trl.trainer.sft_trainer"):
            raise ValueError(
                f"zo_members, zo_groups: got a {type(self).__name__} with a compute_loss of its own, which gives no "
                "loss per example; accepted: 1 of each"
            )
        if getattr(model.config, "output_router_logits", False):
            raise ValueError(
                "zo_members, zo_groups: got a model with output_router_logits, whose loss has a term of all examples; "
                "accepted: 1 of each"
            )
        kind = getattr(model.config, "problem_type", None)
        if not causal and not (classifies and kind in (None, "single_label_classification") and model.num_labels > 1):
            raise ValueError(
                f"zo_members, zo_groups: got a {type(model).__name__}, whose losses per example are not known; "
                "accepted: causal language models, and classifiers with one label"
            )
        if args.label_smoothing_factor or getattr(self, "compute_loss_func", None) is not None:
            raise ValueError(
                "label_smoothing_factor, compute_loss_func: accepted: unset with zo_members or zo_groups, which need a "
                "loss per example"
            )
        if args.train_batch_size % self.zo.groups:
            raise ValueError(
                f"zo_groups: got {self.zo.groups} for batches of {args.train_batch_size} examples; accepted: a number "
                "that divides them"
            )
        if not args.dataloader_drop_last and (self.zo.groups > 1 or args.gradient_accumulation_steps > 1):
            raise ValueError(
                "dataloader_drop_last: got False; accepted: True with zo_groups, or with zo_members and gradient "
                "accumulation, as a smaller last batch has other slices"
            )

    def train(self, *given: Any, **named: Any) -> Any:
        if self._dtypes != [p.dtype for p in self.model.parameters()]:
            raise ValueError(
                "fp16_full_eval, bf16_full_eval: the evaluation before has cast the model's weights, and training "
                "would go on with the cast ones; accepted: training first, or a new model"
            )
        self._batches = []
        if self.optimizer is not None and self.zo.is_ahead:  # an interrupt came between a step and its taking up
            self.zo.step()
        try:
            return super().train(*given, **named)  # type: ignore[misc]
        finally:
            self._merge()  # whoever reads the weights now finds them

    # ---- a step -----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        args = self.args
        self._batches.append(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        if not self.accelerator.gradient_state.sync_gradients:  # more micro-batches of this step are to come
            return torch.zeros((), device=args.device)
        batches, self._batches = self._batches, []
        # A checkpoint of the model alone (save_only_model) does not say so: the noise goes on, not over again.
        self.zo.steps = max(self.zo.steps, self.state.global_step)
        model.train(args.zo_dropout)
        if any(cls.__module__.startswith("trl.") for cls in type(self).__mro__):
            self.model.training = True  # TRL files its metrics by it; dropout goes by the flags of its own modules
        every = args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        counted = _CountedOnce(self)

        def closure() -> Tensor:
            with counted():
                return self._losses(model, batches, num_items_in_batch)

        return torch.tensor(self.zo.step_ahead(closure), dtype=torch.float32, device=args.device)

    def _losses(self, model: nn.Module, batches: list[dict[str, Any]], num_items: Any) -> Tensor:
        """The loss of a step's batches: one; or one of each example of every slice, slices in order."""
        if self._slices == 1:
            return self._loss(model, batches, num_items)
        rows = [self._loss_per_example(model, batch).view(self._slices, -1) for batch in batches]
        joined = torch.cat(rows, 1)
        # The examples of other processes are others; the means of their slices are what can be averaged.
        return joined.double().mean(1) if self.args.world_size > 1 else joined.flatten()

    def _loss(self, model: nn.Module, batches: list[dict[str, Any]], num_items: Any) -> Tensor:
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # as in Trainer.training_step
        if scaled is None:
            accepts = self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
            scaled = (accepts and num_items is not None) or self.compute_loss_func is not None  # type: ignore[attr-defined]
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for batch in batches:
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                # A dict of its own for each call: with label smoothing ``compute_loss`` pops the labels.
                loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items)  # type: ignore[attr-defined]
            total += loss.detach().double() / (1 if scaled else len(batches))
        return total

    def _loss_per_example(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The loss of each example of a batch, in as many copies as a forward has members."""
        size = len(batch["labels"])
        stacked = {name: self._stacked(name, value, size) for name, value in batch.items()}
        labels = stacked.pop("labels")
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            outputs = model(**stacked)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return per_example_loss(logits, labels)

    def _stacked(self, name: str, value: Any, size: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0 or len(value) != size:
            raise ValueError(
                f"train_dataset: got {name!r} of shape {tuple(value.shape)} in a batch of {size} examples; accepted: "
                "tensors with a row for each example, with zo_members or zo_groups"
            )
        return torch.cat([value] * self.zo.members)

    # ---- between steps ----------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        given = _options_of(self.zo)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        for name, value in _options_of(self.zo).items():
            if value != given.get(name, value):
                _log.warning(
                    "resume_from_checkpoint: %s stays %r, from the checkpoint; the given %r is not used (to change it, "
                    "begin a run from the weights)",
                    *(name, value, given[name]),
                )

    def _merge(self) -> None:
        """In every process: what is pending would be merged in the one that saves or evaluates alone."""
        if self.optimizer is not None:
            self.zo.merge()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.world_size > 1 and not _internal_call and self.optimizer is not None and self.zo.pending:
            raise RuntimeError(
                "save_model: some updates are not in the weights yet, and to write them in this process alone would "
                "part it from the others; accepted: after trainer.zo.merge() in every process"
            )
        self._merge()
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        self._merge()  # in every process, before one of them reads weights
        super()._load_best_model()  # type: ignore[misc]

    def evaluation_loop(self, *given: Any, **named: Any) -> Any:
        self._merge()
        return super().evaluation_loop(*given, **named)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        if "loss" in logs and self.optimizer is not None:
            zo = self.zo
            rho, signal = zo.last.rho, zo.last.signal
            if rho:
                logs["zo_rho"] = math.sqrt(sum(slope**2 for slope in rho) / len(rho))
            logs |= {f"zo_{name}": v for name, v in signal._asdict().items() if v is not None and signal != Signal()}
            logs["zo_weight_passes"] = zo.passes
            logs |= {f"zo_seconds_{part}": seconds for part, seconds in zo.seconds.items()}
        super().log(logs, *given, **named)  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None  # else 5.x logs a norm of 0


class ZOTrainer(ZOTrainerMixin, Trainer):
    """The Trainer of transformers with zeroth-order steps: ``ZOTrainerMixin`` says what differs."""


def _options_of(optimizer: ZOOptimizer) -> dict[str, Any]:
    """What a checkpoint brings back, by argument."""
    group = {_ARGUMENTS.get(name, f"zo_{name}"): v for name, v in optimizer.param_groups[0].items()}
    return {"zo_seed": optimizer.seed, **{name: v for name, v in group.items() if name not in _NO_ARGUMENTS}}


def _fused_head(model: nn.Module) -> dict[str, str]:
    """Which parameters of the head the model's own forward reads, if TRL has replaced that by one with a fused head."""
    for name, module in model.named_modules():
        code = getattr(module.__dict__.get("forward"), "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames:
            head = next(inner for inner, m in module.named_modules() if m is module.get_output_embeddings())
            path = ".".join(part for part in (name, head) if part)
            return {canonical_name(f"{path}.{p}"): name for p, _ in module.get_submodule(head).named_parameters()}
    return {}


class _CountedOnce:
    """What TRL counts in a forward (tokens, metrics) counts in the first forward of a step, not in the others."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.kept: dict[str, Any] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        yield
        if self.kept is None:
            self.kept = {
                name: _copied(getattr(self.trainer, name)) for name in _COUNTERS if hasattr(self.trainer, name)
            }
        else:
            for name, value in self.kept.items():
                setattr(self.trainer, name, _copied(value))


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists; what they hold is shared."""
    if isinstance(value, dict):
        same = value.copy()  # of its own class, as a defaultdict is
        same.update({key: _copied(inner) for key, inner in value.items()})
        return same
    return list(value) if isinstance(value, list) else value
