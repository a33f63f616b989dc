"""Records as examples: the tokens of a prompt, and those of the answers that it is scored with.

The three tasks differ in where the answers come from: classification has one for each label, a multiple choice brings
its own in every row, and in generation there is the right one alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .builtin import Record
from .config import Config
from .errors import UserError
from .records import missing, plain

Tokens = tuple[int, ...]

# What labels say where nobody has said it: with the default template, sentiment.
WORDS = {"0": " terrible", "1": " great", "negative": " terrible", "positive": " great", "false": " terrible",
         "true": " great"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A prompt, and which of its answers is right.

    Attributes:
        tokens: of the prompt.
        label: the right answer's number.
        answers: tokens of each answer; empty where all examples share those of the labels.
        prompt, texts: prompt and answers as text; in generation, ``texts`` are all that count as right.
    """

    tokens: Tokens
    label: int
    answers: tuple[Tokens, ...] = ()
    prompt: str = ""
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A record as text: the columns that the template names, the right answer, and what there is to choose from."""

    fields: Mapping[str, str]
    answer: str
    options: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()


@dataclass
class Dropped:
    """Why records were left out, and how many."""

    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, reason: str) -> None:
        self.counts[reason] += 1


# ---- records to rows ------------------------------------------------------------------------------------------------


def rows_of(records: Sequence[Record], config: Config, dropped: Dropped) -> list[Row]:
    """Rows with all that the task needs; those where a cell is empty are dropped.

    Raises:
        UserError: a column is missing or holds what the task cannot use.
    """
    make = {"classification": _labelled, "choice": _choice, "generation": _answered}[config.task]
    columns = _columns(config)
    if records:
        _check_columns(records, config, columns)
    rows = []
    for number, record in enumerate(records, 1):
        empty = next((name for _, name in columns if missing(record.get(name))), None)
        if empty is not None:
            dropped(f"with nothing in the column {empty!r}")
            continue
        fields = {name: _text(record[column], column, number) for name, column in _template_columns(config).items()}
        rows.append(make(fields, record, config, number))
    return rows


def _template_columns(config: Config) -> dict[str, str]:
    """The columns that a template names; {text} is the text column by whatever name."""
    names = [name for name in re.findall(r"\{(\w+)\}", config.template) if name != "mask"]
    return {name: config.text_column if name == "text" else name for name in names}


def _columns(config: Config) -> list[tuple[str, str]]:
    """Options and the columns that they name."""
    found = [
        ("--text-column" if name == "text" else "--template", column)
        for name, column in _template_columns(config).items()
    ]
    found.append(("--label-column", config.label_column))
    if config.task == "choice":
        found += [("--choices", name) for name in config.choices]
    return found


def _check_columns(records: Sequence[Record], config: Config, columns: Sequence[tuple[str, str]]) -> None:
    known = {str(name) for record in records for name in record if name is not None}
    for option, name in columns:
        if name not in known:
            raise UserError(
                f"{option}: {config.data!r} has no column {name!r}; columns found: "
                f"{', '.join(map(repr, sorted(known))) or 'none'}"
            )


def _text(value: Any, column: str, number: int) -> str:
    if isinstance(value, (list, dict)):
        kind = "list" if isinstance(value, list) else "object"
        raise UserError(
            f"--data: the column {column!r} holds a {kind} in record {number}; accepted: text or a number "
            "(of a conversation, write the prompt out)"
        )
    return plain(value)


def _labelled(fields: Mapping[str, str], record: Record, config: Config, number: int) -> Row:
    label = _text(record[config.label_column], config.label_column, number)
    if re.fullmatch(r"-?\d+\.0+|[Tt]rue|[Ff]alse", label):
        label = label.partition(".")[0].lower()  # as other files write the same
    return Row(fields, label)


def _choice(fields: Mapping[str, str], record: Record, config: Config, number: int) -> Row:
    if len(config.choices) == 1:
        found = _listed(record[config.choices[0]])
        if not isinstance(found, list) or len(found) < 2:
            raise UserError(
                f"--choices: the column {config.choices[0]!r} of record {number} holds {found!r}; accepted: a list of "
                "two or more, or several columns with one choice each"
            )
        options = [plain(option) for option in found]
    else:
        options = [_text(record[name], name, number) for name in config.choices]
    given = plain(record[config.label_column])
    if given in options:
        index = options.index(given)
    elif re.fullmatch(r"\d+", given) and int(given) < len(options):
        index = int(given)
    elif re.fullmatch(r"[A-Za-z]", given) and ord(given.upper()) - ord("A") < len(options):
        index = ord(given.upper()) - ord("A")
    else:
        raise UserError(
            f"--label-column: got {given!r} in record {number}, which has {len(options)} choices; accepted: one of "
            "them, its number from 0, or its letter from A"
        )
    return Row(fields, options[index], tuple(options))


def _answered(fields: Mapping[str, str], record: Record, config: Config, number: int) -> Row:
    found = _listed(record[config.label_column])
    if isinstance(found, dict):  # as SQuAD has it
        found = found.get("text", [])
    accepted = tuple(plain(answer) for answer in (found if isinstance(found, list) else [found]))
    if not accepted:
        raise UserError(f"--label-column: record {number} has no answer; accepted: text, or a list of right answers")
    return Row(fields, accepted[0], accepted=accepted)


def _listed(value: Any) -> Any:
    """A list or object that a CSV cell holds as JSON."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value  # text that begins with a bracket
    return value


