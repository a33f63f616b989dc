"""Runs of ``finetune`` that end early, go on later, or come in several seeds; and what is written when."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console
from support.finetune_tiny import csv_file, tiny_model

from pgap_kernels.finetune import (
    Config,
    UserError,
    checkpoint,
    interrupts,
    job,
    models,
    output,
    run,
    shown,
    table,
    training,
)
from pgap_kernels.finetune.scoring import Scorer

SMALL = {
    "schedule": "constant",
    "steps": 12,
    "batch_size": 4,
    "eval_every": 4,
    "train_size": 40,
    "dev_size": 8,
    "test_size": 8,
}
METHODS = {
    "mezo": {"lr": 1e-2},
    "pgap": {"rank": 4, "window": 5, "probes": 1, "lr": 1e-2},
    "helene": {"lr": 1e-3},
    "dizo": {"lr": 1e-2},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def config_for(llama, tmp_path):
    table = str(csv_file(tmp_path / "data.csv"))

    def make(name="run", method="mezo", **given):
        given = {"options": METHODS[method]} | SMALL | given
        return Config(model=str(llama), data=table, device="cpu", output=str(tmp_path / name), method=method, **given)

    return make


def saved(folder) -> dict[str, torch.Tensor]:
    return models.tuned_parameters(models.load(str(Path(folder) / "model"), torch.float32, torch.device("cpu"))[0])


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def steps_at(monkeypatch, number, what):
    """Do something in the closure of a step's first forward."""
    original, calls = Scorer.loss, []

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == 2 * number - 1:
            what()
        return original(self, batch)

    monkeypatch.setattr(Scorer, "loss", loss)


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, schedule", [("mezo", "cosine"), *((method, "constant") for method in METHODS)])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(method, schedule, config_for, monkeypatch):
    whole = run(config_for("whole", method, save_model=True, schedule=schedule, warmup=2))
    with monkeypatch.context() as patch:
        done = training.Training._record

        def cut(self, loss):
            done(self, loss)
            if self.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(training.Training, "_record", cut)
        ended = run(config_for("cut", method, schedule=schedule, warmup=2))
    assert ended["status"] == "interrupted" and ended["signal"] == signal.SIGTERM
    resumed = run(config_for("cut", method, save_model=True, resume=True, schedule=schedule, warmup=2))
    assert resumed["status"] == "completed" and "resumed after step 4" in resumed["notes"]
    for name in ("train_loss", "lr"):
        assert resumed["curves"][name] == whole["curves"][name]
    assert [point["step"] for point in resumed["curves"]["dev"]] == [0, 4, 8, 12]
    assert resumed["test"] == whole["test"] and resumed["examples"] == whole["examples"]
    assert resumed["timing"]["steps"] == 12 and resumed["weight_passes"] == pytest.approx(whole["weight_passes"])
    assert equal(saved(config_for("cut").output), saved(config_for("whole").output))
    assert not list(Path(config_for("cut").output).glob("checkpoint-*")), "they have served"


def test_what_ran_out_of_time_goes_on_and_what_is_complete_does_not(config_for, llama, tmp_path):
    first = run(config_for(steps=60, time_limit=1e-3, checkpoint_every=1))
    assert first["ended"] == "time limit" and len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    offer = r"^--output: .* of an earlier run; accepted: another folder, --resume to go on .* or --overwrite"
    with pytest.raises(UserError, match=offer):
        run(config_for(steps=60))
    again = run(config_for(steps=60, resume=True, checkpoint_every=1))
    assert again["ended"] is None and len(again["curves"]["train_loss"]) == 60
    with pytest.raises(UserError, match=r"^--resume: the run in .* is complete"):
        run(config_for(steps=60, resume=True, checkpoint_every=1))
    seeds = run(config_for("seeds", seed=(0, 1), steps=3))
    with pytest.raises(UserError, match=r"^--steps: got 4 with --resume; .* begun with 3|^--lr: got"):
        run(config_for("seeds", seed=(0, 1), steps=3, resume=True, options={"lr": 5.0}))
    assert run(config_for("seeds", seed=(0, 1), steps=3, resume=True))["summary"] == seeds["summary"]
    for more in ({"steps": 5}, {"save_model": True}):
        with pytest.raises(UserError, match=r"^--resume: the run in '.*seed-0' is complete"):
            run(config_for("seeds", seed=(0, 1), resume=True, **{"steps": 3} | more))
    with pytest.raises(UserError, match=r"^--resume: got it with --overwrite"):
        config_for(resume=True, overwrite=True)


