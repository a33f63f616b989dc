"""One fine-tuning run, from loading to the report."""

from __future__ import annotations

import inspect
import math
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..optim import NonFiniteLossError, Signal
from . import data, models, report
from .baseline import BASELINES
from .config import Config, UserError
from .scoring import Scorer
from .snapshot import Snapshot
from .timing import StepClock

BAR: dict[str, Any] = {"unit": "step", "dynamic_ncols": True}


def run(config: Config) -> dict[str, Any]:
    """Fine-tune as ``config`` says; write ``report.json`` and ``curves.png`` to its output folder.

    Progress goes to stderr. Ctrl-C or a loss that is not finite ends the run early: the report then holds what was
    measured so far, and the weights are those after the last completed step.

    Returns:
        The report as written (`report.empty` lists its entries); ``report["status"]`` is ``"completed"``,
        ``"interrupted"`` or ``"diverged"``.

    Raises:
        UserError: the model, the data or an option cannot be used.
        KeyboardInterrupt: Ctrl-C before anything was measured.
    """
    output = _output_folder(config.output)
    device = _device(config.device)
    model, tokenizer, model_name = models.load(config.model, getattr(torch, config.dtype), device)
    dataset = data.load(config, tokenizer)
    scorer = Scorer(model, dataset.label_tokens, tokenizer.pad_token_id)
    result = report.empty(config, _versions(device), _model_facts(model, model_name), dataset)
    for text in dataset.notes:
        _note(result, text)
    try:
        _tune_and_compare(config, model, scorer, dataset, output, result)
        result["status"] = "completed"
    except KeyboardInterrupt:
        result["status"] = "interrupted"
    except NonFiniteLossError as error:
        result["status"] = "diverged"
        _note(result, str(error))
    if config.save_model:
        model.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
    report.write(result, output)
    return result


def _tune_and_compare(
    config: Config, model: Any, scorer: Scorer, dataset: data.Dataset, output: Path, result: dict[str, Any]
) -> None:
    start = Snapshot(models.tuned_parameters(model).values(), output) if config.compare else None
    _progress("evaluating on test before")
    result["test"]["before"] = vars(scorer.evaluate(dataset.test, config.batch_size))
    _tune(config, model, scorer, dataset, result)
    _progress("evaluating on test after")
    result["test"]["after"] = vars(scorer.evaluate(dataset.test, config.batch_size))
    if start is not None:
        # After the run, so that the peak memory noted for the run is its own.
        tuned = Snapshot(models.tuned_parameters(model).values(), output)
        try:
            start.restore()
            _run_baseline(config, model, scorer, dataset, result)
        finally:
            tuned.restore()


def _tune(config: Config, model: Any, scorer: Scorer, dataset: data.Dataset, result: dict[str, Any]) -> None:
    optimizer = config.make_optimizer(model)
    result["mode"] = {"name": optimizer.mode, "reason": optimizer.mode_reason}
    clock = StepClock()
    dev = dataset.dev[: config.eval_limit]
    _reset_peak_memory(model.device)

    def evaluate(step: int) -> str:
        score = scorer.evaluate(dev, config.batch_size)
        result["curves"]["dev"].append({"step": step, "loss": score.loss, "accuracy": score.accuracy})
        return f"{score.accuracy:.3f}"

    try:
        accuracy = evaluate(0)
        with tqdm(total=config.steps, desc=config.method, **BAR) as bar:
            for step in range(config.steps):
                loss = _timed_step(optimizer, clock, config, scorer, dataset, step)
                result["curves"]["train_loss"].append(loss)
                if math.isfinite(loss) and optimizer.last != Signal():  # a skipped step leaves the one before
                    signal = {name: getattr(optimizer.last, name) for name in report.SIGNAL}
                    result["curves"]["signal"].append({"step": step + 1, **signal})
                if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                    accuracy = evaluate(step + 1)
                bar.set_postfix(loss=f"{loss:.3f}", dev_accuracy=accuracy, refresh=False)
                bar.update()
    finally:
        optimizer.detach()  # merges: from here on the parameters are the model
        window = getattr(optimizer, "window", 1)
        refreshes = max(1, math.ceil(clock.steps / window))
        result["timing"] = _timing(clock, clock.seconds["refresh"] / refreshes, window)
        result["weight_passes"] = optimizer.passes
        result["peak_memory_mib"] = _peak_memory_mib(model.device)


def _run_baseline(config: Config, model: Any, scorer: Scorer, dataset: data.Dataset, result: dict[str, Any]) -> None:
    """A few steps of the method in plain PyTorch, from the same weights and on the same batches."""
    make = BASELINES[config.method]
    known = inspect.signature(make).parameters
    options = {name: value for name, value in config.options.items() if name in known}
    if "full_refresh" in known:
        options["full_refresh"] = config.compare_full_refresh
    _reset_peak_memory(model.device)
    method: Any = make(model, **options, seed=config.seed)
    clock = StepClock()
    losses: list[float] = []
    with tqdm(total=config.compare_steps, desc=f"{config.method} in plain PyTorch", **BAR) as bar:
        for step in range(config.compare_steps):
            losses.append(_timed_step(method, clock, config, scorer, dataset, step))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    result["baseline"] = {
        "losses": losses,
        "timing": _timing(clock, getattr(method, "refresh_seconds", 0.0), getattr(method, "window", 1)),
        "peak_memory_mib": _peak_memory_mib(model.device),
    }
    if not options.get("full_refresh", True):
        result["baseline"]["refresh_estimated"] = True
        _note(
            result,
            "the refresh of the baseline is estimated from one probe and one SVD per distinct shape, each times its "
            "count; its losses are therefore not those of P-GAP",
        )


def _timed_step(
    optimizer: Any, clock: StepClock, config: Config, scorer: Scorer, dataset: data.Dataset, step: int
) -> float:
    start = time.perf_counter()
    members, groups = (getattr(optimizer, name, 1) for name in ("members", "groups"))
    batch = scorer.encode(data.batch(dataset.train, config.batch_size, config.seed, step) * members)
    loss_of = scorer.loss if members * groups == 1 else scorer.losses
    loss = optimizer.step(lambda: loss_of(batch))
    clock.add(time.perf_counter() - start, optimizer.seconds)
    return loss


def _timing(clock: StepClock, refresh_seconds: float, window: int) -> dict[str, Any]:
    return {
        "steps": clock.steps,
        "seconds": clock.seconds,
        "refresh_seconds": refresh_seconds,
        "window": window,
        "seconds_per_step": clock.per_step(refresh_seconds, window),
    }


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # The whole process since it began, in KiB (macOS: bytes).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _output_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create the folder {name!r} ({error.strerror})") from error
    return folder


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: got {name!r} ({reason}); accepted: auto, cpu, cuda, cuda:0, ...") from error
    return device


def _versions(device: torch.device) -> dict[str, Any]:
    return {
        "pgap_kernels": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _model_facts(model: Any, name: str) -> dict[str, Any]:
    tuned = models.tuned_parameters(model)
    return {
        "name": name,
        "parameters": model.num_parameters(),
        "tuned_parameters": sum(parameter.numel() for parameter in tuned.values()),
        "tuned_tensors": len(tuned),
    }


def _note(result: dict[str, Any], text: str) -> None:
    result["notes"].append(text)
    print(f"note: {text}", file=sys.stderr)


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)
