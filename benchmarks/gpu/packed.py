"""The built-in model and data in pieces, for a machine without a network that takes only so much at a time.

    python -m benchmarks.gpu.packed FOLDER [--megabytes 40]     here: fetches them if need be, writes pieces and a list
    python -m benchmarks.gpu --only learning --packed FOLDER    there: puts the pieces together, and checks them

The GGUF reader's wheel goes with them, as such a machine may lack it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.harness import options

LIST, ARCHIVE, READER = "pieces.json", "packed.tar", "gguf"


class Incomplete(Exception):
    """A piece is missing, or is not what was packed."""


def pack(files: Sequence[Path], folder: Path, size: int) -> list[Path]:
    """Write the files as pieces of at most ``size`` bytes, and a list of these with their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / ARCHIVE
        with tarfile.open(archive, "w") as tar:
            for file in files:
                tar.add(file, arcname=file.name)
        pieces = []
        for number, content in enumerate(
            tqdm(_pieces(archive, size), unit="piece", total=-(-archive.stat().st_size // size))
        ):
            piece = folder / f"piece.{number:03}"
            piece.write_bytes(content)
            pieces.append({"name": piece.name, "sha256": hashlib.sha256(content).hexdigest()})
    (folder / LIST).write_text(json.dumps(pieces, indent=1))
    return [folder / piece["name"] for piece in pieces]


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as source:
        while content := source.read(size):
            yield content


def unpack(folder: Path, into: Path) -> list[Path]:
    """The files that were packed, in another folder.

    Raises:
        Incomplete: see there; nothing is unpacked then.
    """
    if not (folder / LIST).exists():
        raise Incomplete(f"--packed: {folder} has no {LIST}; accepted: a folder of `python -m benchmarks.gpu.packed`")
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole:
        for piece in json.loads((folder / LIST).read_text()):
            file = folder / piece["name"]
            content = file.read_bytes() if file.exists() else b""
            if hashlib.sha256(content).hexdigest() != piece["sha256"]:
                what = "is not what was packed" if file.exists() else "is missing"
                raise Incomplete(f"--packed: {file} {what}; bring it again")
            whole.write(content)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(into, filter="data")
            return [into / name for name in tar.getnames()]


def main(given: Sequence[str] | None = None) -> int:
    from pgap_kernels.finetune import fetch

    parser = options.parser("benchmarks.gpu.packed", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--megabytes", type=int, default=40, help="of a piece; default: %(default)s")
    args = parser.parse_args(given)
    options.check_counts(parser, args, ("megabytes",))
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, READER]
        subprocess.run(command, check=True)
        files = [fetch.fetch_archive(fetch.MODEL_ARCHIVE), fetch.fetch_data(), *Path(wheels).iterdir()]
        pieces = pack(files, args.folder, args.megabytes * 2**20)
    print(f"{args.folder}: {len(pieces)} pieces, and {LIST}, which goes with each of them")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
