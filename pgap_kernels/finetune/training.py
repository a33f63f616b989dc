"""The steps of a run, with evaluations, checkpoints and, between them, the method in plain PyTorch."""

from __future__ import annotations

import contextlib
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import get_scheduler

from ..optim import NonFiniteLossError, Signal, ZOOptimizer
from . import checkpoint, data, models, report
from .comparison import Baseline
from .errors import UserError
from .examples import Example
from .machine import peak_memory_mib
from .scoring import Encoded, Scorer
from .timing import StepClock, timed_step

if TYPE_CHECKING:
    from .job import Job

#: Modes that a run falls back to where "auto" chose one that turns out not to serve the model.
FALLBACKS = ("scratch", "inplace")


#: Entries of the report that a checkpoint keeps.
_KEPT = ("curves", "test", "baseline", "peak_memory_mib")


class Best(NamedTuple):
    """The step of the best evaluation on dev, and what it is compared by: less is better."""

    step: int
    worth: float


class Training:
    """Steps from where the run stands.

    Attributes:
        clock: the seconds of all steps; ``turns`` those of the steps next to which the baseline made one.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self.report = job.report
        self.optimizer: ZOOptimizer | None = None
        self.clock, self.turns = StepClock(), StepClock()
        self.step = 0
        self.mode = self.config.mode  # another where "auto" chose one that did not serve the model
        self.best: Best | None = None
        self.passes = 0.0
        self.before = 0.0  # seconds of the run before it was resumed
        self.begun = time.monotonic()
        self._first = 0
        self._resumed: dict[str, Any] | None = None  # state of the optimizer and the scheduler, until they are made
        self._baseline: Baseline | None = None
        # Looked for now, opened by run(): between the two, the folder is emptied of an earlier run.
        self._writer = _writer() if self.config.tensorboard else None
        self._board: Any = None
        self._saved = False  # in this session

    # ---- going on with a run ----------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Stand where the last checkpoint was written; whether there is one."""
        job = self.job
        found = checkpoint.load(job.output, self.config, job.dataset, job.device)
        if found is None:
            job.note("there is no checkpoint to resume from: the run begins")
            return False
        folder, self._resumed, run = found
        checkpoint.load_weights(folder, self._weights())
        self.step, self.best = run["step"], run["best"] and Best(*run["best"])
        self.clock, self.turns = (StepClock(**run[name]) for name in ("clock", "turns"))
        self.passes, self.before, self.mode = run["passes"], run["seconds"], run["mode"]
        for name in _KEPT:
            self.report[name] = run["report"][name]
        new = [text for text in job.report["notes"] if text not in run["notes"]]
        self.report["notes"] = [*run["notes"], *new]
        job.said = run["said"]
        job.note(f"resumed after step {self.step}")
        return True

    def _save(self) -> None:
        """A checkpoint of this step."""
        assert self.optimizer is not None
        # First, as it merges: only then are the weights the model.
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        run = {
            "config": self.config.as_dict(),
            "data": checkpoint.fingerprint(self.job.dataset),
            "step": self.step,
            "best": self.best,
            "clock": vars(self.clock),
            "turns": vars(self.turns),
            "passes": self.passes + self.optimizer.passes,
            "seconds": self.seconds(),
            "mode": self.mode,
            "said": self.job.said,
            "notes": self.report["notes"],
            "report": {name: self.report[name] for name in _KEPT},
        }
        self._saved = True
        try:
            checkpoint.save(self.job.output, self.step, self._weights(), state, report.finite(run))
        except OSError as error:
            self.job.note(f"no checkpoint of step {self.step}: {error.strerror}; the run goes on")
            return
        if not self.config.keep_checkpoints:
            kept = [self.best.step] if self._keeps_best and self.best else []
            checkpoint.prune(self.job.output, {self.step, *kept})

    @property
    def _keeps_best(self) -> bool:
        return self.config.keep == "best"

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        return models.tuned_parameters(self.job.model)

    def seconds(self) -> float:
        """Wall seconds of the run so far, evaluations included."""
        return self.before + time.monotonic() - self.begun

    # ---- the steps --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that are left, or as many as the limits allow."""
        config, job = self.config, self.job
        self._begin(self.mode)
        self._first = self.step  # of this session
        if self._writer is not None:
            # What a killed session charted beyond its last checkpoint comes again.
            self._board = self._writer(str(job.output.folder / "tensorboard"), purge_step=self.step or None)
        if self.step == 0:
            self._evaluate()
            if self._keeps_best:
                self._save()
        title = config.method if len(config.seeds) == 1 else f"{config.method}, seed {config.seeds[0]}"
        with job.shown.bar(config.steps, title, "step", done=self.step) as bar:
            while self.step < config.steps:
                loss = self._timed_step()
                self._record(loss)
                self._baseline_turn()
                due = self.step % config.eval_every == 0 or self.step == config.steps
                if due:
                    self._evaluate()
                if self._is_due_for_checkpoint(due):
                    self._save()
                bar.set_postfix(self._postfix(loss), refresh=False)
                bar.update()
                if due and self._is_out_of_patience():
                    job.note(f"no better on dev in {config.patience} evaluations: the run ends after step {self.step}")
                    self.report["ended"] = "patience"
                    break
                if self.step < config.steps and self._is_out_of_time():
                    job.note(f"--time-limit: {config.time_limit:g} minutes are over after step {self.step}")
                    self.report["ended"] = "time limit"
                    # Without a checkpoint, sessions shorter than the time between two evaluations would never get on.
                    # Where one was made in this session, another here would only change bits: in mode folded it merges.
                    if not self._saved and config.checkpoint_every != 0:
                        self._save()
                    break
        if not self.report["curves"]["dev"] or self.report["curves"]["dev"][-1]["step"] != self.step:
            self._evaluate()

    def _is_out_of_time(self) -> bool:
        limit = self.config.time_limit
        return limit is not None and time.monotonic() - self.begun >= 60 * limit

    def _begin(self, mode: str) -> None:
        config = self.config
        self.mode = mode
        options = dict(config.options)
        if mode != config.mode and "merge" in options:
            options["merge"] = "step"  # other modes than the one that auto chose have no window
        with self._warnings_as_notes():
            self.optimizer = self._optimizer(options, mode)
            reason = self.optimizer.mode_reason if mode == config.mode else "what auto chose cannot serve the model"
            self.report["mode"] = {"name": self.optimizer.mode, "reason": reason}
        schedule = "constant_with_warmup" if config.schedule == "constant" and config.warmup else config.schedule
        # The polynomial one ends at 1e-7 by default, which is a usual rate here.
        more = {"scheduler_specific_kwargs": {"lr_end": 0.0}} if schedule == "polynomial" else {}
        try:
            self.scheduler = get_scheduler(schedule, self.optimizer, config.warmup, config.steps, **more)
        except ValueError as error:
            raise UserError(f"--schedule: {schedule} does not go with the other options ({error})") from error
        if self._resumed is not None:
            try:
                self.optimizer.load_state_dict(self._resumed["optimizer"])
            except ValueError as error:
                raise UserError(f"--resume: {error}") from error
            self.scheduler.load_state_dict(self._resumed["scheduler"])
            self._resumed = None
        self.clock.window = getattr(self.optimizer, "window", 1)
        self.turns.window = self.clock.window

    @contextlib.contextmanager
    def _warnings_as_notes(self) -> Iterator[None]:
        """So that they are in the report, too, and look like all else that is to be known."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for one in caught:
            if one.category is not UserWarning:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            elif str(one.message) not in self.report["notes"]:
                self.job.note(str(one.message))

    def _optimizer(self, options: dict[str, Any], mode: str) -> ZOOptimizer:
        try:
            return self.config.make_optimizer(self.job.model, options, mode)
        except UserError as error:
            if mode != "auto" or "--merge" not in str(error):
                raise
            # The default is for the mode that auto prefers, and is no use in another.
            return self.config.make_optimizer(self.job.model, options | {"merge": "step"}, mode)

    def _timed_step(self) -> float:
        assert self.optimizer is not None
        closure = self._closure(self.job.scorer, self.optimizer.members)
        loss, parts = timed_step(self.optimizer, closure, None if self.step else self._fall_back)
        self.clock.add(parts)
        self._lr = self.scheduler.get_last_lr()[0]
        if self.optimizer.lr_rule:
            self._lr *= self.optimizer.signal_rule.factor
        self.scheduler.step()
        self.step += 1
        self._parts = parts
        return loss

    def _closure(self, scorer: Scorer, members: int) -> Callable[[], Tensor]:
        batch = scorer.encode(self._examples(self.step, self.config.batch_size) * members)

        def closure() -> Tensor:
            self.job.interrupts.check()
            return self._objective(scorer, batch, self.config.slices == 1)

        return closure

    def _objective(self, scorer: Scorer, batch: Encoded, alone: bool) -> Tensor:
        """What a step makes small: of the batch, or of each row where it sees several points."""
        if self.config.objective == "loss":
            return scorer.loss(batch) if alone else scorer.losses(batch)
        errors = scorer.errors(batch, self.config.objective)
        return errors.mean() if alone else errors

    def _examples(self, step: int, size: int) -> list[Example]:
        return data.batch(self.job.dataset.train, size, self.config.seeds[0], step)

    def _fall_back(self, error: Exception, closure: Callable[[], Tensor]) -> float:
        """Make the first step in another mode, if the one that auto chose turns out not to serve the model."""
        optimizer = self.optimizer
        assert optimizer is not None
        left = FALLBACKS[FALLBACKS.index(optimizer.mode) + 1 :] if optimizer.mode in FALLBACKS else FALLBACKS
        if not left:  # it has no hooks, so the error is another
            raise error
        if self.config.mode != "auto":
            raise UserError(f"--mode: a step cannot be made in mode {optimizer.mode} ({error})") from error
        optimizer.detach()
        self.job.note(f"mode {optimizer.mode} cannot serve this model ({error}); trying {left[0]}")
        self._begin(left[0])
        return timed_step(self.optimizer, closure, self._fall_back)[0]

    def _record(self, loss: float) -> None:
        assert self.optimizer is not None
        curves = self.report["curves"]
        curves["train_loss"].append(loss)
        curves["lr"].append(self._lr)
        curves["seconds"].append(self.seconds())
        last = self.optimizer.last
        if not last.skipped and last.signal != Signal():
            signal = {name: getattr(last.signal, name) for name in report.SIGNAL}
            curves["signal"].append({"step": self.step, **signal})
        self._chart({"train/loss": loss, "train/lr": curves["lr"][-1]})

    def _chart(self, values: dict[str, float]) -> None:
        if self._board is not None:
            with self._without_board():
                for name, value in values.items():
                    self._board.add_scalar(name, value, self.step)

    @contextlib.contextmanager
    def _without_board(self) -> Iterator[None]:
        """Go on without TensorBoard where it can no longer write: the report has the same curves."""
        try:
            yield
        except OSError as error:
            self._board = None
            self.job.note(f"tensorboard: {error.strerror or error}; the run goes on without it")

    def _postfix(self, loss: float) -> dict[str, str]:
        last = self.report["curves"]["dev"][-1]
        metric = self.job.scorer.metrics[0]
        memory = f"{peak_memory_mib(self.job.device) / 1024:.2f}G"
        return {"loss": f"{loss:.3f}", f"dev {metric}": f"{last[metric]:.3f}", "mem": memory}

    # ---- evaluations ------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """On dev; the report is written, so that nothing is lost later."""
        score = self.job.evaluate("dev", self.config.eval_limit)
        self.report["curves"]["dev"].append({"step": self.step, **score.as_dict()})
        self._chart({f"dev/{name}": value for name, value in score.as_dict().items() if name != "examples"})
        value = self._worth(score.as_dict())
        if not math.isnan(value) and (self.best is None or value < self.best.worth):
            self.best = Best(self.step, value)
        self.measure()
        self.job.write_report_so_far()

    def _worth(self, score: dict[str, float]) -> float:
        """What evaluations are compared by: the loss, or the errors that steps make fewer."""
        if self.config.objective == "loss":
            return score["loss"]
        return -score[self.job.scorer.measure(self.config.objective)]

    def _is_due_for_checkpoint(self, evaluated: bool) -> bool:
        if self.step == self.config.steps:
            return False  # what comes now is the end
        if evaluated and self._keeps_best and self.best is not None and self.best.step == self.step:
            return True
        every = self.config.checkpoint_every
        return evaluated if every is None else bool(every) and self.step % every == 0

    def _is_out_of_patience(self) -> bool:
        if self.config.patience is None or self.best is None:
            return False
        since = [point for point in self.report["curves"]["dev"] if point["step"] > self.best.step]
        return len(since) >= self.config.patience

    def return_to_best(self) -> None:
        """With ``keep="best"``: load the weights of the best evaluation again."""
        if not self._keeps_best or self.best is None or self.report["kept_step"] is not None:
            return
        best = self.report["kept_step"] = self.best.step
        if best == self.step:
            return
        folder = self.job.output.folder / f"{checkpoint.CHECKPOINT}{best}"
        if not folder.is_dir():
            self.job.note(f"there is no checkpoint of the best step, {best}: the weights are the last")
            self.report["kept_step"] = self.step
            return
        self.close()
        checkpoint.load_weights(folder, self._weights())
        self.job.note(f"the weights are those of step {best}, the best on dev")

    def score_test(self, when: str) -> None:
        """Loss and metrics on test, and what the model says to each example."""
        score = self.job.evaluate("test")
        self.report["test"][when] = score.as_dict()
        self.job.said[when] = list(score.said)
        if not math.isfinite(score.loss):
            raise NonFiniteLossError(f"the loss on test is {score.loss} after step {self.step}")

    # ---- the baseline, in turns -------------------------------------------------------------------------------------

    def _baseline_turn(self) -> None:
        """After a step of ours one of the method in plain PyTorch on the same batch, so that both see the same machine.

        The first step of ours is left out: it warms up.
        """
        config = self.config
        first = self._first + (2 if config.steps - self._first > config.compare_steps else 1)
        if not config.compare or not first <= self.step < first + config.compare_steps:
            return
        if self._baseline is None:
            self.measure()  # before there is a second model
            self._baseline = Baseline(self.job)
            self.turns = StepClock(self.clock.window)  # an earlier session's were beside another baseline
        self.turns.add(self._parts)
        scorer = self._baseline.scorer
        # As many examples go forward: a batch of ours with its copies, or half of them and both signs.
        copies = self.optimizer.members if self.optimizer is not None else 1
        size = config.batch_size if copies < 2 else config.batch_size * copies // 2
        batch = scorer.encode(self._examples(self.step - 1, size))  # that of the step just made

        def closure() -> Tensor:
            self.job.interrupts.check()
            return self._objective(scorer, batch, True)

        self._baseline.step(closure)
        self.report["baseline"] = self._baseline.as_dict() | {"turns": self.turns.as_dict(self._refresh_seconds())}
        if self.step == min(first + config.compare_steps - 1, config.steps):
            for text in self._baseline.notes:
                self.job.note(text)
            self._baseline = None
            gc.collect()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _refresh_seconds(self) -> float:
        return self.clock.as_dict()["refresh_seconds"]

    def measure(self) -> None:
        """What the report says of time and memory so far."""
        self.report["timing"] = self.clock.as_dict() | {"wall_seconds": self.seconds()}
        if self.optimizer is not None:
            self.report["weight_passes"] = self.passes + self.optimizer.passes
        if self.report["baseline"] is None:
            self.report["peak_memory_mib"] = peak_memory_mib(self.job.device)

    def close(self) -> None:
        """Take the hooks off; the parameters are then the model."""
        if self.optimizer is not None:
            self.optimizer.detach()
        if self._board is not None:
            with self._without_board():
                self._board.flush()

    def finish(self) -> None:
        """The run is complete: checkpoints have served, unless they are wanted."""
        if not self.config.keep_checkpoints:
            checkpoint.prune(self.job.output, set())


def _writer() -> Any:
    """TensorBoard's writer.

    Raises:
        UserError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard: needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter
