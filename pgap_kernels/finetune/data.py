"""A data set for a run: read, made into prompts, tokenised once, split; and the batches of steps.

A batch is a pure function of (seed, step), so runs of different methods see the same data in the same order.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

from . import fetch
from .builtin import BUILT_IN, Record
from .config import SIZES, Config, field_default
from .errors import UserError
from .examples import Example, Prompts, Row, Tokens, label_answers, rows_of, spaced, words_of
from .records import read

__all__ = ["Dataset", "Example", "batch", "fit", "load", "permutation", "records_of", "source", "split"]


@dataclass
class Dataset:
    """The three parts, what the labels are and which tokens stand for them, and what was left out.

    Attributes:
        task: "classification", "choice" or "generation".
        labels, words, answers: of classification, else empty: each label, the word for it and that word's tokens.
        dropped: how many records were left out, by the reason.
        end: the token that ends a generated answer, if there is one.
    """

    name: str
    task: str
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    answers: tuple[Tokens, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    end: int | None = None

    @property
    def label_tokens(self) -> tuple[int, ...]:
        """The token of each label, where one token is all that their words have."""
        assert self.answers and all(len(answer) == 1 for answer in self.answers)
        return tuple(answer[0] for answer in self.answers)

    def counts(self, part: str) -> dict[str, int]:
        """How many examples of a part have each label."""
        found = Counter(example.label for example in getattr(self, part))
        return {label: found[index] for index, label in enumerate(self.labels)}

    @property
    def majority(self) -> float | None:
        """The accuracy on the test part of whoever always says the training part's most frequent label."""
        if not self.labels:
            return None
        counts = self.counts("train")
        return self.counts("test")[max(counts, key=lambda label: counts[label])] / len(self.test)


@dataclass(frozen=True)
class Source:
    """What is known of a data set before there is a tokenizer.

    Attributes:
        records, tests: how many there are; ``tests`` of a test part that comes apart, or None.
        rows, test_rows: those that can be used.
        dropped: how many cannot, by the reason.
        labels, words: of classification, else empty.
    """

    name: str
    records: int
    tests: int | None
    rows: list[Row]
    test_rows: list[Row]
    dropped: Counter[str]
    notes: list[str]
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def source(config: Config) -> Source:
    """Read the data of ``config``: all that can be wrong with it before the model is loaded, which takes longer.

    Raises:
        UserError: the file, its columns, its labels or the verbalisers are not usable.
    """
    dropped, notes = Counter[str](), list[str]()
    records, name, tests = records_of(config)
    rows, test_rows = rows_of(records, config, dropped, notes), _test_rows(tests or [], config, dropped)
    if not rows:
        why = f" that can be used ({'; '.join(_dropped(dropped, len(records)))})" if records else ""
        raise UserError(f"--data: {name} holds no examples{why}; accepted: at least one for each part")
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    if config.task == "classification":
        labels = _labels(rows + test_rows, name)
        words = words_of(config.verbalizers, labels)
    count = None if tests is None else len(tests)
    return Source(name, len(records), count, rows, test_rows, dropped, notes, labels, words)


def load(config: Config, tokenizer: Any, mask: str | None = None, found: Source | None = None) -> Dataset:
    """Make prompts of the data of ``config``, drop what cannot be used, and split.

    Args:
        config: says which, and how.
        tokenizer: of the model.
        mask: of a masked model: its mask token as text.
        found: the data, read; by default it is now.

    Raises:
        UserError: as of `source`, or its words or its prompts are not usable with the tokenizer.
    """
    if mask is not None and config.task != "classification":
        raise UserError(f"--task: got {config.task!r} with a masked model; accepted: classification")
    prompts = Prompts(config, tokenizer, mask)
    found = found or source(config)
    dropped = found.dropped.copy()
    data = Dataset(found.name, config.task, [], [], [], found.labels, found.words, notes=[*found.notes])
    if config.task == "classification":
        data.answers = label_answers(prompts, data.words, mask)
    if config.task == "generation":
        data.end = tokenizer.eos_token_id
    maker = _Maker(config, prompts, data, dropped)
    examples, given = ([made for row in rows if (made := maker.example(row))] for rows in (found.rows, found.test_rows))
    data.dropped = dict(dropped)
    if found.tests is not None and not given:
        raise UserError(f"--test-data: none of its {found.tests} records can be used; accepted: some that can")
    total = found.records + (found.tests or 0)
    data.notes += _dropped(dropped, total)
    if maker.cut:
        data.notes.append(f"{maker.cut} of {total} texts cut to fit --max-length {config.max_length} tokens")
    if maker.unreachable:
        data.notes.append(
            f"{maker.unreachable} of {total} answers are of several lines, or longer than --max-new-tokens "
            f"{config.max_new_tokens}: evaluations cannot match them, as they end at a line's end"
        )
    try:
        _divide(config, data, examples, given)
    except UserError as error:
        shortest = [f"the shortest prompt of those has {maker.shortest}"] if maker.shortest else []
        raise UserError("; ".join([str(error), *_dropped(dropped, total), *shortest])) from error
    return data