def test_a_time_limit_shorter_than_an_evaluation_gets_on(config_for, tmp_path):
    limited = {"steps": 10**6, "eval_every": 10**6, "time_limit": 1e-3}
    first = len(run(config_for(**limited))["curves"]["train_loss"])
    assert len(run(config_for(**limited, resume=True))["curves"]["train_loss"]) > first
    run(config_for("none", **limited, checkpoint_every=0))
    assert not list((tmp_path / "none").glob("checkpoint-*"))


def test_a_refused_resumption_leaves_the_report_as_it_was(config_for, tmp_path):
    run(config_for(steps=60, time_limit=1e-3, checkpoint_every=1))
    before = (tmp_path / "run" / "report.json").read_text()
    for given in ({"batch_size": 2}, {"test_size": 4}):
        with pytest.raises(UserError, match=r"^--(batch|test)-size: got"):
            run(config_for(steps=60, resume=True, checkpoint_every=1, **given))
    (tmp_path / "run" / "checkpoint-old").mkdir()
    with pytest.raises(UserError, match=r"^--model: there is no file"):
        run(Config(model="./nowhere", output=str(tmp_path / "run"), overwrite=True))
    assert (tmp_path / "run" / "report.json").read_text() == before


def test_programs_may_give_paths_and_other_libraries_numbers(config_for, tmp_path):
    np = pytest.importorskip("numpy")
    config = config_for(steps=np.int64(2), options={"lr": np.float32(1e-3)}, seed=np.int64(3), time_limit=np.float64(9))
    result = run(replace(config, output=tmp_path / "paths", data=Path(config.data)))
    assert result["status"] == "completed" and result["config"]["steps"] == 2
    for given in ({"steps": "3"}, {"steps": 3.5}, {"time_limit": "1"}, {"options": 3}, {"output": 3}, {"template": 3}):
        with pytest.raises(UserError, match=rf"^(--)?{next(iter(given)).replace('_', '-')}: got"):
            Config(**{"method": "mezo", **given})


def test_resuming_begins_where_there_is_no_checkpoint_and_refuses_another_run(config_for, llama, tmp_path):
    assert "there is no checkpoint to resume from: the run begins" in run(config_for(resume=True))["notes"]
    run(config_for(keep_checkpoints=True, checkpoint_every=3, steps=7, overwrite=True))
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-6"]
    longer = run(config_for(resume=True, keep_checkpoints=True, checkpoint_every=3, steps=9))
    assert len(longer["curves"]["train_loss"]) == 9 and "resumed after step 6" in longer["notes"]
    with pytest.raises(UserError, match=r"^--batch-size: got 2 with --resume; .* begun with 4"):
        run(config_for(resume=True, keep_checkpoints=True, checkpoint_every=3, batch_size=2))
    with pytest.raises(UserError, match=r"^--lr: got 0.00024 with --resume; .* begun with 0.01"):
        run(config_for(resume=True, keep_checkpoints=True, checkpoint_every=3, options={}))
    csv_file(tmp_path / "data.csv", extra=[("good film", 1)])
    with pytest.raises(UserError, match=r"^--resume: the examples of .* have changed"):
        run(config_for(resume=True, keep_checkpoints=True, checkpoint_every=3))
    csv_file(tmp_path / "data.csv")
    for file, content in (("run.json", "{"), ("optimizer.pt", "x"), ("weights.safetensors", "x")):
        path = tmp_path / "run" / "checkpoint-6" / file
        before = path.read_bytes()
        path.write_text(content)
        with pytest.raises(UserError, match=r"^--resume: .*checkpoint-6' is damaged .* delete it"):
            run(config_for(resume=True, keep_checkpoints=True, checkpoint_every=3))
        path.write_bytes(before)


