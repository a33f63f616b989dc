"""The folder of a run: nothing in it is half written, and nothing of an earlier run is taken for this one's."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import UserError

#: Written by every run, and taken away when another begins.
FILES = ("report.json", "report.html", "curves.png", "curve.csv", "tensorboard")
MODEL = "model"
CHECKPOINT = "checkpoint-"
_INCOMPLETE = ".incomplete-"
_RESERVE = ".reserve"
_RESERVED = 1 << 20  # bytes; a report with its figure takes about 300,000


class Output:
    """The folder, made and tried out.

    A reserved file is given up when the disk is full, so that the last report still finds room.

    Args:
        name: the folder, new or existing.
        overwrite: take away the model and checkpoints of an earlier run.
        resume: go on with them.

    Raises:
        UserError: it cannot be written, or holds what this run would destroy.
    """

    def __init__(self, name: str, *, overwrite: bool, resume: bool) -> None:
        self.folder = Path(name).expanduser()
        if (self.folder / MODEL).is_file():
            raise UserError(f"--output: {str(self.folder / MODEL)!r} is a file, where the model's folder would be")
        kept = [path for path in (self.folder / MODEL, *self.checkpoints()) if path.exists()]
        if kept and not overwrite and not resume:
            raise UserError(
                f"--output: {name!r} holds {kept[-1].name}/ of an earlier run; accepted: another folder, --resume to "
                "go on with that run, or --overwrite to take it away"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._reserve()
        except OSError as error:
            raise UserError(
                f"--output: cannot write to the folder {name!r} ({error.strerror}); accepted: a folder that can be "
                "written, on a disk with room"
            ) from error
        for path in self.folder.glob(f"{_INCOMPLETE}*"):  # of a run that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._stale = [] if resume else [*kept, *(self.folder / file for file in FILES)]

    def begin(self) -> None:
        """Take away what an earlier run has left; only now, as this one has loaded all that it needs."""
        for path in self._stale:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._stale = []

    def _reserve(self) -> None:
        (self.folder / _RESERVE).write_bytes(os.urandom(_RESERVED))  # what a file system could compress is no reserve

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
            OSError: it cannot be written, even after the reserve was given up.
        """
        incomplete = self.folder / (_INCOMPLETE + name)
        try:
            self._written(incomplete, write)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (self.folder / _RESERVE).exists():
                raise
            (self.folder / _RESERVE).unlink()
            self._written(incomplete, write)
        if (self.folder / name).is_dir():
            shutil.rmtree(self.folder / name)
        os.replace(incomplete, self.folder / name)

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
            if not isinstance(error, OSError) and ("No space left" in str(error) or "os error 28" in str(error)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise

    def close(self) -> None:
        """Give the reserve back."""
        (self.folder / _RESERVE).unlink(missing_ok=True)
