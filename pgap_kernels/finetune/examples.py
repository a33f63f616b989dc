"""Records as examples: the tokens of a prompt, and those of the answers that it is scored with.

The three tasks differ in where the answers come from: classification has one for each label, a multiple choice brings
its own in every row, and in generation there is the right one alone.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .builtin import Record
from .config import Config
from .errors import UserError
from .records import missing, plain

Tokens = tuple[int, ...]

#: Where a template has a column's text.
PLACES = re.compile(r"\{\s*([^{}]*[^{}\s])\s*\}")

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


# ---- records to rows ------------------------------------------------------------------------------------------------


def rows_of(records: Sequence[Record], config: Config, dropped: Counter[str], notes: list[str]) -> list[Row]:
    """Rows with all that the task needs; records without it are dropped, and counted by the reason.

    Args:
        records: of the data that ``config.data`` names.
        config: says what the task needs.
        dropped: is added to.
        notes: likewise: what the user should know.

    Raises:
        UserError: a column is missing or holds what the task cannot use.
    """
    known = {str(name) for record in records for name in record if name is not None}
    fields_of = _template_columns(config, known)
    columns = _columns(config, fields_of)
    if records:
        _check_columns(known, config, columns)
    if config.label_column in fields_of.values():
        notes.append(
            f"--template: {config.template!r} holds the column {config.label_column!r}, so that the prompt gives the "
            "answer away"
        )
    make: Callable[..., Row | None] = _labelled if config.task == "classification" else _answered
    reading = _reading_of(records, config, notes) if config.task == "choice" else None
    rows = []
    for number, record in enumerate(records, 1):
        empty = next((name for _, name in columns if missing(record.get(name))), None)
        if empty is not None:
            dropped[f"with nothing in the column {empty!r}"] += 1
            continue
        fields = {name: _text(record[column], column, number) for name, column in fields_of.items()}
        row = (
            make(fields, record, config, number)
            if reading is None
            else _choice(fields, record, config, number, reading)
        )
        if row is None:
            dropped["without an answer" if reading is None else "with an empty choice"] += 1
            continue
        rows.append(row)
    return rows


def _template_columns(config: Config, known: Collection[str]) -> dict[str, str]:
    """The columns that a template names; {text} is the text column by whatever name.

    Braces around what is neither a column nor a word are the template's own.
    """
    names = [name for name in PLACES.findall(config.template) if name != "mask"]
    named = [name for name in names if name in known or re.fullmatch(r"\w[\w-]*", name)]
    if not named:
        raise UserError(
            f"--template: got {config.template!r}, which names no column; columns found: "
            f"{', '.join(map(repr, sorted(known))) or 'none'}"
        )
    return {name: config.text_column if name == "text" else name for name in named}


def _columns(config: Config, fields_of: Mapping[str, str]) -> list[tuple[str, str]]:
    """Options and the columns that they name."""
    found = [("--text-column" if name == "text" else "--template", column) for name, column in fields_of.items()]
    found.append(("--label-column", config.label_column))
    if config.task == "choice":
        found += [("--choices", name) for name in config.choices]
    return found


def _check_columns(known: Collection[str], config: Config, columns: Sequence[tuple[str, str]]) -> None:
    for option, name in columns:
        if name not in known:
            spaced_out = [other for other in sorted(known) if other.strip() == name]
            hint = f"; {spaced_out[0]!r} has a blank at its beginning or end" if spaced_out else ""
            raise UserError(
                f"{option}: {config.data!r} has no column {name!r}; columns found: "
                f"{', '.join(map(repr, sorted(known))) or 'none'}{hint}"
            )


def _text(value: Any, column: str, number: int) -> str:
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        raise UserError(
            f"--data: the column {column!r} holds {kind} in record {number}; accepted: text or a number "
            "(of a conversation, write the prompt out)"
        )
    return plain(value)


def _labelled(fields: Mapping[str, str], record: Record, config: Config, number: int) -> Row:
    label = _text(record[config.label_column], config.label_column, number)
    return Row(fields, same_label(label))


def same_label(label: str) -> str:
    """A label as other files write the same one: 1 for 1.0, true for TRUE."""
    if re.fullmatch(r"-?\d+\.0+|(?i:true|false)", label):
        return label.partition(".")[0].lower()
    return label


def _options(record: Record, config: Config, number: int) -> list[str]:
    """The choices of a record, the empty ones at its end left out; others may be empty, so that numbers fit."""
    if len(config.choices) == 1:
        found = _listed(record[config.choices[0]], config)
        if not isinstance(found, list) or len(found) < 2:
            raise UserError(
                f"--choices: the column {config.choices[0]!r} of record {number} holds {found!r}; accepted: a list of "
                "two or more, or several columns with one choice each"
            )
        last = max((index for index, option in enumerate(found) if not missing(option)), default=-1)
        return ["" if missing(o) else _text(o, config.choices[0], number) for o in found[: last + 1]]
    return [_text(record[name], name, number) for name in config.choices]


#: How a label says which choice is right.
READINGS: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "text": lambda given, options: options.index(given) if given in options else None,
    "number": lambda given, options: _number(same_label(given), len(options)),
    "letter": lambda given, options: _letter(given, len(options)),
}


def _number(given: str, count: int) -> int | None:
    return int(given) if given.isdecimal() and int(given) < count else None


def _letter(given: str, count: int) -> int | None:
    index = ord(given.upper()) - ord("A") if re.fullmatch(r"[A-Za-z]", given) else -1
    return index if 0 <= index < count else None


def _reading_of(records: Sequence[Record], config: Config, notes: list[str]) -> str:
    """The reading of the labels that fits most of them: one for all, as rows on their own can be read in several.

    Numbers of which none is 0 get a note, as they may count from 1.

    Raises:
        UserError: two fit them all, and say different things.
    """
    cells = (config.label_column, *config.choices)
    found: dict[str, list[int | None]] = {name: [] for name in READINGS}
    for number, record in enumerate(records, 1):
        if not any(missing(record.get(name)) for name in cells):
            options, given = _options(record, config, number), plain(record[config.label_column])
            for name, read in READINGS.items():
                found[name].append(read(given, options))
    fitting = [name for name, indices in found.items() if None not in indices]
    if len(fitting) > 1 and found[fitting[0]] != found[fitting[1]]:
        raise UserError(
            f"--label-column: the labels could be the {fitting[0]} of the right choice or its {fitting[1]}, which say "
            "different things; accepted: letters from A, or choices and labels that cannot be taken for each other"
        )
    best = min(found, key=lambda name: found[name].count(None))
    if best == "number" and found[best] and 0 not in found[best]:
        notes.append("no label is 0: labels are taken as numbers of choices that count from 0, not from 1")
    return best


def _choice(fields: Mapping[str, str], record: Record, config: Config, number: int, reading: str) -> Row | None:
    """None for a record with an empty choice among the others."""
    options, given = _options(record, config, number), plain(record[config.label_column])
    if not all(options):
        return None
    index = READINGS[reading](given, options)
    if index is None:
        raise UserError(
            f"--label-column: got {given!r} in record {number}, which has {len(options)} choices; accepted: one of "
            "them, its number from 0, or its letter from A, and the same in every record"
        )
    return Row(fields, options[index], tuple(options))


def _answered(fields: Mapping[str, str], record: Record, config: Config, number: int) -> Row | None:
    """None for a record without an answer, as SQuAD's second version has."""
    found = _listed(record[config.label_column], config)
    if isinstance(found, dict):  # as SQuAD has it
        if "text" not in found:
            raise UserError(
                f"--label-column: record {number} holds an object without 'text'; accepted: text, a list of right "
                "answers, or SQuAD's object of both"
            )
        found = found["text"]
    several = found if isinstance(found, (list, tuple)) else [found]
    accepted = tuple(_text(a, config.label_column, number) for a in several if not missing(a))
    return Row(fields, accepted[0], accepted=accepted) if accepted else None


