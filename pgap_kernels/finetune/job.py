"""One fine-tuning run, from loading to the report."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..optim import NonFiniteLossError
from . import data, models, padding, report
from .config import Config
from .errors import UserError, is_out_of_memory
from .interrupts import Interrupted, Interrupts
from .machine import device_of, reset_peak_memory, versions
from .output import MODEL, Output, completed
from .scoring import Score, Scorer, scorer_of
from .shown import Shown
from .training import Training

#: Test examples that a saved model is tried with, and how far its loss may be from the tuned model's.
RELOADED, RELOADED_TOLERANCE = 64, 1e-4
OUT_OF_MEMORY = "out of memory: lower --batch-size or --max-length, choose a smaller --dtype, or tune --lora-rank"


def run(config: Config, interrupts: Interrupts | None = None) -> dict[str, Any]:
    """Fine-tune as ``config`` says; write the report and what else it asks for to its output folder.

    The report is written at every evaluation and whatever ends the run: Ctrl-C, SIGTERM, SIGHUP, a loss that is not
    finite, or an error. The weights are then those after the last completed step.

    Args:
        config: says what to do.
        interrupts: of several runs, entered; by default those of this one.

    Returns:
        The report as written (`report.empty` lists its entries); ``report["status"]`` is ``"completed"``,
        ``"interrupted"`` or ``"diverged"``.

    Raises:
        UserError: the model, the data or an option cannot be used.
        KeyboardInterrupt: a signal before anything was measured.
        Exception: whatever else went wrong; the report then says so, with the status ``"failed"``.
    """
    output = Output(config.output, overwrite=config.overwrite, resume=config.resume)
    shown = Shown(config.quiet)
    try:
        if finished(config, output) is not None:
            raise UserError(_complete(config))
        if interrupts is not None:
            return Job(config, output, shown, interrupts).run()
        with Interrupts() as own:
            return Job(config, output, shown, own).run()
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(OUT_OF_MEMORY) from error
        raise
    finally:
        output.close()


def finished(config: Config, output: Output) -> dict[str, Any] | None:
    """With ``resume``, the report of the run in the folder if it has nothing left to do; None if one begins or goes on.

    Raises:
        UserError: there is a model of a run that cannot go on.
    """
    if not config.resume:
        return None
    before = completed(output.folder)
    if before is None:
        if (output.folder / MODEL).exists() and not output.checkpoints():
            raise UserError(
                f"--resume: {config.output!r} holds {MODEL}/ but no checkpoint to go on from; accepted: another "
                "folder, or --overwrite without it"
            )
        return None
    # More steps may be wanted of a run that has kept its checkpoints.
    return None if output.checkpoints() and config.steps > before["config"]["steps"] else before


def refuse_more(config: Config, before: dict[str, Any]) -> None:
    """Refuse what a finished run cannot have any more.

    Raises:
        UserError: more steps, or a saved model.
    """
    lacks_model = config.save_model and not (Path(config.output).expanduser() / MODEL).exists()
    if config.steps > before["config"]["steps"] or lacks_model:
        raise UserError(_complete(config))


def _complete(config: Config) -> str:
    return f"--resume: the run in {config.output!r} is complete; accepted: another folder, or --overwrite without it"


class Job:
    """Everything loaded, and the report that is filled."""

    def __init__(self, config: Config, output: Output, shown: Shown, interrupts: Interrupts) -> None:
        self.config, self.output, self.shown, self.interrupts = config, output, shown, interrupts
        self.device = device_of(config.device)
        reset_peak_memory(self.device)  # of an earlier seed's run
        shown.doing("loading the model and the data")
        notes: list[str] = []  # until there is a report
        models.check_exists(config.model)
        source = data.source(config)  # first, as a model may have to be fetched
        self.model, self.tokenizer, self.name = self.load_model(notes.append)
        mask = self.tokenizer.mask_token if models.is_masked(self.model) else None
        if mask is None and models.is_masked(self.model):
            raise UserError(
                "--model: predicts masked tokens, but its tokenizer has no mask token; accepted: one that has"
            )
        self.dataset = data.load(config, self.tokenizer, mask, source)
        labels = len(self.dataset.labels)
        if (other := config.for_labels(labels)) is not config:
            self.config = config = other
            notes.append(f"--lr: half of the default, {config.options['lr']:g}, as there are {labels} labels")
        models.check_fits(self.model, self.dataset, config.max_new_tokens)
        self.scorer = self.scorer_for(self.model)
        self.said: dict[str, list[str]] = {}  # to each test example, before and after
        self.report = report.empty(config, versions(self.device), _model_facts(self.model, self.name), self.dataset)
        for text in (*notes, *self.dataset.notes):
            self.note(text)
        every = [example for part in ("train", "dev", "test") for example in getattr(self.dataset, part)]
        way = padding.choose(self.scorer, every)
        if way is not None:
            self.note(way)
            if config.slices > 1:
                raise UserError(
                    "--members, --groups: this model's scores change with padding, so forwards hold prompts of one "
                    "length; accepted: 1 of each"
                )

    def load_model(self, note: Callable[[str], None] = lambda text: None) -> tuple[Any, Any, str]:
        config = self.config
        torch.manual_seed(config.seeds[0] % 2**63)  # a new adapter is drawn at random
        dtype = getattr(torch, config.dtype)
        return models.load(config.model, dtype, self.device, tune=config.tune, lora_rank=config.lora_rank, note=note)

    def scorer_for(self, model: Any) -> Scorer:
        return scorer_of(model, self.tokenizer, self.dataset, self.config.max_new_tokens)

    def note(self, text: str) -> None:
        self.report["notes"].append(text)
        self.shown.note(text)

    def write_report_so_far(self) -> None:
        """So that nothing is lost later."""
        try:
            report.write_json(self.report, self.output)
        except OSError as error:
            self.note(f"report.json: {error.strerror}; the run goes on")

    def evaluate(self, part: str, limit: int | None = None) -> Score:
        """The score on a part of the data, with a progress bar."""
        examples = getattr(self.dataset, part)[:limit]
        with self.shown.bar(len(examples), f"evaluating on {part}", "example", leave=False) as bar:

            def progress(done: int) -> None:
                bar.update(done)
                self.interrupts.check()

            # As many rows as a step's forward has.
            size = self.config.batch_size * self.config.options.get("members", 1)
            return self.scorer.evaluate(examples, size, progress)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Tune, test and save; the report is written however it ends."""
        training = Training(self)
        resumed = training.resume() if self.config.resume else False
        self.output.begin()
        self.interrupts.defer()
        try:
            self._work(training, resumed)
            self.report["status"] = "completed"
        except KeyboardInterrupt as error:
            self.report |= {"status": "interrupted", "error": str(error) or "SIGINT"}
            if isinstance(error, Interrupted):
                self.report["signal"] = error.number
        except NonFiniteLossError as error:
            self.report |= {"status": "diverged", "error": str(error)}
            self.note(str(error))
        except UserError as error:
            self.report |= {"status": "failed", "error": str(error)}
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self.report |= {"status": "failed", "error": OUT_OF_MEMORY}
                raise
            self.report |= {"status": "failed", "error": str(error), "traceback": traceback.format_exc()}
            raise
        finally:
            # A signal from here on could only destroy what there is.
            self.interrupts.end()
            if self.report["status"] != "completed":
                self._keep_what_was_learnt(training)
            self.report["examples"] = report.changed(self.dataset, self.said)
            report.write(self.report, self.output)
            if self.report["status"] == "completed" and self.report["ended"] != "time limit":
                training.finish()
        return self.report

    def _work(self, training: Training, resumed: bool) -> None:
        if not resumed:
            training.score_test("before")
        if not self.config.evaluate_only:
            training.run()
            training.close()  # merges: from here on the parameters are the model
            training.return_to_best()
            training.score_test("after")
            training.measure()
            self.write_report_so_far()  # what follows may need more memory than all before
        if self.config.save_model:
            self._save_model()
            self._try_saved_model()

    def _save_model(self) -> None:
        def write(folder: Any) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        self.shown.doing("saving the model")
        self.output.write(MODEL, write)

    def _keep_what_was_learnt(self, training: Training) -> None:
        """Of a run that did not reach its end: merge and save its weights. Whatever fails here, the report follows."""
        actions = [training.close, training.return_to_best]
        if training.optimizer is not None and self.report["test"]["after"] is None:
            actions.append(training.measure)
        if self.config.save_model and self.report["curves"]["train_loss"]:
            actions.append(self._save_model)
        for action in actions:
            try:
                action()
            except Exception as error:
                told = error.strerror if isinstance(error, OSError) and error.strerror else error
                self.note(f"while ending, {action.__name__.strip('_').replace('_', ' ')} failed: {told}")

    def _try_saved_model(self) -> None:
        """Load the saved model as a user would, and compare its loss on some test examples."""
        self.shown.doing("loading the saved model to compare")
        examples = self.dataset.test[:RELOADED]
        dtype = getattr(torch, self.config.dtype)
        own = self.scorer.evaluate(examples, self.config.batch_size).loss
        self.model.to("cpu")  # a device may have no room for two
        try:
            model, _, _ = models.load(str(self.output.folder / MODEL), dtype, self.device)
            scorer = self.scorer_for(model)
            scorer.padding = self.scorer.padding
            reloaded = scorer.evaluate(examples, self.config.batch_size).loss
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.note("the saved model was not loaded again to compare: out of memory")
            return
        self.report["saved_model"] = {"examples": len(examples), "loss": own, "reloaded_loss": reloaded}
        if abs(own - reloaded) > RELOADED_TOLERANCE * abs(own):
            raise UserError(
                f"--save-model: the saved model, loaded again, has the loss {reloaded:.6g} on {len(examples)} test "
                f"examples, not {own:.6g}; its weights in {str(self.output.folder / MODEL)!r} are not the tuned ones"
            )


def _model_facts(model: Any, name: str) -> dict[str, Any]:
    tuned = models.tuned_parameters(model)
    return {
        "name": name,
        "parameters": model.num_parameters(),
        "tuned_parameters": sum(parameter.numel() for parameter in tuned.values()),
        "tuned_tensors": len(tuned),
    }
