"""Labelled sentences as prompts: read, tokenise once, split, and draw batches.

A batch is a pure function of (seed, step), so runs of different methods see the same data in the same order.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import fetch
from .config import DEFAULT, Config, UserError

DEFAULT_NAME = "Rotten-Tomatoes snippets (VADER ratings)"
DEFAULT_VERBALIZERS = {"0": " terrible", "1": " great", "negative": " terrible", "positive": " great"}


@dataclass(frozen=True)
class Example:
    """One prompt: its token ids and which of the two labels is right (0 or 1)."""

    tokens: tuple[int, ...]
    label: int


@dataclass
class Dataset:
    """The three splits, the two labels with their verbaliser tokens, and what was dropped or scaled on the way."""

    name: str
    labels: tuple[str, str]
    label_tokens: tuple[int, int]
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    dropped: int
    notes: list[str] = field(default_factory=list)


def load(config: Config, tokenizer: Any) -> Dataset:
    """Read the data of ``config``, tokenise every prompt once, drop the ones that are too long, and split.

    Raises:
        UserError: the file, its columns, its labels or the verbalisers are not usable.
    """
    rows, name = read_rows(config)
    if not rows:
        raise UserError(f"--data: {name} holds no examples; accepted: at least 4 with two labels")
    labels = _two_labels(rows, name)
    label_tokens = verbalizer_tokens(tokenizer, config.template, _verbalizers(config.verbalizers, labels))
    prompts = tokenizer([config.template.replace("{text}", text) for text, _ in rows])["input_ids"]
    examples = [
        Example(tuple(tokens), labels.index(label))
        for tokens, (_, label) in zip(prompts, rows, strict=True)
        if len(tokens) <= config.max_length
    ]
    dropped = len(rows) - len(examples)
    notes = (
        [
            f"{dropped} of {len(rows)} sentences dropped: longer than --max-length {config.max_length} tokens "
            "with the template"
        ]
        if dropped
        else []
    )
    splits, scaled = split(examples, (config.train_size, config.dev_size, config.test_size), config.data_seed)
    if scaled:
        sizes = "/".join(str(len(part)) for part in splits)
        notes.append(f"only {len(examples)} sentences to split: train/dev/test scaled down to {sizes}")
    return Dataset(name, labels, label_tokens, *splits, dropped, notes)


def read_rows(config: Config) -> tuple[list[tuple[str, str]], str]:
    """All (text, label) rows and the data's name for reports."""
    if config.data == DEFAULT:
        return _default_rows(fetch.fetch_data()), DEFAULT_NAME
    path = Path(config.data).expanduser()
    if not path.is_file():
        raise UserError(f"--data: there is no file {config.data!r}; accepted: {DEFAULT!r} or a .csv or .jsonl file")
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records}
    if path.suffix.lower() not in readers:
        raise UserError(f"--data: got {config.data!r}; accepted: {DEFAULT!r} or a file that ends in .csv or .jsonl")
    try:
        records = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {config.data!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return [_row(record, config, number) for number, record in enumerate(records, 1)], path.name


def _default_rows(path: Path) -> list[tuple[str, str]]:
    """Sentences rated clearly positive or negative (mean above 1 or below -1 on a scale of -4 to 4)."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) > 1:
            rows.append((text, "positive" if float(rating) > 0 else "negative"))
    return rows


def _csv_records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return list(csv.DictReader(file))
        except csv.Error as error:
            raise UserError(f"--data: {path.name} is not a CSV file that can be read ({error})") from error


def _jsonl_records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--data: line {number} of {path.name} is not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise UserError(
                f"--data: line {number} of {path.name} is no JSON object but a "
                f"{type(record).__name__}; accepted: one object per line"
            )
        records.append(record)
    return records


def _row(record: dict[str, Any], config: Config, number: int) -> tuple[str, str]:
    for option, column in (("--text-column", config.text_column), ("--label-column", config.label_column)):
        if record.get(column) is None:
            found = ", ".join(repr(key) for key in record if key is not None)
            raise UserError(
                f"{option}: example {number} of {config.data!r} has no column {column!r}; columns found: {found}"
            )
    return str(record[config.text_column]).strip(), str(record[config.label_column]).strip()


def _two_labels(rows: Sequence[tuple[str, str]], name: str) -> tuple[str, str]:
    labels = sorted({label for _, label in rows})
    if len(labels) != 2:
        shown = ", ".join(repr(label) for label in labels[:5]) + (", ..." if len(labels) > 5 else "")
        raise UserError(
            f"--data: {name} has {len(labels)} distinct label{'s' * (len(labels) != 1)} ({shown}); "
            "accepted: exactly two"
        )
    return labels[0], labels[1]


def _verbalizers(option: str | None, labels: tuple[str, str]) -> tuple[str, str]:
    words = DEFAULT_VERBALIZERS
    if option is not None:
        pairs = [pair.partition("=") for pair in option.split(",")]
        if not all(label and word for label, _, word in pairs):
            raise UserError(f"--verbalizers: got {option!r}; accepted: label=word,label=word")
        words = {label.strip(): word for label, _, word in pairs}
    missing = [label for label in labels if label not in words]
    if missing:
        raise UserError(
            f"--verbalizers: no word for the label {missing[0]!r}; words given for: {', '.join(words)}; "
            f'accepted: "{labels[0]}=word,{labels[1]}=word"'
        )
    return words[labels[0]], words[labels[1]]


def verbalizer_tokens(tokenizer: Any, template: str, words: tuple[str, str]) -> tuple[int, int]:
    """The token each word becomes right after a prompt.

    Raises:
        UserError: a word is not exactly one token there, or both are the same token.
    """
    # Tokenised in place: what a word becomes on its own can differ from what it becomes after the prompt.
    prompt = template.replace("{text}", "x")
    start = tokenizer(prompt)["input_ids"]
    tokens = []
    for word in words:
        whole = tokenizer(prompt + word)["input_ids"]
        if whole[:-1] != start:
            pieces = tokenizer.tokenize(prompt + word)[len(tokenizer.tokenize(prompt)) :]
            raise UserError(
                f"--verbalizers: {word!r} becomes {pieces} after the template; accepted: a word that is "
                "exactly one token there (most need a leading space)"
            )
        tokens.append(whole[-1])
    if tokens[0] == tokens[1]:
        raise UserError(
            f"--verbalizers: {words[0]!r} and {words[1]!r} are the same token; accepted: two different ones"
        )
    return tokens[0], tokens[1]


def split(
    examples: Sequence[Example], sizes: tuple[int, int, int], seed: int
) -> tuple[tuple[list[Example], list[Example], list[Example]], bool]:
    """Train, dev and test parts of one fixed permutation, and whether the sizes had to be scaled down.

    Raises:
        UserError: there are too few examples for three parts.
    """
    scale = min(1.0, len(examples) / sum(sizes))
    train, dev, test = (int(size * scale) for size in sizes)
    if min(train, dev, test) < 1:
        raise UserError(
            f"--data: {len(examples)} usable sentences cannot be split into train, dev and test as "
            f"{'/'.join(map(str, sizes))}; accepted: at least one for each "
            "(see --train-size, --dev-size, --test-size, --max-length)"
        )
    order = permutation(len(examples), f"split/{seed}")
    shuffled = [examples[index] for index in order[: train + dev + test]]
    return (shuffled[:train], shuffled[train : train + dev], shuffled[train + dev :]), scale < 1


@lru_cache(maxsize=4)
def permutation(size: int, seed: str) -> list[int]:
    """A permutation of ``range(size)`` that depends on nothing but its arguments."""
    return random.Random(seed).sample(range(size), size)


def batch(examples: Sequence[Example], size: int, seed: int, step: int) -> list[Example]:
    """The examples of one step: every epoch is its own permutation, and batches run on across epochs."""
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, len(examples))
        chosen.append(examples[permutation(len(examples), f"batches/{seed}/{epoch}")[offset]])
    return chosen
