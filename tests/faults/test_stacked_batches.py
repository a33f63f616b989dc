"""Both signs in one forward: models that mix the rows of the batch are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import INPUTS, LABELS, PAIRABLE, Net, make, refused, seeded, take_steps
from support.selection import cycled
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from pgap_kernels.optim import make_optimizer
from pgap_kernels.perturbation import Scratch

pytestmark = pytest.mark.filterwarnings("error")


class Rows(nn.Module):
    """Layers over one row after the other, mixed in some way afterwards."""

    def __init__(self, mix, batch_first=True, norm=None) -> None:
        super().__init__()
        self.layer, self.last, self.norm = nn.Linear(8, 8), nn.Linear(8, 2), norm
        self.mix, self.batch_first = mix, batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            hidden = self.mix(torch.tanh(self.layer(x)))
        else:  # as many words as rows, so that their number tells nothing
            words = x + torch.arange(len(x))[:, None, None] * 0.1
            hidden = self.mix(torch.tanh(self.layer(words)))
        return self.last(hidden if self.norm is None else self.norm(hidden))


MIXED = {
    "flipped": (lambda h: h.flip(0), True),
    "average": (lambda h: h - h.mean(0), True),
    "only_rows_before": (lambda h: h.cumsum(0), True),
    "only_rows_after": (lambda h: h.flip(0).cumsum(0).flip(0), True),
    "neighbours": (lambda h: h + h.roll(1, 0), True),
    "words_first_averaged": (lambda h: h.mean(0), False),
    "words_first_last_word": (lambda h: h[-1], False),
    "words_first_first_word": (lambda h: h[0], False),
}


def halves_of(model: nn.Module) -> Tensor:
    logits = model(torch.cat([INPUTS, INPUTS]))
    return torch.stack([F.cross_entropy(half, LABELS) for half in logits.chunk(2)])


# Losses tell, whatever the mode: each way to mix in one of them.
@pytest.mark.parametrize("mixed, case", cycled([*MIXED], PAIRABLE))
def test_pairing_a_model_that_mixes_rows(mixed, case):
    model = seeded(Rows, *MIXED[mixed])
    optimizer = make(case, model, members=2)
    before = snapshot(model)
    message = r"^members: a point of one slice of the batch moved the loss of another"
    refused(RuntimeError, message, lambda: take_steps(optimizer, model, 1, halves_of))
    assert_same_weights(model, before)


@pytest.mark.parametrize("case", PAIRABLE)
def test_pairing_with_gradients_on_in_the_closure(case):
    seen = ([], [])
    for context, losses in zip((torch.enable_grad, torch.no_grad), seen, strict=True):
        model = seeded(Net)
        optimizer = make(case, model, members=2)

        def closure(context=context, losses=losses, model=model):
            with context():
                losses.append(halves_of(model).detach())
            return losses[-1]

        for _ in range(4):
            optimizer.step(closure)
    assert torch.allclose(torch.stack(seen[0]), torch.stack(seen[1]), rtol=0, atol=1e-6)
    assert all(losses[0] != losses[1] for losses in seen[0][3:])


def test_pairing_a_model_that_averages_in_training_only():
    model = seeded(Rows, torch.relu, True, nn.BatchNorm1d(8, affine=False)).eval()
    optimizer = make("mezo-scratch", model, members=2)
    take_steps(optimizer, model, 2, halves_of)
    model.train()
    refused(RuntimeError, r"^members: a point of one slice", lambda: take_steps(optimizer, model, 1, halves_of))


@pytest.mark.parametrize("method, members", [("fzoo", 3), ("hizoo", 3), ("zo-muon", 2), ("agzo", 2)])
def test_a_method_whose_first_point_is_where_the_weights_are(method, members):
    """Nothing moves there, which shows nothing."""
    model = seeded(Rows, *MIXED["neighbours"])
    optimizer = make_optimizer(method, model, mode="auto", members=members, eps=1e-2)

    def closure():
        logits = model(torch.cat([INPUTS] * members))
        return torch.stack([F.cross_entropy(part, LABELS) for part in logits.chunk(members)])

    refused(RuntimeError, r"^members: a point of one slice", lambda: optimizer.step(closure))


class StrictRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class MeanRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.mean()


class Gained(nn.Linear):
    """Its forward is that of its base, and knows nothing of the other vector."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.gain = nn.Parameter(torch.ones(8))