# ---- prompts --------------------------------------------------------------------------------------------------------


class Prompts:
    """The template, filled, tokenised and, if so wanted, cut to fit."""

    def __init__(self, config: Config, tokenizer: Any, mask: str | None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._known: dict[str, Tokens] = {}
        self.template = config.template
        if mask is not None:
            self.template = (self.template if "{mask}" in self.template else self.template + "{mask}.").replace(
                "{mask}", mask
            )
        elif "{mask}" in self.template:
            raise UserError("--template: got {mask}, but the model predicts the next token; accepted: without {mask}")

    def fill(self, fields: Mapping[str, str]) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), self.template)

    def tokens(self, prompt: str) -> Tokens:
        if prompt not in self._known:
            if len(self._known) > 100:  # one row asks for the same few again and again
                self._known.clear()
            self._known[prompt] = tuple(self.tokenizer(prompt)["input_ids"])
        return self._known[prompt]

    def fitting(self, row: Row, room: Callable[[str], int]) -> str | None:
        """A row's prompt with no more tokens than ``room`` says; None where it cannot be.

        Args:
            row: its text is what is cut, from its end.
            room: the tokens left beyond the limit by a prompt, negative if it is too long.
        """
        fields = dict(row.fields)
        prompt = self.fill(fields)
        while (left := room(prompt)) < 0:
            words = self.tokenizer(fields.get("text", ""), add_special_tokens=False)["input_ids"]
            if self.config.too_long == "drop" or len(words) <= -left:
                return None
            fields["text"] = self.tokenizer.decode(words[:left], skip_special_tokens=True)
            prompt = self.fill(fields)
        return prompt

    def answer(self, prompt: str, word: str) -> tuple[Tokens, Tokens]:
        """A prompt's tokens, and those that a word after it adds.

        Where the word's first letters merge with the prompt's last, both are split where they begin to differ.
        """
        start, whole = self.tokens(prompt), self.tokens(prompt + word)
        same = next(
            (i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), min(map(len, (start, whole)))
        )
        return whole[:same], whole[same:]


def spaced(prompt: str, answer: str) -> str:
    """An answer as it follows a prompt: after a space, unless there is one."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else " " + answer


# ---- words of labels ------------------------------------------------------------------------------------------------


def words_of(option: str | None, labels: Sequence[str]) -> tuple[str, ...]:
    """The word of each label: the option's, else of the default ones, else the label itself.

    Raises:
        UserError: the option cannot be read, or leaves a label out.
    """
    if option is None:
        known = all(label in WORDS for label in labels)
        return tuple(WORDS[label] if known else " " + label for label in labels)
    pairs = [pair.partition("=") for pair in option.split(",")]
    if not all(label and word for label, _, word in pairs):
        raise UserError(f"--verbalizers: got {option!r}; accepted: label=word,label=word")
    words = {label.strip(): word for label, _, word in pairs}
    lacking = [label for label in labels if label not in words]
    if lacking:
        raise UserError(
            f"--verbalizers: no word for the label {lacking[0]!r}; words given for: {', '.join(words)}; accepted: "
            f'"{",".join(f"{label}=word" for label in labels[:5])}"'
        )
    return tuple(words[label] for label in labels)


def label_answers(prompts: Prompts, words: Sequence[str], mask: str | None) -> tuple[Tokens, ...]:
    """The tokens of the labels' words after, or within, the template.

    Raises:
        UserError: words are the same, merge with the template, or at a mask token are not one token each.
    """
    # Tokenised in place: what a word becomes on its own can differ from what it becomes in the prompt.
    sample = prompts.fill({name: "x" for name in re.findall(r"\{(\w+)\}", prompts.template)})
    start = prompts.tokens(sample)
    answers = []
    for word in words:
        if mask is None:
            prompt, answer = prompts.answer(sample, word)
            if not answer or prompt != start:
                raise UserError(
                    f"--verbalizers: {word!r} merges with the end of the template; accepted: words that begin a token "
                    "of their own (most need a leading space)"
                )
        else:
            whole = prompts.tokens(sample.replace(mask, word))
            answer = tuple(token for token, other in zip(whole, start, strict=False) if token != other)
            if len(whole) != len(start) or len(answer) != 1:
                raise UserError(f"--verbalizers: {word!r} is several tokens; accepted: one, for the model's one mask")
        answers.append(answer)
    twice = next((i for i, answer in enumerate(answers) if answer in answers[:i]), None)
    if twice is not None:
        raise UserError(
            f"--verbalizers: {words[answers.index(answers[twice])]!r} and {words[twice]!r} are the same token; "
            "accepted: different ones"
        )
    return tuple(answers)