@pytest.mark.slow(seconds=40)
def test_killed_at_any_moment_and_resumed_is_the_uninterrupted_run(config_for, tmp_path):
    whole = run(config_for("whole", "pgap", save_model=True, steps=60))
    expected, draw = saved(tmp_path / "whole"), random.Random(0)
    context = multiprocessing.get_context("forkserver")  # its processes begin with everything imported
    context.set_forkserver_preload(["pgap_kernels.finetune.job", "transformers.models.llama.modeling_llama"])

    def resumed(seconds: float | None = None) -> bool:
        """A run that goes on where the last was killed, killed in its turn; whether it was, or completed."""
        for name in ("model", "report.json"):  # one that was not killed in time is complete, and cannot be resumed
            subprocess.run(["rm", "-rf", str(tmp_path / "killed" / name)], check=True)
        config = config_for("killed", "pgap", save_model=True, steps=60, resume=True, quiet=True)
        process = context.Process(target=run, args=(config,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or equal(saved(tmp_path / "killed"), expected)
        return process.exitcode == -signal.SIGKILL

    assert not resumed()
    shutil.rmtree(tmp_path / "killed")
    begun = time.monotonic()
    assert not resumed()
    seconds = time.monotonic() - begun
    shutil.rmtree(tmp_path / "killed")
    killed = 0
    for _ in range(60):
        killed += resumed(draw.uniform(0, 1) * seconds)
        if killed == 12:
            break
    assert killed == 12 and not resumed()
    written = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert written["curves"]["train_loss"] == whole["curves"]["train_loss"]


# ---- how runs end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_with_a_report_and_the_last_steps_weights(number, config_for, monkeypatch, tmp_path, capfd):
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)  # whoever runs this may have asked for it to be ignored
    run(config_for("four", steps=4, mode="scratch", save_model=True))

    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    steps_at(monkeypatch, 5, twice)
    result = run(config_for(steps=1000, mode="scratch", save_model=True))
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["status"] == "interrupted" and written["signal"] == result["signal"] == number
    assert len(written["curves"]["train_loss"]) == written["timing"]["steps"] in (4, 5)
    assert "already ending" in capfd.readouterr().err
    if len(written["curves"]["train_loss"]) == 4:
        assert equal(saved(tmp_path / "run"), saved(tmp_path / "four"))
    assert signal.getsignal(number) is before


def test_any_exception_leaves_a_report_that_says_failed(config_for, monkeypatch, tmp_path):
    def broken():
        raise KeyError("something")

    steps_at(monkeypatch, 6, broken)
    with pytest.raises(KeyError):
        run(config_for())
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["status"] == "failed" and "something" in written["error"] and "broken" in written["traceback"]
    assert len(written["curves"]["train_loss"]) == 5 and [p["step"] for p in written["curves"]["dev"]] == [0, 4]
    assert "failed" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.ENOMEM, "Cannot allocate"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)  # fmt: skip
def test_out_of_memory_says_what_to_lower(error, config_for, monkeypatch, tmp_path):
    def full():
        raise error

    steps_at(monkeypatch, 3, full)
    with pytest.raises(UserError, match=r"^out of memory: lower --batch-size"):
        run(config_for())
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "failed"


def test_a_model_that_memory_is_too_small_for_says_what_to_lower(config_for, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "load", full)
    with pytest.raises(UserError, match=r"^out of memory: lower --batch-size"):
        run(config_for())


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), BrokenPipeError()])
def test_a_terminal_that_was_closed_costs_neither_report_nor_model(error, config_for, monkeypatch, tmp_path):
    """SIGHUP comes with it, and from a shell twice."""

    def gone(*_, **__):
        raise error

    monkeypatch.setattr(shown.tqdm, "write", gone)
    monkeypatch.setattr(interrupts.os, "write", gone)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    steps_at(monkeypatch, 5, lambda: [os.kill(os.getpid(), signal.SIGHUP) for _ in range(2)])
    assert run(config_for(save_model=True))["status"] == "interrupted"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["signal"] == signal.SIGHUP
    assert saved(tmp_path / "run")


