"""The folder of a run: nothing in it is half written, and nothing of an earlier run is taken for this one's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError

#: Written by every run, and taken away when another begins.
FILES = ("report.json", "report.html", "curves.png", "curve.csv", "tensorboard")
MODEL = "model"
CHECKPOINT = "checkpoint-"
_INCOMPLETE = ".incomplete-"
_RESERVE = ".reserve"
_RESERVED = 1 << 20  # bytes; a report with its figure takes about 300,000
_FULL = ("No space left", "os error 28", "PytorchStreamWriter failed writing")


def completed(folder: Path) -> dict[str, Any] | None:
    """The report in a folder, of a run that made all its steps; one that ran out of time did not."""
    try:
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    done = found.get("status") == "completed" and found.get("ended") != "time limit"
    return found if done and not found["config"]["evaluate_only"] else None


class Output:
    """The folder, made and tried out.

    A reserved file is given up when the disk is full, so that the report still finds room.

    Args:
        name: the folder, new or existing.
        overwrite: delete the model and checkpoints of an earlier run. Its report is replaced in any case.
        resume: go on with them.
        several: it is one of several runs, which go on without those that are complete.

    Raises:
        UserError: it cannot be written, or holds what this run would destroy.
    """

    def __init__(self, name: str, *, overwrite: bool, resume: bool, several: bool = False) -> None:
        self.folder = Path(name).expanduser()
        if (self.folder / MODEL).is_file():
            raise UserError(f"--output: {str(self.folder / MODEL)!r} is a file, where the model's folder would be")
        kept = [path for path in (self.folder / MODEL, *self.checkpoints()) if path.exists()]
        if kept and not overwrite and not resume:
            resumable = bool(self.checkpoints()) if completed(self.folder) is None else several
            raise UserError(
                f"--output: {name!r} holds {kept[-1].name}/ of an earlier run; accepted: another folder, "
                f"{'--resume to go on with that run, ' if resumable else ''}or --overwrite to take it away"
            )
        self._lock: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._claimed()
            self._reserve()
        except OSError as error:
            self.close()
            raise UserError(
                f"--output: cannot write to the folder {name!r} ({error.strerror}); accepted: a folder that can be "
                "written, on a disk with room"
            ) from error
        for path in self.folder.glob(f"{_INCOMPLETE}*"):  # of a run that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._stale = [] if resume else [*kept, *(self.folder / file for file in FILES)]

    def _claimed(self) -> int:
        """The folder's descriptor, by which this run holds it until `close` or the end of the process, however it ends.

        Raises:
            UserError: another run holds it.
        """
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise UserError(
                f"--output: another run is writing to {str(self.folder)!r}; accepted: another folder, or this one when "
                "that run has ended"
            ) from None
        except OSError:
            return folder  # a file system without locks
        return folder

    def begin(self) -> None:
        """Take away what an earlier run has left; only now, as this one has loaded all that it needs."""
        for path in self._stale:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._stale = []

    def _reserve(self) -> None:
        try:
            # What a file system could compress is no reserve.
            (self.folder / _RESERVE).write_bytes(os.urandom(_RESERVED))
        except OSError:
            (self.folder / _RESERVE).unlink(missing_ok=True)  # part of one is none
            raise

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        found = {
            int(number): path
            for path in self.folder.glob(f"{CHECKPOINT}*")
            if path.is_dir() and (number := path.name.removeprefix(CHECKPOINT)).isdecimal()
        }
        return [found[step] for step in sorted(found)]

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let ``write`` make a file or folder, which takes its name only when it is complete.

        Raises:
            OSError: it cannot be written; a file of the report, not even after the reserve was given up.
        """
        incomplete = self.folder / (_INCOMPLETE + name)
        reserve = self.folder / _RESERVE
        try:
            self._written(incomplete, write)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or name not in FILES or not reserve.exists():
                raise
            reserve.unlink()
            self._written(incomplete, write)
        if (self.folder / name).is_dir():
            shutil.rmtree(self.folder / name)
        os.replace(incomplete, self.folder / name)
        if not reserve.exists():  # what was replaced may have left room for the next report's
            with contextlib.suppress(OSError):
                self._reserve()

    @staticmethod
    def _written(path: Path, write: Callable[[Path], object]) -> None:
        try:
            write(path)
        except BaseException as error:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            # safetensors and PyTorch have errors of their own for a disk that is full.
            if not isinstance(error, OSError) and any(text in str(error) for text in _FULL):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise

    def close(self) -> None:
        """Give the reserve and the folder back."""
        if self._lock is not None:
            (self.folder / _RESERVE).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