def _dropped(dropped: Mapping[str, int], total: int) -> list[str]:
    return [f"{count} of {total} examples dropped: {reason}" for reason, count in dropped.items()]


def records_of(config: Config) -> tuple[list[Record], str, list[Record] | None]:
    """All records, the data's name for reports, and those of a test part that comes apart, or None."""
    split = None if config.split == field_default("split") else config.split
    records, name = read(config.data, split)
    built_in = BUILT_IN.get(config.data)
    if config.test_data is not None:
        return records, name, read(config.test_data, config.test_split, "--test-data")[0]
    if built_in is not None and built_in.test is not None:
        return records, name, built_in.read(fetch.fetch_data(built_in.test))
    return records, name, None


def _test_rows(records: Sequence[Record], config: Config, dropped: Counter[str]) -> list[Row]:
    """The rows of a test part that comes apart: errors are its own."""
    own = copy.copy(config)
    own.data = config.test_data or config.data
    try:
        return rows_of(records, own, dropped, [])
    except UserError as error:
        raise UserError(str(error).replace("--data:", "--test-data:", 1)) from error


def _labels(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    counts = Counter(row.answer for row in rows)
    labels = sorted(counts)
    shown = ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
    if len(labels) < 2:
        raise UserError(f"--data: {name} has 1 distinct label ({shown}); accepted: two or more")
    if len(labels) > 100 and len(labels) > len(rows) / 4:
        raise UserError(
            f"--data: {name} has {len(labels)} distinct labels ({shown}) in {len(rows)} examples; accepted: labels "
            "that come again; for free text there is --task generation"
        )
    return tuple(labels)


class _Maker:
    """Makes examples of rows, and counts the texts that it cut."""

    def __init__(self, config: Config, prompts: Prompts, data: Dataset, dropped: Counter[str]) -> None:
        self.config, self.prompts, self.data, self.dropped = config, prompts, data, dropped
        self.mask = None if prompts.mask is None else prompts.tokenizer.mask_token_id
        self.cut = self.unreachable = 0
        self.shortest: int | None = None  # tokens of what was too long
        # One token is predicted, not read.
        self.longest = max((len(answer) for answer in data.answers), default=0)
        self.longest = 0 if self.longest == 1 else self.longest

    def example(self, row: Row) -> Example | None:
        """The example of a row, or None for one that is dropped."""

        def room(prompt: str) -> int:
            tokens, answers = self._tokens(row, prompt)
            return self.config.max_length - len(tokens) - max(map(len, answers), default=self.longest)

        prompt = self.prompts.fitting(row, room)
        if prompt is None:
            length = self.config.max_length - room(self.prompts.fill(row.fields))
            self.shortest = min(length, self.shortest or length)
            self.dropped[f"longer than --max-length {self.config.max_length} tokens with the template"] += 1
            return None
        tokens, answers = self._tokens(row, prompt)
        if not tokens or not all(answers):
            self.dropped["without a token in the prompt or in an answer"] += 1
            return None
        if self.mask is not None and tokens.count(self.mask) != 1:
            self.dropped["with a mask token in the text"] += 1
            return None
        self.cut += prompt != self.prompts.fill(row.fields)
        if self.config.task == "generation":
            self.unreachable += "\n" in row.answer or len(answers[0]) > self.config.max_new_tokens + (
                self.data.end is not None
            )
        if self.config.task == "classification":
            label = self.data.labels.index(row.answer)
            return Example(tokens, label, (), prompt, self.data.labels)
        label = row.options.index(row.answer) if row.options else 0
        return Example(tokens, label, answers, prompt, row.options or row.accepted)

    def _tokens(self, row: Row, prompt: str) -> tuple[Tokens, tuple[Tokens, ...]]:
        """Of the prompt, and of the answers that this row has of its own."""
        options = row.options or ((row.answer,) if self.config.task == "generation" else ())
        if not options:
            return self.prompts.tokens(prompt), ()
        pairs = [self.prompts.answer(prompt, spaced(prompt, option)) for option in options]
        # Options may split the prompt's last token in different places: all begin where the first does.
        start = min(len(tokens) for tokens, _ in pairs)
        answers = [tokens[start:] + answer for tokens, answer in pairs]
        if self.config.task == "generation" and self.data.end is not None:
            answers = [(*answer, self.data.end) for answer in answers]
        return pairs[0][0][:start], tuple(answers)


def _divide(config: Config, data: Dataset, examples: Sequence[Example], given: Sequence[Example]) -> None:
    """Fill the parts; a test part that comes apart is only shortened."""
    sizes = {name: getattr(config, name) for name in SIZES} | ({"test_size": 0} if given else {})
    fitted = fit(len(examples), sizes, config.default_sizes)
    data.train, data.dev, data.test = split(examples, tuple(fitted.values()), config.data_seed)
    if given:
        order = permutation(len(given), f"test/{config.data_seed}")
        data.test = [given[index] for index in order[: config.test_size]]
        if len(data.test) < len(given):
            data.notes.append(f"{len(data.test)} of {len(given)} test examples are used (--test-size)")
    if scaled := [name for name in sizes if fitted[name] < sizes[name]]:
        names = "/".join(name.removesuffix("_size") for name in scaled)
        numbers = "/".join(str(fitted[name]) for name in scaled)
        data.notes.append(f"only {len(examples)} examples to split: {names} scaled down to {numbers}")
    if config.batch_size > len(data.train):
        data.notes.append(
            f"--batch-size: {config.batch_size} is more than the {len(data.train)} training examples: a step takes "
            "some of them several times"
        )
    absent = [label for label, count in data.counts("train").items() if not count]
    if absent:
        data.notes.append(f"no training example has the label {', '.join(map(repr, absent))}")


def fit(count: int, sizes: Mapping[str, int], defaults: Collection[str]) -> dict[str, int]:
    """The sizes that parts of ``count`` examples have: those in ``defaults`` are scaled down where all are too many.

    The others are, too, where they alone leave too little; a default then counts for no more than the largest of them.

    Raises:
        UserError: there are too few examples for the parts that are to have some.
    """
    wanted = {name: size for name, size in sizes.items() if size}
    if count < len(wanted):
        raise UserError(
            f"--data: {count} usable examples cannot be split into "
            f"{', '.join(name.removesuffix('_size') for name in wanted)}; accepted: at least one for each"
        )
    own = {name: size for name, size in wanted.items() if name not in defaults}
    left = count - sum(own.values())
    scaled = {name: size for name, size in wanted.items() if name in defaults}
    if left < len(scaled):
        left, scaled = count, {name: min(size, max(own.values())) for name, size in wanted.items()}
    scale = min(1.0, left / max(1, sum(scaled.values())))
    found = dict(sizes) | {name: max(1, int(size * scale)) for name, size in scaled.items()}
    found[max(found, key=lambda name: found[name])] -= max(0, sum(found.values()) - count)
    return found


def split(examples: Sequence[Example], sizes: Sequence[int], seed: int) -> list[list[Example]]:
    """Parts of these sizes of one fixed permutation."""
    order = iter(permutation(len(examples), f"split/{seed}"))
    return [[examples[index] for index in islice(order, size)] for size in sizes]


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
