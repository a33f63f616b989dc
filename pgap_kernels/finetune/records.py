"""Records of a data set, a dict each: from CSV, TSV, JSON Lines and Parquet files, `datasets` folders, and the hub."""

from __future__ import annotations

import codecs
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import fetch
from .builtin import BUILT_IN, Record
from .errors import UserError

ACCEPTED = (
    f"{', '.join(map(repr, BUILT_IN))}, a file that ends in .csv, .tsv, .jsonl or .parquet, a folder of the library "
    "datasets, or the id of a data set on the hub, with its configuration if it has several (ID:NAME)"
)


def read(name: str, split: str | None = None, option: str = "--data") -> tuple[list[Record], str]:
    """All records, and a name for reports.

    Args:
        name: as ``ACCEPTED`` says.
        split: of a `datasets` folder or a data set on the hub; None for train with ``--data``, else test.
        option: to blame.

    Raises:
        UserError: it cannot be read.
    """
    if split is not None and (name in BUILT_IN or Path(name).expanduser().is_file()):
        raise UserError(_has_no_splits(name, split, option))
    if name in BUILT_IN:
        found = BUILT_IN[name]
        return found.read(fetch.fetch_data(found.train)), found.title
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"{option}: got {name!r}; accepted: {ACCEPTED}")
        try:
            return READERS[path.suffix.lower()](path), path.name
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{option}: {name!r} is not UTF-8 text{_where_not_utf8(path)}") from error
        except OSError as error:
            raise UserError(f"{option}: cannot read {name!r} ({error.strerror or error})") from error
    if path.is_dir():
        return _dataset(str(path), split, option), path.name
    if name.startswith((".", "/", "~")) or path.suffix.lower() in READERS or name.endswith("/") or name.count("/") > 1:
        raise UserError(f"{option}: there is no file or folder {name!r}; accepted: {ACCEPTED}")
    return _dataset(name, split, option), name


def _where_not_utf8(path: Path) -> str:
    """The line, and how to convert the file."""
    content = path.read_bytes()
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:  # the reader's is of a part of the file
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        encoding = "UTF-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "WINDOWS-1252"
        return (
            f" (byte 0x{byte:02x} in line {line}); accepted: UTF-8; to convert it, if it is {encoding}: "
            f"iconv -f {encoding} -t UTF-8 {path.name} > utf8{path.suffix}"
        )
    return ""


def _has_no_splits(name: str, split: str, option: str) -> str:
    if option == "--data":
        return f"--split: got {split!r}, but {name!r} has no splits; accepted: without --split"
    return f"--test-split: got {split!r}, but {name!r} has no splits; accepted: a file of its own, as --test-data"


def _separated(delimiter: str) -> Callable[[Path], list[Record]]:
    def records(path: Path) -> list[Record]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.readlines()
        kind = "CSV" if delimiter == "," else "TSV"
        try:
            try:
                reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
                rows = list(reader)
            except csv.Error:
                if kind == "CSV":
                    raise
                rows = []
            if kind == "TSV" and _is_unquoted(rows):
                reader = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
                rows = list(reader)
        except csv.Error as error:
            hint = "; is there a quotation mark without its second?" if "end of data" in str(error) else ""
            raise UserError(f"{path.name} is not a {kind} file that can be read ({error}{hint})") from error
        names = list(reader.fieldnames or ())
        other = next((mark for mark in ",;\t|" if mark != delimiter and len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise UserError(
                f"{path.name} has one column, {names[0]!r}, and its separator seems to be {other!r}; accepted: ',' in "
                "a .csv file, '\\t' in a .tsv file"
            )
        if "" in names and all(missing(row.get("")) for row in rows):  # a spreadsheet's empty columns
            names = [name for name in names if name]
            for row in rows:
                row.pop("", None)
        if len({*names}) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path.name} has two columns {twice!r}; accepted: names that differ")
        for number, row in enumerate(rows, 1):
            if None in row:
                raise UserError(
                    f"row {number} of {path.name} has more cells than the heading; accepted: as many, with quotes "
                    "around cells that hold the separator"
                )
        return rows

    return records


def _is_unquoted(rows: list[Record]) -> bool:
    """Whether the rows of a TSV file, read with quotes, show that its quotation marks are letters like any other.

    In most TSV files they are. One that takes in the ends of lines and cells certainly is.
    """
    return not rows or any(
        None in row or None in row.values() or any("\n" in cell and "\t" in cell for cell in row.values())
        for row in rows
    )


def _json_lines(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers and nesting may be too long for Python
            reason = getattr(error, "msg", None) or _first_line(error)
            raise UserError(f"line {number} of {path.name} is not JSON that can be read ({reason})") from error
        if not isinstance(record, dict):
            raise UserError(
                f"line {number} of {path.name} is no JSON object but a {type(record).__name__}; accepted: one object "
                "per line"
            )
        records.append(record)
    return records


def _parquet(path: Path) -> list[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError("Parquet files need the package pyarrow: pip install 'pgap-kernels[data]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path.name} is not a Parquet file that can be read ({_first_line(error)})") from error


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def _dataset(name: str, split: str | None, option: str) -> list[Record]:
    """A split of a data set of the library `datasets`; class labels by their names."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"{option}: got {name!r}, which only the package datasets could read: pip install 'pgap-kernels[data]'; "
            f"accepted without it: {ACCEPTED}"
        ) from error
    datasets.disable_progress_bars()
    try:
        if Path(name, "dataset_dict.json").is_file() or Path(name, "dataset_info.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            identity, _, configuration = name.partition(":")
            found = datasets.load_dataset(identity, configuration or None)
    except Exception as error:  # the library raises its own, the hub client's, pyarrow's and the file system's
        raise UserError(f"{option}: cannot load {name!r} ({_first_line(error)}); accepted: {ACCEPTED}") from error
    if isinstance(found, dict):
        split = split or ("train" if option == "--data" else "test")
        if split not in found:
            blamed = "--split" if option == "--data" else "--test-split"
            raise UserError(f"{blamed}: got {split!r}; {name!r} has {', '.join(map(repr, found))}")
        found = found[split]
    elif split is not None:
        raise UserError(_has_no_splits(name, split, option))
    named = {name: feature for name, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)}
    return [
        record | {name: label(feature, record[name]) for name, feature in named.items()} for record in found.to_list()
    ]


def label(feature: Any, value: int | None) -> str | None:
    """The name of a class; hub data sets say -1 where nobody has labelled."""
    return None if value is None or value < 0 else feature.int2str(value)


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain(value: Any) -> str:
    """A cell as text; 1.0 is 1, and booleans are as JSON writes them.

    Raises:
        UserError: bytes that are not UTF-8.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"--data: there is a cell of bytes that are not UTF-8 text ({error.reason})") from error
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as where an emoji was cut in two
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
