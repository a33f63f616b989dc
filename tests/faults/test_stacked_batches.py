"""Both signs in one forward: models that mix the rows of the batch are refused."""

from __future__ import annotations

import pytest
import torch
from support.models import assert_same_weights, snapshot
from support.recipes import INPUTS, LABELS, PAIRABLE, Net, make, refused, seeded, take_steps
from support.selection import cycled
from torch import Tensor, nn
from torch.nn import functional as F

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
