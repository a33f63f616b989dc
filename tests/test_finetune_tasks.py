"""Files, tasks and metrics of ``finetune``: what becomes of a record, and what it is scored by."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")

from support.finetune_tiny import FILLERS, tiny_model

from pgap_kernels.finetune import Config, UserError, data, examples, metrics, models, records, run, tuned
from pgap_kernels.finetune.options import options_of
from pgap_kernels.finetune.scoring import AnswerScorer, OptionScorer, Scorer, scorer_of
from pgap_kernels.optim import available_methods, method_options

ROWS = [{"text": "good film", "label": 1}, {"text": "bad, very bad", "label": 0}, {"text": "a\ttab", "label": 1}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def loaded(llama):
    return models.load(str(llama), torch.float32, torch.device("cpu"))


def config_for(llama, tmp_path, **given):
    given = {"train_size": 60, "dev_size": 20, "test_size": 20, "batch_size": 8, "method": "mezo"} | given
    return Config(model=str(llama), device="cpu", output=str(tmp_path / "run"), **given)


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- files ----------------------------------------------------------------------------------------------------------


def write(path, kind):
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, ROWS[0], delimiter="," if kind == "csv" else "\t")
            rows.writeheader()
            rows.writerows(ROWS)
    elif kind == "jsonl":
        json_lines(path, ROWS)
    else:
        pytest.importorskip("datasets")
        import datasets

        table = datasets.Dataset.from_list(ROWS)
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "folder":
            table.save_to_disk(path)
        else:
            named = table.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
            datasets.DatasetDict({"train": named, "other": named.select([0])}).save_to_disk(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "folder", "splits"])
def test_every_kind_of_file_gives_the_same_records(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    write(path, kind)
    found, _ = records.read(str(path))
    names = {"0": "negative", "1": "positive"} if kind == "splits" else {"0": "0", "1": "1"}
    assert [(row["text"], records.plain(row["label"])) for row in found] == [
        (row["text"], names[str(row["label"])]) for row in ROWS
    ]
    if kind == "splits":
        assert len(records.read(str(path), "other")[0]) == 1
        with pytest.raises(UserError, match=r"^--split: got 'dev'; .* has 'train', 'other'"):
            records.read(str(path), "dev")
        return
    for option, blamed in (("--data", "--split"), ("--test-data", "--test-split")):
        with pytest.raises(UserError, match=f"^{blamed}: got 'test', but .* has no splits"):
            records.read(str(path), "test", option)


def test_what_has_no_splits_is_not_tested_on_its_training_part(llama, tmp_path):
    config = config_for(llama, tmp_path, data=json_lines(tmp_path / "a.jsonl", ROWS * 9), test_split="test")
    message = r"^--test-split: got 'test', but .* has no splits; accepted: .* --test-data"
    with pytest.raises(UserError, match=message):
        data.records_of(config)
    with pytest.raises(UserError, match=message):
        records.read("r8", "test", "--test-data")


@pytest.mark.parametrize("name", ["data.parquet", "folder"])
def test_a_damaged_file_is_said_in_a_line(name, tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / name
    path.write_bytes(b"no table") if name.endswith("parquet") else path.mkdir()
    with pytest.raises(UserError, match=rf"^--data: .*{name}"):
        records.read(str(path))


@pytest.mark.parametrize(("given", "configuration"), [("owner/set", None), ("owner/set:sst2", "sst2")])
def test_configurations_of_data_on_the_hub(given, configuration, monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = []
    table = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "good", "label": 1}])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: seen.append(names) or table)
    assert records.read(given)[0] == [{"text": "good", "label": 1}] and seen == [("owner/set", configuration)]


def test_cells_that_hold_nothing_are_dropped_and_counted(llama, loaded, tmp_path):
    rows = [{"text": f"good film {word}", "label": n % 2} for n, word in enumerate(FILLERS * 3)]
    empty = [{"text": None, "label": 1}, {"text": "x", "label": None}, {"text": "", "label": 0}, {"text": math.nan}]
    dataset = data.load(config_for(llama, tmp_path, data=json_lines(tmp_path / "a.jsonl", rows + empty)), loaded[1])
    assert dataset.dropped == {"with nothing in the column 'text'": 3, "with nothing in the column 'label'": 1}
    assert "3 of 46 examples dropped: with nothing in the column 'text'" in dataset.notes


@pytest.mark.parametrize(
    "labels, expected",
    [([0.0, 1.0], ("0", "1")), (["0.0", "1.0"], ("0", "1")), ([False, True], ("false", "true")),
     (["TRUE", "False"], ("false", "true")), (["film", "cast"], ("cast", "film"))],
)  # fmt: skip
def test_labels_are_the_same_however_a_file_writes_them(labels, expected, llama, loaded, tmp_path):
    rows = [{"text": "good film", "label": label} for label in labels * 30]
    dataset = data.load(config_for(llama, tmp_path, data=json_lines(tmp_path / "a.jsonl", rows)), loaded[1])
    assert dataset.labels == expected
    own = tuple(f" {label}" for label in expected)
    assert dataset.words == ((" terrible", " great") if expected in (("0", "1"), ("false", "true")) else own)


def test_words_are_given_in_pairs_or_as_json_and_defaults_differ():
    assert examples.words_of("TRUE= good,False= bad", ("false", "true")) == (" bad", " good")
    assert examples.words_of('{"a, b": " good", "c=d": " bad"}', ("a, b", "c=d")) == (" good", " bad")
    assert examples.words_of(None, ("0", "1", "negative")) == (" 0", " 1", " negative"), "0 and negative are one word"
    with pytest.raises(UserError, match=r"^--verbalizers: got '\{\]', which is not a JSON object"):
        examples.words_of("{]", ("0", "1"))


@pytest.mark.parametrize(
    "rows, given, message",
    [
        ([{"text": ["a", "b"], "label": 1}] * 9, {}, "--data: the column 'text' holds a list in record 1"),
        ([{"text": {"role": "user"}, "label": 1}] * 9, {}, "'text' holds an object in record 1"),
        ([{"text": f"t {n}", "label": f"l {n}"} for n in range(300)], {}, "300 distinct labels .* --task generation"),
        (ROWS, {"text_column": "txet"}, "--text-column: .* no column 'txet'; columns found: 'label', 'text'"),
        (ROWS, {"template": "{text} {other}"}, "--template: .* no column 'other'"),
        (ROWS, {"template": "{review-text} {text}"}, "--template: .* no column 'review-text'"),
        (ROWS, {"template": '{"a": 1} It was'}, "--template: .* names no column; columns found: 'label', 'text'"),
        (ROWS, {"template": "{text} {mask} {mask}"}, "--template: .* accepted: one {mask}"),
        (ROWS, {"template": "{text} {mask}"}, "--template: got {mask}, but the model predicts the next token"),
        (ROWS, {"task": "choice"}, "--choices: .* no column 'choices'"),
        ([{"text": "a", "label": 0, "choices": "b"}], {"task": "choice"}, "--choices: .* record 1 holds 'b'; .* list"),
        (
            [{"text": "a", "label": 5, "choices": ["b", "c"]}],
            {"task": "choice"},
            "--label-column: got '5' .* 2 choices",
        ),
        ([{"text": "a", "label": []}], {"task": "generation"}, "--data: .* no examples that can be used"),
        ([{"text": None, "label": 1}] * 30, {}, "30 of 30 examples dropped: with nothing in the column 'text'"),
        (
            ROWS * 9,
            {"max_length": 3},
            "--data: 0 usable .*; 27 of 27 examples dropped: longer than --max-length 3 .*; the shortest .* has 4",
        ),
        ([{" text": "a", "label": 1}], {}, "no column 'text'; columns found: ' text', 'label'; ' text' has a blank"),
        (
            [{"text": "a", "label": {"x": 1}}],
            {"task": "generation"},
            "--label-column: record 1 holds an object without",
        ),
        (
            [{"text": "a", "label": "1", "choices": ["1", "0"]}],
            {"task": "choice"},
            "--label-column: the labels could be",
        ),
        (ROWS * 9, {"verbalizers": "1= good,0= bad,7= x"}, "--verbalizers: the data has no label '7'"),
        (ROWS * 9, {"verbalizers": "1= good,1= great"}, "--verbalizers: got .* with a label twice"),
        (ROWS * 9, {"test_data": []}, "--test-data: none of its 0 records can be used"),
        (ROWS * 9, {"test_data": [{"txt": "a", "label": 1}]}, "--text-column: '.*b.jsonl' has no column 'text'"),
        (ROWS * 9, {"test_data": [{"text": [1], "label": 1}]}, "--test-data: the column 'text' holds a list"),
        ([{"text": "a", "label": [{"x": 1}]}], {"task": "generation"}, "'label' holds an object in record 1"),
        (
            [{"text": "a", "label": 0, "choices": [{"x": 1}, "b"]}],
            {"task": "choice"},
            "'choices' holds an object in record 1",
        ),
    ],
)
def test_records_that_the_task_cannot_use(rows, given, message, llama, loaded, tmp_path):
    if "test_data" in given:
        given = {"test_data": json_lines(tmp_path / "b.jsonl", given["test_data"])}
    config = config_for(llama, tmp_path, data=json_lines(tmp_path / "a.jsonl", rows), **given)
    with pytest.raises(UserError, match=message):
        data.load(config, loaded[1])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"text;label\ngood, not bad;1\n", r"one column, 'text;label', and its separator seems to be ';'"),
        ("a.tsv", b"text,label\ngood,1\n", r"separator seems to be ','; accepted: ',' in a \.csv file"),
        ("a.csv", b"text,label\n" + b"good,1\n" * 2000 + b"caf\xe9,1\n",
         r"not UTF-8 text \(byte 0xe9 in line 2002\); .*iconv -f WINDOWS-1252 -t UTF-8 a\.csv"),
        ("a.jsonl", "{}".encode("utf-16"), r"not UTF-8 text \(byte 0xff in line 1\); .*iconv -f UTF-16 "),
    ],
)  # fmt: skip
def test_separators_and_encodings_of_other_programs(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        records.read(str(tmp_path / name))


def test_what_is_likely_a_mistake_is_noted(llama, loaded, tmp_path):
    rows = [{"text": f"good film {word}", "label": n % 2} for n, word in enumerate(FILLERS * 4)]
    given = {"data": json_lines(tmp_path / "a.jsonl", rows), "template": "{text} {label}", "train_size": 5}
    told = data.load(config_for(llama, tmp_path, **given), loaded[1]).notes
    assert "--batch-size: 8 is more than the 5 training examples: a step takes some of them several times" in told
    assert any(note.startswith("--template: '{text} {label}' holds the column 'label'") for note in told)
    usual = data.load(config_for(llama, tmp_path, **given | {"template": "{text}", "train_size": 8}), loaded[1])
    assert not [note for note in usual.notes if note.startswith("--")]


def test_quotation_marks_in_files_without_quoting(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f'"good film {n}\t{n % 2}\n' for n in range(6)))
    found = records.read(str(path))[0]
    assert len(found) == 6 and found[0] == {"text": '"good film 0', "label": "0"}
    (tmp_path / "a.csv").write_text('text,label\n"good,1\nfilm,0\n')
    with pytest.raises(UserError, match=r"^--data: a\.csv is not a CSV file .* quotation mark without its second"):
        records.read(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("text,label,text\na,1,b\n")
    with pytest.raises(UserError, match=r"^--data: b\.csv has two columns 'text'"):
        records.read(str(tmp_path / "b.csv"))
    (tmp_path / "b.tsv").write_text('text\tlabel\n"he said ""no""\nand left"\t1\nfilm\t0\n')
    found = records.read(str(tmp_path / "b.tsv"))[0]
    assert [row["text"] for row in found] == ['he said "no"\nand left', "film"], "as pandas writes it"
    (tmp_path / "c.csv").write_text("text,label,,\nfilm,1,,\n")
    assert records.read(str(tmp_path / "c.csv"))[0] == [{"text": "film", "label": "1"}]
    assert records.plain(b"caf\xc3\xa9") == "café" and records.missing("  ")
    assert records.plain("film \ud83d") == "film \ufffd", "half of an emoji"


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_json_that_python_cannot_read_is_said_in_a_line(value, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + value + "}\n")
    with pytest.raises(UserError, match=r"^--data: line 1 of a\.jsonl is not JSON that can be read") as found:
        records.read(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(found.value)


def test_cells_of_tables_may_hold_json_and_others_are_text(llama, loaded, tmp_path):
    answer = '["the plot", "a cast"]'
    (tmp_path / "a.csv").write_text("text,label\n" + 'film,"' + answer.replace('"', '""') + '"\n')
    (tmp_path / "b.csv").write_text("text,label\nfilm,\"['the plot', 'a cast']\"\n")  # as pandas writes a list
    both = ("the plot", "a cast")
    for file, wanted in (("a.csv", both), ("b.csv", both), ("a.jsonl", (answer,))):
        path = tmp_path / file
        if file == "a.jsonl":
            json_lines(path, [{"text": "film", "label": answer}])
        config = config_for(llama, tmp_path, task="generation", data=str(path), train_size=1, dev_size=1, test_size=1)
        (row,) = examples.rows_of(records.read(str(path))[0], config, Counter(), [])
        assert row.accepted == wanted


def test_a_template_may_hold_braces_of_its_own_and_columns_of_any_name(llama, loaded, tmp_path):
    rows = [{"text": "a film", "the-place": "scene", "label": n % 2} for n in range(100)]
    template = '{"a": 1} { the-place } {text} It was'
    config = config_for(llama, tmp_path, data=json_lines(tmp_path / "a.jsonl", rows), template=template)
    assert data.load(config, loaded[1]).train[0].prompt == '{"a": 1} scene a film It was'


def test_a_test_set_of_its_own_is_used_whole_and_alone(llama, loaded, tmp_path):
    rows = [{"text": f"good {word} film", "label": n % 2} for n, word in enumerate(FILLERS * 6)]
    tests = [{"text": f"bad {word}", "label": n % 2} for n, word in enumerate(FILLERS)]
    given = {"data": json_lines(tmp_path / "a.jsonl", rows), "test_data": json_lines(tmp_path / "b.jsonl", tests)}
    dataset = data.load(config_for(llama, tmp_path, **given), loaded[1])
    assert len(dataset.test) == len(tests) and all(example.prompt.startswith("bad") for example in dataset.test)
    assert all(example.prompt.startswith("good") for example in dataset.train + dataset.dev)
    few = data.load(config_for(llama, tmp_path, **given, test_size=5), loaded[1])
    assert len(few.test) == 5 and f"5 of {len(tests)} test examples are used (--test-size)" in few.notes


def test_a_template_may_come_from_a_file_and_name_any_column(llama, loaded, tmp_path):
    (tmp_path / "prompt.txt").write_text("{place} {text} with {text} It was\n")
    rows = [{"text": "a film", "place": "the scene", "label": n % 2} for n in range(100)]
    given = {"data": json_lines(tmp_path / "a.jsonl", rows), "template": f"@{tmp_path / 'prompt.txt'}"}
    dataset = data.load(config_for(llama, tmp_path, **given), loaded[1])
    assert dataset.train[0].prompt == "the scene a film with a film It was"
    with pytest.raises(UserError, match=r"^--template: cannot read the file"):
        config_for(llama, tmp_path, template="@nowhere.txt")


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, index",
    [({"choices": ["the plot", "a", "very quite"], "label": 2}, 2), ({"choices": ["the plot", "a"], "label": "B"}, 1),
     ({"choices": ["the plot", "a"], "label": "b"}, 1), ({"choices": ["7", "1", "2"], "label": 0}, 0),
     ({"choices": ["the plot", "a", None], "label": "1.0"}, 1)],
)  # fmt: skip
def test_the_right_choice_by_number_letter_or_text(given, index, llama, loaded, tmp_path):
    rows = [{"text": "film", **given}] * 100
    config = config_for(llama, tmp_path, task="choice", data=json_lines(tmp_path / "a.jsonl", rows))
    dataset = data.load(config, loaded[1])
    assert dataset.train[0].label == index and len(dataset.train[0].answers) == len(dataset.train[0].texts)
    counted = str(given["label"]) not in ("B", "b", "0")
    assert any("count from 0, not from 1" in note for note in dataset.notes) == counted


def test_a_choice_that_is_empty_shifts_no_number(llama, loaded, tmp_path):
    good = {"text": "film", "choices": ["the plot", "a"], "label": 0}
    path = json_lines(tmp_path / "a.jsonl", [good] * 20 + [good | {"choices": ["", "the plot", "a"], "label": 1}])
    dataset = data.load(config_for(llama, tmp_path, task="choice", data=path), loaded[1])
    assert dataset.dropped == {"with an empty choice": 1}


def mean_log_likelihood(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return logits[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].mean().item()


@torch.no_grad()
def test_answers_of_several_tokens_score_their_mean_log_likelihood(llama, loaded, tmp_path):
    model, tokenizer, _ = loaded
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choices(FILLERS, k=draw.randint(1, 5))), "label": 0,
         "choices": [" ".join(draw.choices(FILLERS, k=draw.randint(1, 3))) for _ in range(draw.randint(2, 4))]}
        for _ in range(100)
    ]  # fmt: skip
    config = config_for(llama, tmp_path, task="choice", data=json_lines(tmp_path / "a.jsonl", rows))
    dataset = data.load(config, tokenizer)
    scorer = scorer_of(model, tokenizer, dataset)
    assert isinstance(scorer, OptionScorer)
    examples = dataset.train[:9]
    for padding in ("positions", "apart"):
        scorer.padding = padding
        logits = scorer.logits(scorer.encode(examples))
        for example, found in zip(examples, logits, strict=True):
            expected = [mean_log_likelihood(model, example.tokens, answer) for answer in example.answers]
            assert found[: len(expected)].tolist() == pytest.approx(expected, rel=1e-4)
            assert all(value == -math.inf for value in found[len(expected) :].tolist())
    losses = scorer.losses(scorer.encode(examples))
    assert scorer.loss(scorer.encode(examples)).item() == pytest.approx(losses.mean().item(), rel=1e-6)


@torch.no_grad()
def test_one_token_and_the_general_score_agree(llama, loaded, tmp_path):
    model, tokenizer, _ = loaded
    config = config_for(llama, tmp_path, data=json_lines(tmp_path / "a.jsonl", [{"text": w, "label": n % 2} for n, w in
                                                                               enumerate(FILLERS * 8)]))  # fmt: skip
    dataset = data.load(config, tokenizer)
    one, general = scorer_of(model, tokenizer, dataset), OptionScorer(model, dataset.answers, 1)
    assert type(one) is Scorer
    batch = dataset.train[:8]
    assert one.loss(one.encode(batch)).item() == pytest.approx(general.loss(general.encode(batch)).item(), rel=1e-5)
    assert one.evaluate(batch, 3).accuracy == general.evaluate(batch, 3).accuracy


@torch.no_grad()
def test_generation_is_greedy_and_stops_where_it_should(llama, loaded, tmp_path):
    model, tokenizer, _ = loaded
    rows = [{"text": " ".join(FILLERS[: n % 5 + 1]), "label": ["the plot", "a cast"]} for n in range(100)]
    config = config_for(llama, tmp_path, task="generation", data=json_lines(tmp_path / "a.jsonl", rows))
    dataset = data.load(config, tokenizer)
    scorer = scorer_of(model, tokenizer, dataset, 5)
    assert isinstance(scorer, AnswerScorer)
    examples = dataset.test[:6]
    assert examples[0].texts == ("the plot", "a cast")
    losses = scorer.losses(scorer.encode(examples)).tolist()
    assert losses == pytest.approx(
        [-mean_log_likelihood(model, example.tokens, example.answers[0]) for example in examples], rel=1e-4
    )
    for padding in ("positions", "apart"):
        scorer.padding = padding
        score = scorer.evaluate(examples, 4)
        for example, said in zip(examples, score.said, strict=True):
            tokens = list(example.tokens)
            for _ in range(5):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert said == tokenizer.decode(tokens[len(example.tokens) :], skip_special_tokens=True).strip()
        assert score.metrics["f1"] == pytest.approx(sum(metrics.f1(s, ("the plot", "a cast")) for s in score.said) / 6)
    scorer.decode = lambda tokens: "the\u2028plot\nand more"
    assert scorer.evaluate(examples, 4).said == ("the\u2028plot",) * 6, "other marks than a new line end no answer"


@pytest.mark.parametrize(
    "answer, accepted, f1, exact",
    [
        ("The cat.", ["cat"], 1.0, 1.0),
        ("a cat sat", ["the cat"], 2 / 3, 0.0),
        ("dog", ["cat", "big dog"], 2 / 3, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
        ("cat cat", ["cat"], 2 / 3, 0.0),
    ],
)
def test_metrics_are_those_of_squad(answer, accepted, f1, exact):
    assert metrics.f1(answer, accepted) == pytest.approx(f1) and metrics.exact_match(answer, accepted) == exact


# ---- runs -----------------------------------------------------------------------------------------------------------


def rows_for(task):
    draw = random.Random(0)
    rows = []
    for _ in range(160):
        words = draw.choices(FILLERS, k=draw.randint(2, 5))
        kind = draw.choice(["good", "bad"])
        words.insert(draw.randint(0, len(words)), kind)
        row = {"text": " ".join(words), "label": kind}
        if task == "choice":
            row = {
                "text": row["text"],
                "choices": ["the plot", "a cast"],
                "label": "the plot" if kind == "good" else "a cast",
            }
        rows.append(row)
    return rows


TASKS = [
    ("classification", {"verbalizers": "good= very great,bad= quite terrible"}, "loss"),
    ("classification", {"objective": "accuracy"}, "accuracy"),
    ("choice", {}, "accuracy"),
    ("generation", {"max_new_tokens": 2}, "loss"),
    ("generation", {"max_new_tokens": 2, "objective": "f1"}, "f1"),
]


@pytest.mark.parametrize("task, given, measure", TASKS, ids=[f"{task}-{n}" for n, (task, *_) in enumerate(TASKS)])
def test_every_task_learns(task, given, measure, llama, tmp_path):
    config = config_for(
        llama, tmp_path, task=task, data=json_lines(tmp_path / "a.jsonl", rows_for(task)), train_size=100, dev_size=20,
        test_size=40, steps=150, batch_size=16, eval_every=50, mode="scratch", **given,
        options={"lr": 3e-3 if measure != "f1" else 1e-2, "eps": 1e-2 if measure == "loss" else 5e-2},
    )  # fmt: skip
    result = run(config)
    before, after = (result["test"][when] for when in ("before", "after"))
    better = (before[measure] - after[measure]) if measure == "loss" else (after[measure] - before[measure])
    assert result["status"] == "completed" and better > 0.05, (before, after)
    assert result["metrics"][0] in after
    if task != "generation":
        assert result["examples"]["fixed"] or result["examples"]["still_wrong"]


def test_populations_work_with_every_task(llama, tmp_path):
    for task in ("choice", "generation"):
        config = config_for(llama, tmp_path, task=task, data=json_lines(tmp_path / "a.jsonl", rows_for(task)), steps=2,
                            mode="scratch", options={"members": 2, "groups": 4}, max_new_tokens=2)  # fmt: skip
        assert run(config)["status"] == "completed"


def test_the_learning_rate_is_the_tasks(monkeypatch):
    """Half where losses are larger, unless it was given; of methods that were tried alone."""
    rates = {
        task: Config(task=task, method="pgap").options["lr"] for task in ("classification", "choice", "generation")
    }
    assert rates["choice"] == rates["generation"] == rates["classification"] / 2
    assert Config(method="pgap").for_labels(3).options["lr"] == rates["choice"]
    assert Config(method="pgap").for_labels(2).options["lr"] == rates["classification"]
    assert Config(method="pgap", options={"lr": 3e-5}).for_labels(8).options["lr"] == 3e-5
    assert Config(task="choice", method="pgap", options={"lr": 3e-5}).options["lr"] == 3e-5
    assert tuned.OVERRIDES.keys() == {*available_methods()}
    options_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.delitem(tuned.OVERRIDES, "fzoo")  # as a method of another package
        untried = Config(task="choice", method="fzoo")
    options_of.cache_clear()
    assert untried.options["lr"] == method_options("fzoo")["lr"].default and untried.schedule == "constant"


def test_adapters_have_a_learning_rate_and_radius_of_their_own():
    """Unless they were given; of methods that were tried."""
    whole, adapter = Config(method="mezo").options, Config(method="mezo", lora_rank=4).options
    assert adapter["lr"] > whole["lr"] and adapter["eps"] > whole["eps"]
    assert adapter["lr"] == 2 * Config(method="mezo", lora_rank=4, task="choice").options["lr"]
    given = Config(method="mezo", lora_rank=4, options={"lr": 3e-5, "eps": 2e-3}).options
    assert (given["lr"], given["eps"]) == (3e-5, 2e-3)
    for method in ("fzoo", "lozo"):
        assert Config(method=method, lora_rank=4).options == Config(method=method).options
