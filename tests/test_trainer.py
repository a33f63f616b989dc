"""The Trainer of transformers with zeroth-order steps: these are those of a loop by hand, everything else is its own.

The same file runs under the oldest supported transformers in test_trainer_oldest.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from accelerate.state import AcceleratorState
from support.trainer_tiny import MODES, InOrder, arguments, digest, examples, model_of, trainer_of
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from pgap_kernels import per_example_loss
from pgap_kernels.integrations.ranks import check_shares
from pgap_kernels.integrations.transformers import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from pgap_kernels.optim import NonFiniteLossError, available_methods, make_optimizer, method_options

TESTS = Path(__file__).parent
OLDEST = Path(sys.prefix) / "transformers-oldest"


@pytest.fixture(autouse=True)
def nothing_stays():
    """What accelerate keeps for the whole process, such as the precision of the trainer before."""
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(True)
    os.environ.clear()
    os.environ.update(before)


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(kind: str, accumulation: int, method: str, batch: int = 2, **options):
    """The losses and weights of six steps without a Trainer."""
    model = model_of(kind).eval()
    rows, losses = examples(kind), []
    optimizer = make_optimizer(method, model, lr=1e-3, seed=3, **options)
    for step in range(6):
        parts = [rows[(step * accumulation + i) * batch :][:batch] for i in range(accumulation)]
        batches = [default_data_collator(part) for part in parts]
        # What a Trainer counts: tokens with a label, and since 5.0 only those that are predicted, if it knows the loss.
        new = int(transformers.__version__.split(".")[0]) >= 5
        first = 1 if new and kind != "gpt2" else 0
        count = sum(int((b["labels"][..., first:] != -100).sum()) for b in batches)

        def closure(batches=batches, count=count, new=new):
            total = torch.zeros((), dtype=torch.float64)
            for b in batches:
                scaled = {} if kind == "bert" else {"num_items_in_batch": torch.tensor(count)}
                # transformers 5 believes that BERT's loss is scaled already, and so doubles it: so do we.
                total += model(**b, **scaled).loss.double() / (len(batches) if kind == "bert" and not new else 1)
            return total

        losses.append(optimizer.step(closure))
    optimizer.merge()
    return losses, digest(model)


# How a loss is divided differs between BERT and the others alone, and not from mode to mode.
@pytest.mark.parametrize(
    "mode, kind, accumulation",
    [(mode, "llama", count) for mode in MODES for count in (1, 2)]
    + [("pgap-window", *row) for row in (("opt", 1), ("gpt2", 2), ("bert", 1), ("bert", 2))]
    + [("mezo-two-pass", "bert", 2)],
)
def test_steps_are_those_of_a_loop_by_hand(kind, mode, accumulation):
    options = MODES[mode]
    trainer = trainer_of(kind, data=InOrder(examples(kind)), gradient_accumulation_steps=accumulation, **options)
    trainer.train()
    own = {name.removeprefix("zo_"): value for name, value in options.items()}
    method = own.pop("method", "pgap")
    if method == "pgap":
        own |= {"window": 4, "rank": 4, "probes": 2}
    losses, weights = by_hand(kind, accumulation, method, **own)
    assert digest(trainer.model) == weights and not any(p.grad is not None for p in trainer.model.parameters())
    assert losses_of(trainer) == pytest.approx(losses, abs=1e-4)  # as the Trainer rounds them
    assert type(trainer.model_wrapped) is type(trainer.model) and trainer.zo.steps == 6 and not trainer.zo.pending


@pytest.mark.parametrize("mode", ["mezo-inplace", "mezo-scratch"])
def test_losses_are_averaged_once_where_a_forward_is_repeated(mode, monkeypatch):
    """Other processes do not repeat it, and would not wait (rotary embeddings grow with the longest batch so far)."""
    forwards, means = [], []
    monkeypatch.setattr("pgap_kernels.integrations.transformers.mean_over_ranks", lambda x: means.append(x) or x)
    model = model_of("llama")
    model.register_buffer("longest", torch.ones(2))

    def grow(*args):
        forwards.append(args)
        if len(forwards) == 3:  # the first of the second step
            model.register_buffer("longest", torch.full((2,), 2.0))

    model.register_forward_pre_hook(grow)
    trainer_of(model=model, max_steps=3, **MODES[mode]).train()
    assert len(means) == 6 and len(forwards) == 7


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "bert"])
def test_a_killed_run_resumes_to_the_same_bits(kind):
    command = [sys.executable, "-W", "ignore", str(TESTS / "support" / "trainer_killed.py"), kind]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"wrong": [], "rows": len(MODES)}


# ---- the Trainer's options ------------------------------------------------------------------------------------------


def smoothed(outputs, labels, num_items_in_batch=None):
    return per_example_loss(outputs["logits"], labels).mean()


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
# Options, and whether losses are those of a run without them; None where rounding decides.
OPTIONS = {
    "linear": ({"lr_scheduler_type": "linear"}, False),
    "cosine with warm-up": ({"lr_scheduler_type": "cosine", "warmup_steps": 2}, False),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED}, True),
    "weight decay": ({"weight_decay": 10.0}, False),
    "label smoothing": ({"label_smoothing_factor": 0.1}, False),
    "workers": ({"dataloader_num_workers": 2}, True),
    "checkpointing": ({"gradient_checkpointing": True}, True),
    "bf16": ({"bf16": True}, None),
    "empty cache": ({"torch_empty_cache_steps": 2}, True),
    "neftune": ({"neftune_noise_alpha": 5.0}, True),
    "best at end": ({"load_best_model_at_end": True, "save_total_limit": 1, **EVALUATED}, True),
    "another batch size if need be": ({"auto_find_batch_size": True}, True),
    "window": ({"zo_mode": "folded", "zo_merge": "window", **EVALUATED}, None),
    "two passes": ({"zo_method": "mezo", "zo_two_pass": True, "zo_mode": "inplace", **EVALUATED}, False),
    "skip": ({"zo_on_nonfinite": "skip"}, True),
}


@pytest.fixture(scope="module")
def plain():
    trainer = trainer_of()
    trainer.train()
    return losses_of(trainer)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_trainer(name, plain, tmp_path):
    options, same = OPTIONS[name]
    trainer = trainer_of(folder=tmp_path, named={"eval_dataset": examples("llama", 8)}, **options)
    trainer.train()
    found = losses_of(trainer)
    assert len(found) == 6 and all(loss == loss and loss > 0 for loss in found)
    assert same is None or (found == plain) is same
    if "load_best_model_at_end" in options:
        best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        assert trainer.state.best_metric == best == pytest.approx(trainer.evaluate()["eval_loss"], abs=0)


def test_a_loss_of_ones_own_finds_its_labels():
    trainer = trainer_of(named={"compute_loss_func": smoothed})
    trainer.train()
    assert len(losses_of(trainer)) == 6


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_a_compiled_model(mode, backend, tmp_path):
    """Also after another model of its class was compiled in another mode, without hooks or with others."""
    found = []
    for compiled in ({"torch_compile": True, "torch_compile_backend": backend}, {}):
        trainer = trainer_of(
            folder=tmp_path, zo_method="lozo", zo_mode=mode, **EVALUATED, **compiled,
            named={"eval_dataset": examples("llama", 8)},
        )  # fmt: skip
        trainer.train()
        found.append(losses_of(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize("dtype, options", [(torch.bfloat16, {}), (torch.bfloat16, {"zo_residual": True})])
def test_sixteen_bit_models(dtype, options):
    trainer = trainer_of(model=model_of("llama").to(dtype), **options)
    trainer.train()
    assert trainer.zo.mode == "folded" and len(losses_of(trainer)) == 6


def test_a_checkpoint_of_the_model_alone_goes_on_with_new_noise(tmp_path):
    trainer_of(folder=tmp_path, save_strategy="steps", save_steps=4, save_only_model=True, max_steps=4).train()
    trainer = trainer_of(folder=tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.zo.steps == trainer.state.global_step == 6
    assert len(losses_of(trainer)) == 6  # four of them the checkpoint's


def test_a_second_call_goes_on():
    trainer = trainer_of()
    trainer.train()
    before = digest(trainer.model)
    trainer.train()
    assert trainer.zo.steps == 12 and digest(trainer.model) != before


def test_the_noise_has_its_own_seed():
    first, second, other = (trainer_of(zo_seed=seed, seed=data) for seed, data in ((7, 3), (7, 3), (8, 3)))
    for trainer in (first, second, other):
        trainer.train()
    assert digest(first.model) == digest(second.model) != digest(other.model)
    assert first.zo.seed == 7


# ---- the loop -------------------------------------------------------------------------------------------------------


class Events(TrainerCallback):
    """What was called, in order."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name in ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
            return lambda args, state, control, **kwargs: self.seen.append(name)
        return super().__getattribute__(name)