def _listed(value: Any, config: Config) -> Any:
    """What a cell holds: in a CSV or TSV file a list, or SQuAD's object, may be written as JSON, or as Python does."""
    in_text = Path(config.data).suffix.lower() in (".csv", ".tsv")
    if in_text and isinstance(value, str) and value.startswith(("[", "{")):
        try:
            found = json.loads(value)
        except ValueError:
            try:
                found = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return value  # text that begins with a bracket
        if isinstance(found, list) or "text" in found:
            return found
    return value


# ---- prompts --------------------------------------------------------------------------------------------------------


class Prompts:
    """The template, filled, tokenised and, if so wanted, cut to fit."""

    def __init__(self, config: Config, tokenizer: Any, mask: str | None) -> None:
        self.config, self.tokenizer, self.mask = config, tokenizer, mask
        self._known: dict[str, Tokens] = {}
        self.closes: Tokens = ()
        if mask is None:  # some tokenizers end every text, which a causal model is to go on with
            end = tokenizer("x")["input_ids"][-1:]
            self.closes = tuple(end) if end and end[0] == tokenizer.eos_token_id else ()
        self.template = config.template
        if self.template.count("{mask}") > 1:
            raise UserError(f"--template: got {config.template!r}; accepted: one {{mask}}, where the label's word is")
        if mask is not None:
            self.template = (self.template if "{mask}" in self.template else self.template + "{mask}.").replace(
                "{mask}", mask
            )
        elif "{mask}" in self.template:
            raise UserError("--template: got {mask}, but the model predicts the next token; accepted: without {mask}")

    def fill(self, fields: Mapping[str, str]) -> str:
        return PLACES.sub(lambda found: fields.get(found[1], found[0]), self.template)

    def tokens(self, prompt: str) -> Tokens:
        if prompt not in self._known:
            if len(self._known) > 100:  # one row asks for the same few again and again
                self._known.clear()
            tokens = tuple(self.tokenizer(prompt)["input_ids"])
            self._known[prompt] = tokens[:-1] if self.closes and tokens[-1:] == self.closes else tokens
        return self._known[prompt]

    def fitting(self, row: Row, room: Callable[[str], int]) -> str | None:
        """A row's prompt with no more tokens than ``room`` says; None where it cannot be.

        Args:
            row: its text is what is cut, from its end.
            room: the tokens left beyond the limit by a prompt, negative if it is too long.
        """
        prompt = self.fill(row.fields)
        if room(prompt) >= 0:
            return prompt
        if self.config.too_long == "drop":
            return None
        words = self.tokenizer(row.fields.get("text", ""), add_special_tokens=False)["input_ids"]
        end = len(words)
        while (left := room(prompt)) < 0:
            end += left  # fewer each time, so that it ends
            if end <= 0:
                return None
            # A character that was cut in two decodes to a mark that may be as many tokens again.
            text = self.tokenizer.decode(words[:end], skip_special_tokens=True).rstrip("\ufffd")
            prompt = self.fill({**row.fields, "text": text})
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
        known = len({WORDS.get(label) for label in labels} - {None}) == len(labels)  # 0 and negative would be the same
        return tuple(WORDS[label] if known else " " + label for label in labels)
    pairs = _pairs(option)
    if not all(label and word for label, word in pairs):
        raise UserError(f"--verbalizers: got {option!r}; accepted: label=word,label=word, or a JSON object of words")
    words = {same_label(label.strip()): word for label, word in pairs}
    if len(words) < len(pairs):
        raise UserError(f"--verbalizers: got {option!r}, with a label twice; accepted: a word for each label")
    strange = next((label for label in words if label not in labels), None)
    if strange is not None:
        raise UserError(
            f"--verbalizers: the data has no label {strange!r}; its labels: {', '.join(map(repr, labels[:10]))}"
        )
    lacking = [label for label in labels if label not in words]
    if lacking:
        raise UserError(
            f"--verbalizers: no word for the label {lacking[0]!r}; words given for: {', '.join(words)}; accepted: "
            f'"{",".join(f"{label}=word" for label in labels[:5])}"'
        )
    return tuple(words[label] for label in labels)


def _pairs(option: str) -> list[tuple[str, str]]:
    """Labels and words: of a JSON object, in which labels may hold any character, or of label=word,label=word."""
    if option.lstrip().startswith("{"):
        try:
            return [(label, str(word)) for label, word in json.loads(option, object_pairs_hook=list)]
        except ValueError as error:
            raise UserError(f"--verbalizers: got {option!r}, which is not a JSON object ({error})") from error
    return [(label, word) for label, _, word in (pair.partition("=") for pair in option.split(","))]


def label_answers(prompts: Prompts, words: Sequence[str], mask: str | None) -> tuple[Tokens, ...]:
    """The tokens of the labels' words after, or within, the template.

    Raises:
        UserError: words are the same, merge with the template, or at a mask token are not one token each.
    """
    # Tokenised in place: what a word becomes on its own can differ from what it becomes in the prompt.
    sample = prompts.fill({name: "x" for name in PLACES.findall(prompts.template)})
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
