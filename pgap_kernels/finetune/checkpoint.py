"""A run on disk: weights, optimizer and all that was measured, so that it can go on to the same bits."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .config import Config
from .data import Dataset
from .errors import UserError
from .options import flag
from .output import CHECKPOINT, Output

#: Options that a run may be resumed with other values of: no step depends on them.
FREE = {
    "output", "resume", "overwrite", "save_model", "tensorboard", "quiet", "time_limit", "patience",
    "keep_checkpoints", "compare", "compare_steps", "compare_full_refresh", "device",
}  # fmt: skip
#: Schedules that do not depend on the number of steps, so that a run may go on to more.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


def save(
    output: Output, step: int, weights: dict[str, nn.Parameter], optimizer: dict[str, Any], run: dict[str, Any]
) -> None:
    """Write a checkpoint.

    Args:
        step: steps taken.
        weights: the tuned ones, merged.
        optimizer: its state and the scheduler's.
        run: what else `load` gives back, ready for JSON; with "config" and "data".
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(
            {name: weight.detach().contiguous() for name, weight in weights.items()}, folder / "weights.safetensors"
        )
        torch.save(optimizer, folder / "optimizer.pt")
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")

    output.write(f"{CHECKPOINT}{step}", write)


def load(
    output: Output, config: Config, data: Dataset, device: torch.device
) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The last checkpoint's folder, its optimizer's state and what was measured; None if there is none.

    Raises:
        UserError: it is damaged, or of a run with other options or other data.
    """
    found = output.checkpoints()
    if not found:
        return None
    folder = found[-1]
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        optimizer = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
        before = run["config"]
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition(".")[0]
        raise UserError(f"--resume: {str(folder)!r} is damaged ({reason}); delete it to resume from before") from error
    check_options(config, before, str(output.folder))
    if run["step"] > config.steps:
        raise UserError(f"--steps: got {config.steps} with --resume; the run has made {run['step']} already")
    if run["data"] != fingerprint(data):
        raise UserError(f"--resume: the examples of {config.data!r} have changed since the run was begun")
    return folder, optimizer, run


def check_options(config: Config, before: dict[str, Any], folder: str) -> None:
    """Refuse to go on with a run that was begun with other options, where steps depend on them.

    Raises:
        UserError: naming the option.
    """
    now = json.loads(json.dumps(config.as_dict()))
    if config.takes_tuned_rate and before.get("lr") == now["lr"] / 2:  # many labels, if the data has not been read yet
        now["lr"] = before["lr"]
    free = FREE | ({"steps"} if config.schedule in ENDLESS else set())
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            why = f", as --schedule {config.schedule} depends on them" if name == "steps" else ""
            raise UserError(
                f"{flag(name)}: got {value!r} with --resume; the run in {folder!r} was begun with "
                f"{before.get(name)!r}; accepted: the same{why}"
            )


@torch.no_grad()
def load_weights(folder: Path, weights: dict[str, nn.Parameter]) -> None:
    """Write a checkpoint's weights into a model's.

    Raises:
        UserError: it is damaged, or of another model.
    """
    try:
        saved = load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {str(folder)!r} is damaged ({error}); delete it to resume from before") from error
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {name: tuple(weight.shape) for name, weight in saved.items()}:
        raise UserError(f"--resume: {str(folder)!r} holds the weights of another model, or of another --tune")
    for name, weight in weights.items():
        weight.copy_(saved[name])


def prune(output: Output, keep: set[int]) -> None:
    """Delete all checkpoints but those of some steps."""
    for folder in output.checkpoints():
        if int(folder.name.removeprefix(CHECKPOINT)) not in keep:
            shutil.rmtree(folder)


def fingerprint(data: Dataset) -> str:
    """Of the examples that steps and evaluations use."""
    digest = hashlib.sha256()
    for part in (data.train, data.dev, data.test):
        for example in part:
            digest.update(repr((example.tokens, example.label, example.answers)).encode())
    return digest.hexdigest()
