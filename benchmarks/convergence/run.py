"""One cell: steps until its example-forwards are used up, with evaluations between them."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.convergence.store import Store
from benchmarks.convergence.study import SCHEDULES, Cell, Refused, Study
from benchmarks.harness import batches, machine
from pgap_kernels.finetune import data, models
from pgap_kernels.finetune.scoring import Encoded, Scorer, scorer_of
from pgap_kernels.optim import CapturedClosure, NonFiniteLossError, make_optimizer

EVALUATION_BATCH = 50
SIGNALS = ("squared_norm", "second_moment")
# Forwards by which an optimizer finds out, in its first step, whether a model keeps the slices of a batch apart. They
# are not the method's: those of a cell that was stopped come again.
TRIALS = 3


class Stopped(Exception):
    """The time is over, or somebody has pressed Ctrl-C; the cell can go on from here."""


class Run:
    """A cell on a model of its own.

    Attributes:
        record: what is kept of it: its cell, the machine, and by step the loss, the example-forwards so far, and what
            the losses say of the gradient; loss and metrics of the evaluations at checkpoints.
        forwards: example-forwards so far.
    """

    def __init__(self, cell: Cell, study: Study, device: torch.device) -> None:
        self.cell, self.study, self.device = cell, study, device
        self.budget = study.budget(cell)
        config = study.config()
        torch.manual_seed(cell.direction_seed)  # a new adapter is drawn at random
        self.model, tokenizer, _ = models.load(
            config.model, getattr(torch, config.dtype), device, tune=config.tune, lora_rank=config.lora_rank
        )
        self.dataset = data.load(config, tokenizer)
        self.scorer = scorer_of(self.model, tokenizer, self.dataset, config.max_new_tokens)
        self.optimizer = make_optimizer(
            cell.method, self.model, lr=cell.lr, seed=cell.direction_seed, **{"eps": 1e-3, **cell.options}
        )
        self.forwards = 0
        # Other scorers read more than inputs and labels, and forwards of one length each wait for the device.
        plain = type(self.scorer) is Scorer and self.scorer.padding != "apart"
        self._captures = plain and device.type == "cuda"
        self._captured: dict[torch.Size, tuple[Encoded, Callable[[], Tensor]]] = {}
        self._trials = TRIALS if cell.slices > 1 else 0
        self.record: dict[str, Any] = {
            "cell": asdict(cell),
            "status": "stopped",
            "mode": self.optimizer.mode,
            "facts": machine.facts(device),
            "commits": [commit()],
            "steps": {name: [] for name in ("losses", "forwards", *SIGNALS)},
            "checkpoints": [],
        }

    # ---- going on later ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that `load` needs beside the record."""
        weights = models.tuned_parameters(self.model)
        optimizer = self.optimizer.state_dict()  # merges: only then are the weights the model
        return {"weights": {name: w.detach().cpu() for name, w in weights.items()}, "optimizer": optimizer}

    @torch.no_grad()
    def load(self, record: dict[str, Any], state: dict[str, Any]) -> None:
        """Stand where a run was stopped.

        Raises:
            Refused: by other versions.
        """
        before, now = record["facts"], self.record["facts"]
        for name in ("torch", "pgap_kernels"):
            if before.get(name) != now.get(name):
                raise Refused(
                    f"{self.cell.name}: was begun with {name} {before.get(name)!r}, this is {now.get(name)!r}; "
                    "accepted: the same, or another folder"
                )
        record["commits"] += [one for one in self.record["commits"] if one not in record["commits"]]
        for name, w in models.tuned_parameters(self.model).items():
            w.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.record = record
        if record["steps"]["losses"]:
            self.forwards = record["steps"]["forwards"][-1]

    # ---- the run ----------------------------------------------------------------------------------------------------

    def go(self, progress: Callable[[float], object], stop: Callable[[], bool]) -> None:
        """Run to the end.

        Args:
            progress: gets the share of the run that is done.
            stop: asked after each step.

        Raises:
            Stopped: the record and `state` are of the last whole step.
        """
        try:
            if stop():  # a process may have waited for its turn
                raise Stopped
            if not self.record["checkpoints"]:
                self._evaluate()
            while True:
                if self._is_due():
                    self._evaluate()
                if self.forwards >= self.budget:
                    break
                if stop():
                    raise Stopped
                self.step()
                progress(min(1.0, self.forwards / self.budget))
            self.record["status"] = "completed"
        except NonFiniteLossError as error:
            self.record |= {"status": "diverged", "error": str(error)}
        except KeyboardInterrupt as error:
            raise Stopped from error

    def batch(self, number: int) -> Encoded:
        """What the forwards of a step get."""
        examples = data.batch(self.dataset.train, self.cell.batch, self.cell.data_seed, number)
        return self.scorer.encode(examples * self.cell.copies)

    def _forward(self, batch: Encoded) -> Callable[[], Tensor]:
        """The losses of a batch. On a GPU they are those of CUDA graphs, a few for each shape of a batch: kernels of a
        model of this size take longer to launch than to run."""

        def losses() -> Tensor:
            return batches.loss(self.scorer, batch, self.cell.slices)

        if not self._captures:
            return losses
        shape = batch.inputs["input_ids"].shape
        if shape not in self._captured:
            self._captured[shape] = batch, CapturedClosure(self.optimizer, losses)
        kept, captured = self._captured[shape]
        if kept is not batch:
            for name, tensor in kept.inputs.items():
                tensor.copy_(batch.inputs[name])
            kept.labels.copy_(batch.labels)
        return captured

    def step(self, examples: int | None = None) -> None:
        """One step, and what it was; on the batch of another step, if one is named."""
        number, calls = len(self.record["steps"]["losses"]), 0
        refreshed = getattr(self.optimizer, "refreshed_at", None)
        batch = self.batch(number if examples is None else examples)
        forward = self._forward(batch)
        factor = SCHEDULES[self.cell.schedule](self.forwards / self.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cell.lr * factor

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            return forward()

        try:
            self.optimizer.step(closure)
        finally:
            # Ctrl-C in a forward undoes the step, which is then none. While weights are written it waits until that is
            # over: the step was taken, so it counts, and what is saved goes on with the next.
            if self.optimizer.steps > number:
                self._count((calls - self._trials) * len(batch.labels))
                self._trials = 0
            elif getattr(self.optimizer, "refreshed_at", None) != refreshed:
                self.optimizer.refreshed_at = refreshed  # its forwards come again, to be counted

    def _count(self, forwards: int) -> None:
        self.forwards += forwards
        steps, last = self.record["steps"], self.optimizer.last
        found = {"losses": last.loss, "forwards": self.forwards}
        for name, value in (found | {name: getattr(last.signal, name) for name in SIGNALS}).items():
            steps[name].append(value)

    def _is_due(self) -> bool:
        """Whether a checkpoint was passed since the last evaluation."""
        last = self.record["checkpoints"][-1]
        following = next(due for due in self.study.checkpoints(self.cell) if due > last["forwards"])
        return self.forwards >= following

    def _evaluate(self) -> None:
        score = self.scorer.evaluate(getattr(self.dataset, self.study.part), EVALUATION_BATCH)
        self.record["checkpoints"].append({
            "step": len(self.record["steps"]["losses"]), "forwards": self.forwards, "loss": score.loss, **score.metrics,
        })  # fmt: skip


def commit() -> str | None:
    """The commit of the code here, with "-dirty" if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def past(deadline: float | None) -> bool:
    """Whether a moment of ``time.monotonic`` is over; None never is."""
    return deadline is not None and time.monotonic() >= deadline


def run_cell(
    cell: Cell,
    study: Study,
    store: Store,
    device: torch.device,
    progress: Callable[[float], object],
    over: Callable[[], bool],
) -> dict[str, Any]:
    """Run a cell from where it was stopped, if it was, until it is finished or stopped; returns its record."""
    run = Run(cell, study, device)
    before = store.resume(cell, device)
    if before is not None:
        run.load(*before)
    try:
        run.go(progress, over)
    except Stopped:
        store.stop(cell, run.record, run.state())
    else:
        store.finish(cell, run.record)
    run.optimizer.detach()
    gc.collect()  # a model and its hooks refer to one another
    return run.record