def test_whatever_fails_while_a_run_ends_its_report_is_written(config_for, monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("no such generation config")

    monkeypatch.setattr(job.Job, "_save_model", broken)
    with pytest.raises(ValueError, match="generation config"):
        run(config_for(save_model=True))
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["status"] == "failed" and written["test"]["after"]


def test_a_signal_between_two_runs_ends_the_next():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with interrupts.Interrupts() as own:
        own.defer()
        own.end()
        os.kill(os.getpid(), signal.SIGTERM)
        own.check()
        with pytest.raises(interrupts.Interrupted, match="SIGTERM"):
            own.again()


def test_a_report_is_there_from_the_first_evaluation_on(config_for, monkeypatch, tmp_path):
    seen = []
    steps_at(monkeypatch, 6, lambda: seen.append(json.loads((tmp_path / "run" / "report.json").read_text())))
    run(config_for())
    assert seen[0]["status"] == "running" and len(seen[0]["curves"]["train_loss"]) == 4
    assert seen[0]["test"]["before"] is not None


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ((checkpoint, "save_file"), OSError(errno.ENOSPC, "No space left on device")),
        ((torch, "save"), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
    ],
    ids=["weights", "optimizer"],
)
def test_a_full_disk_loses_a_checkpoint_but_not_the_run(writer, error, config_for, monkeypatch, tmp_path):
    def full(*_):
        raise error

    monkeypatch.setattr(*writer, full)
    result = run(config_for())
    assert result["status"] == "completed"
    assert "no checkpoint of step 4: No space left on device; the run goes on" in result["notes"]


def test_two_runs_do_not_write_to_one_folder(config_for, tmp_path):
    held = output.Output(str(tmp_path / "run"), overwrite=False, resume=False)
    with pytest.raises(UserError, match=r"^--output: another run is writing to '.*run'; accepted: another folder"):
        run(config_for())
    assert (tmp_path / "run" / ".reserve").exists(), "it is the other run's"
    held.close()
    assert run(config_for())["status"] == "completed"


def test_the_report_has_room_reserved(monkeypatch, tmp_path):
    folder = output.Output(str(tmp_path), overwrite=False, resume=False)
    (tmp_path / "report.json").write_text("old")
    tries = []

    def write(path):
        path.write_text("half")
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        assert not (tmp_path / ".reserve").exists()
        path.write_text("new")

    folder.write("report.json", write)
    assert (tmp_path / "report.json").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", ".reserve"}, "there is room for the next"
    tries.clear()
    with pytest.raises(OSError, match="No space"):
        folder.write("checkpoint-4", write)
    assert (tmp_path / ".reserve").exists(), "it is for the report"
    monkeypatch.setattr(folder, "_reserve", lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    tries.clear()
    folder.write("report.json", write)
    tries.clear()
    with pytest.raises(OSError, match="No space"):
        folder.write("report.json", write)
    assert (tmp_path / "report.json").read_text() == "new"


def test_an_output_folder_that_cannot_be_written_is_refused_before_loading(config_for, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", read_only)
        with pytest.raises(UserError, match=r"^--output: cannot write .*Read-only"):
            run(config_for())
    (tmp_path / "run" / "model").write_text("a file")
    with pytest.raises(UserError, match=r"^--output: .*model' is a file"):
        run(config_for())


def test_results_of_an_earlier_run_are_taken_away_or_refused(config_for, tmp_path):
    run(config_for(save_model=True))
    message = r"^--output: .*run' holds model/ of an earlier run; accepted: another folder, or --overwrite"
    with pytest.raises(UserError, match=message):  # --resume would be refused, as the run is complete
        run(config_for())
    with pytest.raises(UserError, match="--resume to go on"):  # which leaves out those of several that are complete
        output.Output(str(tmp_path / "run"), overwrite=False, resume=False, several=True)
    with pytest.raises(UserError, match=r"^--eps: got -1"):
        run(config_for(overwrite=True, options={"lr": 1e-3, "eps": -1.0}))
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / ".reserve").exists()
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(UserError, match=message):
        run(config_for())
    with pytest.raises(UserError, match=r"^--resume: .*run' holds model/ but no checkpoint to go on from"):
        run(config_for(resume=True))
    (tmp_path / "run" / "mine.txt").write_text("stays")
    assert run(config_for(overwrite=True, steps=1))["status"] == "completed"
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "mine.txt").exists()