def test_callbacks_come_in_the_usual_order():
    orders = []
    for cls in (ZOTrainer, Trainer):
        events = Events()
        given = arguments(max_steps=2, gradient_accumulation_steps=2)
        if cls is Trainer:
            given = TrainingArguments(
                given.output_dir, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2,
                use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            )  # fmt: skip
        cls(model_of("llama"), given, train_dataset=examples("llama"), callbacks=[events]).train()
        orders.append(events.seen)
    assert orders[0] == orders[1] and orders[0].count("on_optimizer_step") == 2


def test_the_log_says_what_a_step_saw():
    trainer = trainer_of(zo_method="mezo", zo_mode="inplace")
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert entry["zo_rho"] == pytest.approx(abs(trainer.zo.last.rho[0]), rel=1e-6)
    assert entry["zo_weight_passes"] == pytest.approx(6 * 3) and "grad_norm" not in entry
    assert all(entry[f"zo_seconds_{part}"] >= 0 for part in ("forward", "perturb", "refresh"))


class Interrupt(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):  # the step is taken, and the loop does not know yet
        if state.global_step == 2:
            raise KeyboardInterrupt


class InterruptBefore(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("callback", [Interrupt, InterruptBefore])
def test_after_ctrl_c_the_weights_are_the_models_and_training_can_go_on(callback):
    trainer = trainer_of(zo_mode="folded", zo_merge="window", named={"callbacks": [callback()]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.zo.pending
    trainer.remove_callback(callback)
    trainer.train()
    assert not trainer.zo.is_ahead and len(losses_of(trainer)) == 6


class NaNAt(nn.Module):
    """A model whose loss is NaN in some forwards."""

    def __init__(self, model, numbers):
        super().__init__()
        self.model, self.numbers, self.calls, self.config = model, numbers, 0, model.config

    def forward(self, input_ids, attention_mask, labels):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if self.calls in self.numbers:
            output["loss"] = output["loss"] * float("nan")
        self.calls += 1
        return output


def test_a_loss_that_is_not_finite():
    wrapped = NaNAt(model_of("llama"), {4})
    before = digest(wrapped)
    trainer = trainer_of(model=wrapped, zo_method="mezo", zo_mode="inplace", max_steps=3, zo_on_nonfinite="skip")
    trainer.train()
    assert trainer.zo.skipped == 1 and trainer.zo.steps == 3 and digest(wrapped) != before
    wrapped = NaNAt(model_of("llama"), {1})
    with pytest.raises(NonFiniteLossError):
        trainer_of(model=wrapped, zo_method="mezo", zo_mode="scratch").train()
    assert digest(wrapped) == before


# ---- several directions in one forward ------------------------------------------------------------------------------

POPULATION = {"zo_members": 2, "zo_groups": 2, "zo_directions": 2, "zo_baseline": "loo", "dataloader_drop_last": True}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_members_and_groups(kind, accumulation):
    """One forward with all slices is as many forwards of one copy."""
    runs = []
    for members in (2, 1):
        options = {**POPULATION, "zo_members": members, "zo_mode": "scratch"}
        trainer = trainer_of(
            kind, data=InOrder(examples(kind)), gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4, **options,
        )  # fmt: skip
        trainer.train()
        assert trainer.zo.last.signal.squared_norm is not None and "zo_squared_norm" in trainer.state.log_history[0]
        runs.append((losses_of(trainer), list(trainer.model.parameters())))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=2e-4)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_every_option_of_every_method_is_an_argument():
    for method in available_methods():
        options = set(method_options(method)) - {
            "lr",
            "weight_decay",
            "seed",
            "batch_size",
            "model",
            "tensor_ids",
            "read_by",
        }
        assert {f"zo_{name}" for name in options} <= set(ZOTrainingArguments.__dataclass_fields__), method


@pytest.mark.parametrize("method", available_methods())
def test_every_method_trains(method):
    options = {"zo_select": ["*k_proj.weight"]} if method == "dizo" else {}
    data = examples("llama", 16)
    trainer = trainer_of(data=data, zo_method=method, max_steps=2, learning_rate=None, **options)
    trainer.train()
    assert (
        trainer.zo.steps == 2
        and trainer.zo.method
        == make_optimizer(
            method, nn.Linear(4, 4), **({"select": ["weight"]} if options else {}), **batch_size(method)
        ).method
    )
    assert trainer.args.learning_rate == method_options(method)["lr"].default


def batch_size(method):
    return {"batch_size": 4} if "batch_size" in method_options(method) else {}


def test_arguments_from_a_command_line():
    given = "--output_dir x --use_cpu --report_to none --zo_method mezo --zo_two_pass --zo_probes 3 --zo_mode inplace"
    (parsed,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(given.split())
    assert parsed.method_options() == {"probes": 3, "two_pass": True, "mode": "inplace"}
    assert parsed.learning_rate == method_options("mezo")["lr"].default and parsed.max_grad_norm == 0
    helene = arguments(zo_method="helene", zo_floors="bias=0.5, *=2", zo_options='{"gamma": 0.5}')
    assert helene.method_options() == {"floors": {"bias": 0.5, "*": 2.0}, "gamma": 0.5}
    assert helene.make_optimizer(nn.Linear(2, 2), 7).batch_size == 7


def test_help_shows_each_methods_default(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("\n", " ").split())
    for text in (
        "(default: 0.001; fzoo: 0.0001)",  # what most have, then who differs
        "lozo, lozo-m: 2; pgap: 128;",
        "--zo_two_pass [ZO_TWO_PASS]",  # a switch takes no value
        "which is meant for tuning whole models. (default: 1e-06;",
    ):
        assert text in shown
    options = re.findall(r"--zo_\w+ .*?\(default: (.*?)\)", shown)
    assert len(options) > 70 and "given" not in options


def test_the_optimizers_errors_name_arguments():
    for given, message in (
        ({"zo_eps": -1.0}, "zo_eps: got -1.0"),
        ({"zo_mode": "fused"}, "zo_mode: got 'fused'"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"zo_mode": "inplace", "zo_members": 2}, "zo_members, zo_groups: got 2 slices"),
    ):
        with pytest.raises(ValueError) as caught:
            arguments(zo_method="mezo", **given).make_optimizer(nn.Linear(2, 2), 4)
        assert str(caught.value).startswith(message)


def test_a_script_for_mezos_trainer_runs():
    """Their arguments by name, and no other."""
    trainer = trainer_of(zo_method="mezo", zo_eps=1e-3, learning_rate=1e-6, max_steps=3)
    trainer.train()
    assert trainer.zo.param_groups[0]["eps"] == 1e-3 and trainer.zo.param_groups[0]["initial_lr"] == 1e-6


REFUSED = {
    "max_grad_norm": ({"max_grad_norm": 1.0}, "max_grad_norm: got 1.0; accepted: 0"),
    "fsdp": ({"fsdp": "full_shard"}, "fsdp: got 'full_shard'; accepted: unset"),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: got"),
    "optim_args": ({"optim_args": "a=1"}, "optim_args: got 'a=1'; accepted: unset"),
    "optim_target_modules": ({"optim_target_modules": "all-linear"}, "optim_target_modules: got"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel: got True with zo_mode=None; accepted: with zo_mode='inpl"),
    "method": ({"zo_method": "mezzo"}, "zo_method: got 'mezzo' (did you mean 'mezo'?)"),
    "option": ({"zo_method": "mezo", "zo_rank": 4}, "zo_rank: zo_method='mezo' has no such option"),
    "switch": ({"zo_method": "tezo", "zo_antithetic": True}, "zo_antithetic: zo_method='tezo' has no such option"),
    "directions": (
        {"zo_method": "lozo", "zo_probes": 2},
        "zo_probes: zo_method='lozo' has no such option (did you mean zo_directions?)",
    ),
    "weight_decay": ({"zo_method": "dizo", "weight_decay": 0.1}, "weight_decay: got 0.1; accepted: 0 with zo_method="),
    "options": ({"zo_options": "[1]"}, "zo_options: got '[1]'; accepted: a dict"),
    "own option": ({"zo_options": '{"foo": 1}'}, "zo_options: got 'foo', but zo_method='pgap' has no such option"),
    "seed": ({"zo_seed": -1}, "zo_seed: got -1"),
    "floors": ({"zo_method": "helene", "zo_floors": "bias"}, "zo_floors: got 'bias'; accepted: NAME=NUMBER"),
    "dropout?": ({"zo_dropout": "yes"}, "zo_dropout: got 'yes'; accepted: True or False"),
    "dropout": ({"zo_dropout": True, "zo_members": 2}, "zo_dropout: got True; accepted: False with zo_members"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_by_name_before_anything_happens(name):
    given, message = REFUSED[name]
    before = dict(os.environ)
    with pytest.raises((ValueError, TypeError)) as caught:
        arguments(**given)
    assert str(caught.value).startswith(message) and dict(os.environ) == before


class Two(torch.optim.SGD):
    pass


class OwnStep(ZOTrainerMixin, type("Sampling", (Trainer,), {"training_step": lambda self, *given: None})):
    pass


def test_a_step_of_a_trainers_own_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^got Sampling, whose training_step would not be called"):
        OwnStep(model_of("llama"), arguments(), train_dataset=examples("llama"))


def test_trainers_refuse_by_name(tmp_path):
    model, rows = model_of("llama"), examples("llama")
    with pytest.raises(TypeError, match="args: got TrainingArguments; accepted: ZOTrainingArguments"):
        ZOTrainer(model, TrainingArguments(tmp_path, use_cpu=True), train_dataset=rows)
    with pytest.raises(TypeError, match="args: got NoneType"):
        ZOTrainer(model)
    with pytest.raises(TypeError, match=r"optimizers: got Two; accepted: an optimizer of pgap_kernels\.optim, or None"):
        trainer_of(named={"optimizers": (Two(model.parameters(), 1.0), None)})
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs: accepted: None"):
        trainer_of(named={"optimizer_cls_and_kwargs": (Two, {})})
    two = arguments()
    two._n_gpu = 2
    two.__dict__["_setup_devices"] = torch.device("cpu")
    with pytest.raises(ValueError, match="args: got 2 GPUs in one process"):
        ZOTrainer(model, two, train_dataset=rows)

    class Rollouts(Trainer):
        def _prepare_inputs(self, inputs):
            return inputs

    class Mixed(ZOTrainerMixin, Rollouts):
        pass

    with pytest.raises(TypeError, match="got Rollouts, which makes batches of its own"):
        Mixed(model, arguments(), train_dataset=rows)

    class Weighted(ZOTrainer):
        def compute_loss(self, *given, **named):
            return 2 * super().compute_loss(*given, **named)

    members = arguments(zo_members=2, zo_mode="scratch")
    with pytest.raises(ValueError, match="zo_members, zo_groups: got a Weighted with a compute_loss of its own"):
        Weighted(model, members, train_dataset=rows).train()
    plain = TrainingArguments(tmp_path, use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    optimizer = make_optimizer("mezo", model)
    with pytest.raises(TypeError, match=r"closure: got None.*integrations\.transformers\.ZOTrainer"):
        Trainer(model, plain, train_dataset=rows, optimizers=(optimizer, None)).train()


@pytest.mark.parametrize("kind, given, message", [
    ("llama", {"zo_groups": 2, "zo_mode": "scratch"}, "dataloader_drop_last: got False; accepted: True with zo_groups"),
    ("llama", {**POPULATION, "zo_groups": 3, "zo_mode": "scratch"}, "zo_groups: got 3 for batches of 2 examples"),
    ("llama", {**POPULATION, "label_smoothing_factor": 0.1, "zo_mode": "scratch"}, "label_smoothing_factor, compute_l"),
    ("wrapped", {**POPULATION, "zo_mode": "scratch"}, "zo_members, zo_groups: got a NaNAt, whose losses per example"),
])  # fmt: skip
def test_populations_are_refused_where_losses_per_example_are_not_known(kind, given, message):
    model = NaNAt(model_of("llama"), ()) if kind == "wrapped" else model_of(kind)
    with pytest.raises(ValueError) as caught:
        trainer_of(model=model, **given).train()
    assert str(caught.value).startswith(message)


def test_a_model_that_an_evaluation_has_cast_is_not_trained():
    trainer = trainer_of(named={"eval_dataset": examples("llama", 4)}, bf16_full_eval=True)
    trainer.evaluate()
    with pytest.raises(ValueError, match="fp16_full_eval, bf16_full_eval: the evaluation before has cast"):
        trainer.train()


def test_an_optimizer_of_ones_own():
    model = model_of("llama")
    optimizer = make_optimizer("lozo", model, lr=1e-4)
    trainer = trainer_of(model=model, named={"optimizers": (optimizer, None)})
    trainer.train()
    assert trainer.zo is optimizer and optimizer.steps == 6


def test_what_has_no_effect_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="pgap_kernels"):
        trainer_of(optim="adafactor", gradient_checkpointing=True, max_steps=1).train()
    said = [record.getMessage() for record in caplog.records]
    assert any("optim: got" in text and "adafactor" in text.lower() for text in said)
    assert any("gradient_checkpointing: has no effect" in text for text in said)


def test_a_resumed_run_says_which_arguments_it_does_not_use(tmp_path, caplog):
    options = {"zo_method": "mezo", "save_strategy": "steps", "save_steps": 2}
    trainer_of(folder=tmp_path, max_steps=2, **options).train()
    trainer = trainer_of(folder=tmp_path, max_steps=3, zo_eps=0.5, zo_seed=9, **options)
    with caplog.at_level(logging.WARNING, logger="pgap_kernels"):
        trainer.train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records]
    assert [
        text
        for text in said
        if "resume_from_checkpoint: zo_eps stays 0.001, from the checkpoint; the given 0.5" in text
    ]
    assert len([text for text in said if "resume_from_checkpoint" in text]) == 2  # and the seed


def test_warnings_point_at_the_script():
    with pytest.warns(UserWarning, match="16-bit weights are perturbed in place") as warned:
        trainer_of(model=model_of("llama").bfloat16(), zo_method="mezo", zo_mode="inplace", max_steps=1).train()
    assert __file__ in [w.filename for w in warned]


@dataclass
class Other(ZOTrainingArguments):
    more: int = 3


class OtherTrainer(ZOTrainerMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) * 2


def test_the_parts_compose(plain):
    given = {**arguments().to_dict(), "more": 4, "report_to": []}
    trainer = OtherTrainer(
        model_of("llama"), Other(**{k: v for k, v in given.items() if Other.__dataclass_fields__[k].init}),
        train_dataset=examples("llama"),
    )  # fmt: skip
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(2 * plain[0], rel=1e-3) and trainer.args.more == 4


# ---- several processes ----------------------------------------------------------------------------------------------


def test_methods_that_see_more_than_losses_are_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^AGZO: got it in 2 processes"):
        check_shares(make_optimizer("agzo", layer))
    check_shares(make_optimizer("pgap", layer))


@pytest.mark.slow(seconds=20)
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    script = TESTS / "support" / "trainer_ranks.py"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    found = {}
    for ranks in (1, 2):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                   str(ranks), str(script), str(tmp_path / str(ranks))]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found[ranks] = [json.loads((tmp_path / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    (alone,), (first, second) = found[1], found[2]
    for row, losses in alone["losses"].items():
        assert first["losses"][row] == pytest.approx(losses, abs=2e-4), row
    assert first["digests"] == second["digests"] and first["refused"] == second["refused"] == ["state_dict"]
    assert not first["wrapped"]