LAYERS = {
    "linear": nn.Linear(8, 8),
    "conv1d": Conv1D(8, 8),
    "layer_norm": nn.LayerNorm(8),
    "rms_norm": LlamaRMSNorm(8),
    "torch_rms_norm": nn.RMSNorm(8, eps=1e-6),
}
ONE_BY_ONE = {"strict_rms_norm": StrictRMSNorm(8), "mean_rms_norm": MeanRMSNorm(8), "gained": Gained()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, *ONE_BY_ONE])
def test_a_layer_of_which_only_vectors_move(layer, dtype, monkeypatch):
    """It runs once for all slices, and rounds as the batch with each point's vectors does."""
    module = copy.deepcopy((LAYERS | ONE_BY_ONE)[layer]).to(dtype)
    for p in module.parameters():
        p.requires_grad_(p.dim() < 2)
        nn.init.trunc_normal_(p, 1.0, 0.1)
    filled, push = [], Scratch.push
    monkeypatch.setattr(Scratch, "push", lambda *args: filled.append(args) or push(*args))
    outputs = {}
    for members in (1, 2):
        twin, seen = copy.deepcopy(module), outputs.setdefault(members, [])

        def closure(twin=twin, seen=seen, members=members):
            seen.append(twin(torch.cat([INPUTS, INPUTS]).to(dtype).view(-1, 4, 8)).float())
            rows = seen[-1].square().flatten(1).mean(1)
            return rows if members == 2 else rows.mean()

        optimizer = make("mezo-scratch", twin, members=members, eps=0.1)
        optimizer.step(closure)  # slices are tried in the first
        assert bool(filled) == (members == 2 and layer in ONE_BY_ONE)
        del seen[:]
        optimizer.step(closure)
    plus, minus = outputs[1]
    stacked = torch.cat([plus.chunk(2)[0], minus.chunk(2)[1]])
    torch.testing.assert_close(outputs[2][0], stacked, rtol=torch.finfo(dtype).eps, atol=32 * 2.0**-24)
    assert not torch.equal(plus, minus)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("case", PAIRABLE)
def test_a_model_that_draws_random_numbers(case, p):
    """However little they do to the losses; in evaluation mode it draws none."""
    model = seeded(Rows, torch.relu, True, nn.Dropout(p))
    optimizer, before = make(case, model, members=2), snapshot(model)
    rows = lambda: rows_of(model, 2)()  # noqa: E731
    message = r"^closure: draws random numbers, so that slices at the same weights have other losses"
    refused(RuntimeError, message, lambda: take_steps(optimizer, model, 1, lambda _: rows() * 1e-3))
    assert_same_weights(model, before)
    model.eval()
    optimizer.step(rows)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


@pytest.mark.parametrize("case", PAIRABLE)
def test_modules_that_move_inside_one_another(case):
    model = nn.Sequential(nn.Linear(8, 8), seeded(Around))
    optimizer = make(case, model, members=2)
    message = r"^points: '1\.inner' is called by '1', which has parameters of its own that move"
    refused(RuntimeError, message, lambda: optimizer.step(rows_of(model, 2)))
    model[1].scale.requires_grad_(False)
    optimizer.step(rows_of(model, 2))


def rows_of(model: nn.Module, copies: int):
    inputs, labels = torch.cat([INPUTS] * copies), torch.cat([LABELS] * copies)
    return lambda: F.cross_entropy(model(inputs), labels, reduction="none")


def test_a_layer_that_averages_over_the_slices_that_run_together():
    """Slices at W share a filling, and are compared with others that do not."""
    model = seeded(Rows, torch.relu, True, nn.BatchNorm1d(8))
    optimizer = make_optimizer("mezo", model, mode="scratch", groups=4, members=2, baseline="clean", eps=1e-3)
    optimizer.step(rows_of(model, 2))
    moved, still = torch.tensor(optimizer.last.losses).chunk(2)
    assert 0 < (moved - still).abs().max() < 0.05 and still.std() > 0.05


def test_slices_are_tried_again_in_evaluation_mode_while_a_window_has_faded():
    model = seeded(Net)
    optimizer = make_optimizer(
        "pgap", model, mode="folded", merge="window", weight_decay=0.1, lr=0.1, rank=4, window=3, probes=2, members=2,
        on_nonfinite="skip",
    )  # fmt: skip
    closure = lambda: halves_of(model)  # noqa: E731
    for _ in range(2):
        optimizer.step(closure)
    optimizer.step(lambda: closure() * torch.nan)  # so that the window is still open at the refresh
    model.eval()
    assert optimizer.step(closure) > 0 and optimizer.last.refreshed


def test_slices_are_tried_again_where_a_difference_is_projected():
    """W0 plus a difference that was rounded is not W to the last bit."""
    model = seeded(Net)
    optimizer = make_optimizer(
        "dizo", model, mode="scratch", members=2, select=["*"], kappa=2, iterations=4, lr=0.1, eps=1e-2
    )
    for step in range(10):
        model.train(step < 9)
        assert optimizer.step(lambda: halves_of(model)) > 0


@pytest.mark.parametrize("case, older_goes", cycled(["mezo-scratch", "pgap-window"], [True, False], each=2))
def test_pairing_two_optimizers_of_which_one_is_detached(case, older_goes):
    """Both wrap the forwards of the same modules; the one that stays goes on to see its own points."""
    model = seeded(Net)
    named = list(model.named_parameters())
    weights, biases = ([(n, p) for n, p in named if n.endswith(end)] for end in ("weight", "bias"))
    older = make(case, weights, model=model, members=2)
    newer = make("mezo-scratch", biases, model=model, members=2)
    for optimizer in (older, newer):
        take_steps(optimizer, model, 1, halves_of)
    gone, stays = (older, newer) if older_goes else (newer, older)
    gone.detach()
    seen = []
    stays.step(lambda: seen.append(halves_of(model)) or seen[-1])
    assert seen[-1][0] != seen[-1][1]
    stays.detach()
    assert not any("forward" in module.__dict__ for module in model.modules())