def test_limits_end_a_run_in_order(config_for):
    assert run(config_for(steps=10**6, time_limit=1e-3))["ended"] == "time limit"
    assert run(config_for("whole", steps=1, time_limit=1e-9))["ended"] is None, "it made all its steps"
    tired = run(config_for("tired", steps=10**6, patience=2, options={"lr": 0.0}, mode="scratch"))
    assert tired["ended"] == "patience" and [point["step"] for point in tired["curves"]["dev"]] == [0, 4, 8]
    assert tired["status"] == "completed" and tired["test"]["after"] == tired["test"]["before"]


@pytest.mark.parametrize("method", ["mezo", "pgap"])
def test_the_best_weights_are_kept(method, config_for, monkeypatch, tmp_path):
    losses = iter([1.0, 0.5, 0.7, 0.9])  # on dev: the second is best
    evaluate = job.Job.evaluate

    def scored(self, part, limit=None):
        score = evaluate(self, part, limit)
        return score if part == "test" else type(score)(next(losses), score.metrics, score.examples)

    monkeypatch.setattr(job.Job, "evaluate", scored)
    result = run(config_for("best", method, keep="best", save_model=True))
    assert result["kept_step"] == 4
    losses = iter([1.0, 0.5])
    run(config_for("four", method, steps=4, save_model=True))
    assert equal(saved(tmp_path / "best"), saved(tmp_path / "four"))
    losses = iter([1.0, 0.5, 0.7])
    with monkeypatch.context() as patch:
        steps_at(patch, 8 if method == "mezo" else 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = run(config_for("ended", method, keep="best", save_model=True))
    assert result["status"] == "interrupted" and result["kept_step"] == 4 < len(result["curves"]["train_loss"])
    assert equal(saved(tmp_path / "ended"), saved(tmp_path / "four"))


def test_evaluate_only_makes_no_step(config_for, tmp_path):
    result = run(config_for(evaluate_only=True))
    assert result["status"] == "completed" and result["test"]["before"] and not result["test"]["after"]
    assert result["curves"]["train_loss"] == [] and result["mode"] is None
    assert "Test, 8 examples" in (tmp_path / "run" / "report.html").read_text()


# ---- what is written ------------------------------------------------------------------------------------------------


def test_several_seeds_make_one_report(config_for, tmp_path):
    result = run(config_for(seed=(0, 7), steps=2))
    assert [one["config"]["seed"] for one in result["runs"]] == [0, 7]
    after = [one["test"]["after"]["loss"] for one in result["runs"]]
    assert after[0] != after[1] and result["summary"]["after"]["loss"]["values"] == after
    assert result["summary"]["after"]["loss"]["mean"] == pytest.approx(sum(after) / 2)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["summary"] == result["summary"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "seed-7/report.html" in page and (tmp_path / "run" / "seed-7" / "report.html").is_file()
    again = run(config_for(seed=(0, 7, 8), steps=2, resume=True))
    assert len(again["runs"]) == 3 and again["runs"][:2] == json.loads(json.dumps(result["runs"]))
    with pytest.raises(UserError, match=r"^--seed: got \(1, 1\)"):
        config_for(seed=(1, 1))


def test_a_report_of_some_seeds_says_that_it_is_of_some(config_for, monkeypatch, tmp_path):
    told = []
    read = lambda: json.loads((tmp_path / "run" / "report.json").read_text())  # noqa: E731
    whole = job.Job.run

    def second_fails(self):
        if self.config.seed == 0:
            return whole(self)
        told.append(read()["status"])
        raise KeyError("something")

    monkeypatch.setattr(job.Job, "run", second_fails)
    with pytest.raises(KeyError):
        run(config_for(seed=(0, 7), steps=2))
    assert told == ["running"] and read()["status"] == "failed" and len(read()["runs"]) == 1


def test_the_curve_is_a_table_that_spreadsheets_read(config_for, tmp_path):
    result = run(config_for(schedule="linear"))
    with (tmp_path / "run" / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(13))
    assert [float(row["train_loss"]) for row in rows[1:]] == result["curves"]["train_loss"]
    assert [float(row["lr"]) for row in rows[1:]] == pytest.approx([1e-2 * (12 - n) / 12 for n in range(12)])
    assert [row["step"] for row in rows if row["dev_loss"]] == ["0", "4", "8", "12"]


def test_the_page_is_whole_in_itself_and_shows_what_was_wrong(config_for, tmp_path):
    result = run(config_for(compare=True, compare_steps=2, options={"lr": 1e-2}))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page and not re.search(r"(src|href)=\"(?!#|seed)", page)
    for part in ("before", "after", "plain PyTorch", "ratio", "Configuration", "Labels"):
        assert part in page
    wrong = [example for kind in result["examples"].values() for example in kind]
    assert wrong and all(example["prompt"] in page for example in wrong)


def test_tensorboard_gets_the_curves(config_for, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config_for(tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("dev/accuracy")] == [0, 4, 8, 12]
    run(config_for(tensorboard=True, steps=2))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1, "runs would be one curve"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training._writer(), "add_scalar", full)
    result = run(config_for(tensorboard=True, steps=2))
    assert result["status"] == "completed" and any("goes on without it" in note for note in result["notes"])


def test_quiet_says_nothing(config_for, capsys):
    run(config_for(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_the_saved_model_is_tried(config_for, monkeypatch):
    result = run(config_for(save_model=True))
    tried = result["saved_model"]
    assert tried["reloaded_loss"] == pytest.approx(tried["loss"], rel=1e-6)
    load, loaded = models.load, []

    def once(*given, **options):
        loaded.append(given)
        if len(loaded) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", once)
        result = run(config_for(save_model=True, overwrite=True))
    assert result["status"] == "completed" and result["saved_model"] is None
    assert "the saved model was not loaded again to compare: out of memory" in result["notes"]
    save = job.Job._save_model

    def spoilt(self):
        with torch.no_grad():
            for weight in models.tuned_parameters(self.model).values():
                weight.mul_(1.5)
        save(self)
        with torch.no_grad():
            for weight in models.tuned_parameters(self.model).values():
                weight.div_(1.5)

    monkeypatch.setattr(job.Job, "_save_model", spoilt)
    with pytest.raises(UserError, match=r"^--save-model: the saved model, loaded again, has the loss"):
        run(config_for(save_model=True, overwrite=True))


@pytest.mark.parametrize("seed", [0, (0, 1)])
def test_losses_that_are_not_finite_are_shown_as_gaps(seed, config_for, tmp_path):
    """The first step makes all weights NaN, the others are skipped, and so the test loss is NaN."""
    options = {"lr": 1e30, "on_nonfinite": "skip"}
    result = run(config_for(steps=4, seed=seed, options=options))
    assert result["status"] == "diverged"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "diverged"
    assert "–" in (tmp_path / "run" / "report.html").read_text()
    table.print_table(result, Console(file=io.StringIO()))
    if seed == 0:
        assert any("the loss on test is" in note for note in result["notes"])
        assert (tmp_path / "run" / "curves.png").is_file()


def test_plain_pytorch_has_the_same_objective(config_for):
    result = run(config_for(compare=True, compare_steps=3, objective="accuracy", options={"lr": 1e-2, "eps": 0.1}))
    shares = {n / 4 for n in range(5)}
    assert {*result["baseline"]["losses"], *result["curves"]["train_loss"]} <= {
        (a + b) / 2 for a in shares for b in shares
    }


def test_turns_with_plain_pytorch_see_the_same_batches(config_for, monkeypatch):
    batches = []
    loss = Scorer.loss
    monkeypatch.setattr(Scorer, "loss", lambda self, batch: batches.append(batch) or loss(self, batch))
    result = run(config_for(compare=True, compare_steps=3, options={"lr": 1e-2}))
    tokens = [batch.inputs["input_ids"] for batch in batches]
    # Ours, ours and theirs of three steps in turns: two forwards each.
    for step in range(3):
        four = tokens[2 + 4 * step : 6 + 4 * step]
        assert all(torch.equal(four[0], other) for other in four)
    assert len(batches) == 2 * 12 + 2 * 3
    assert result["baseline"]["turns"]["steps"] == 3 and all(map(math.isfinite, result["baseline"]["losses"]))
