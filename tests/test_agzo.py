"""AGZO's subspace: that of the inputs which the layers get at W."""

from __future__ import annotations

import math

import pytest
import torch
from naive import agzo
from support.bounds import UNIT
from support.helpers import assert_same_bits
from support.models import filled
from torch import nn

from pgap_kernels import draw, noise
from pgap_kernels.noise import Role
from pgap_kernels.optim import AGZO

N, TOKENS, RANK = 6, 8, 2


@pytest.mark.parametrize("iterations", [1, 3])
def test_basis(iterations):
    """H has singular values 4 and 2 and much smaller ones, so that A is well conditioned."""
    model = nn.Linear(N, 5)
    opt = AGZO(model, rank=RANK, iterations=iterations, seed=3)
    (w,) = opt.matrices()
    left, right = (torch.linalg.qr(draw((size, N), 1, size).double()).Q for size in (N, TOKENS))
    H = left * torch.tensor([4.0, 2, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64) @ right.T
    rows = H.T.float().contiguous()
    H = rows.T.double()
    omega = draw((TOKENS, RANK), noise.derive(3, 0, Role.RANGE_FINDER), w.id).double()
    want = agzo.basis(H, omega, iterations)
    # A product is off by the length of its sums, and so is a QR, times the condition of what is decomposed.
    conditions = [torch.linalg.cond(H @ omega), torch.linalg.cond(H @ (H.T @ want))]
    bound = (N + TOKENS + 2 * RANK * N) * UNIT * (conditions[0] + iterations * conditions[1])
    assert bound < 1e-3 and (want - agzo.basis(H, omega, iterations - 1)).norm() > 2 * bound
    assert (opt.basis(w, rows) - want).norm() <= bound


def test_basis_is_orthonormal_under_autocast():
    model = nn.Linear(N, 5)
    opt = AGZO(model, rank=RANK, mode="inplace")
    x = draw((TOKENS, N), 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(lambda: model(x).float().square().mean())
    a = opt.state[model.weight]["right"].double()
    assert (a.T @ a - torch.eye(RANK).double()).abs().max() < N * UNIT


class Twice(nn.Module):
    """A layer that is called twice, one behind it, and an embedding that no linear layer uses."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.last = nn.Embedding(7, N), nn.Linear(N, N), nn.Linear(N, 3)
        filled(self)

    def forward(self, ids):
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(self.words(ids))))))


@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_inputs_are_those_of_the_first_call_at_the_weights(mode):
    model, ids = Twice(), torch.arange(12).view(4, 3) % 7
    opt = AGZO(model, rank=RANK, mode=mode)
    assert [w.name for w in opt.matrices()] == ["layer.weight", "last.weight"]
    seen: dict[str, list] = {"layer": [], "last": []}
    for name, inputs in seen.items():
        hook = lambda module, args, inputs=inputs: inputs.append(args[0].reshape(-1, N))  # noqa: E731
        getattr(model, name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(ids)
    wanted = {f"{name}.weight": inputs[0] for name, inputs in seen.items()}
    wanted = {w.name: opt.basis(w, wanted[w.name]) for w in opt.matrices()}
    opt.step(lambda: model(ids).square().mean())
    for w in opt.matrices():
        assert_same_bits(opt.state[w.tensor]["right"], wanted[w.name])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_inputs_that_are_not_finite_do_not_count(mode, value):
    """A row without a token that it may attend to; the loss does not look at it."""
    model, x = nn.Linear(N, 3), draw((TOKENS, N), 1, 1)
    opt = AGZO(model, lr=1e-3, rank=RANK, mode=mode)
    bad = torch.cat([x, torch.full((1, N), value)])
    before = model.weight.detach().clone()
    opt.step(lambda: model(bad)[:TOKENS].square().mean())
    assert model.weight.isfinite().all() and model.bias.isfinite().all() and not torch.equal(model.weight, before)
    if not math.isfinite(value):
        (w,) = opt.matrices()
        rows = torch.cat([x, torch.zeros(1, N)])
        assert_same_bits(opt.state[w.tensor]["right"], AGZO(model, rank=RANK).basis(w, rows))


@pytest.mark.parametrize("sides", [1, 2])
def test_copies_of_the_batch_change_nothing(sides):
    """They have the same inputs; the noise of the range finder, of which each row has its own, is that of one copy."""
    seen, x = [], draw((TOKENS, N), 1, 1)
    for members in (1, 2):
        model = filled(nn.Sequential(nn.Linear(N, 5), nn.Tanh(), nn.Linear(5, 4)))
        opt = AGZO(model, lr=1e-2, rank=RANK, sides=sides, mode="scratch", members=members)

        def losses(model=model, members=members):
            found = model(torch.cat([x] * members)).square().mean(1)
            return found if members > 1 else found.mean()

        seen.append([opt.step(losses) for _ in range(3)])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


@pytest.mark.parametrize("what", ["model", "layer"])
@pytest.mark.parametrize("sides", [1, 2])
def test_losses_of_other_programs_are_not_compared(sides, what):
    """The forward that shows the inputs runs uncompiled."""

    def shifted(module, inputs):
        return lambda *args: [out + 0.125 for out in module(*args)]

    model, x = nn.Sequential(nn.Linear(N, 3), nn.Linear(3, 1, bias=False)), draw((TOKENS, N), 1, 1)
    if what == "layer":
        model[1] = torch.compile(model[1], backend=shifted)
    opt = AGZO(model, lr=0.0, sides=sides, mode="inplace")
    called, losses = torch.compile(model, backend=shifted) if what == "model" else model, []

    def closure():
        losses.append(called(x).mean())
        return losses[-1]

    opt.step(closure)
    assert len(losses) == 3 and abs(opt.last.rho[0]) < 10


@pytest.mark.parametrize("mode", ["inplace", "scratch", "folded"])
def test_conv1d_is_a_linear_layer_with_its_inputs_first(mode):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linear, conv, x = nn.Linear(N, 5), Conv1D(5, N), draw((TOKENS, N), 1, 1)
    opt = AGZO(conv, lr=1e-2, rank=RANK, seed=3, mode=mode)
    same = AGZO(linear, rank=RANK, seed=3, mode="inplace")
    before = conv.weight.detach().clone()
    opt.step(lambda: conv(x).square().mean())
    (w,), (its,) = opt.matrices(), same.matrices()
    a = opt.state[w.tensor]["left"]
    assert_same_bits(a, same.basis(its, x))
    moved = (conv.weight.detach() - before).double()
    assert moved.norm() > 0 and (moved - a.double() @ (a.T.double() @ moved)).norm() < 1e-3 * moved.norm()


def test_layers_of_an_unknown_forward_take_dense_noise():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(N, N), Scaled(N, 3))
    opt = AGZO(model, mode="inplace")
    assert [w.name for w in opt.matrices()] == ["0.weight"]
    opt.step(lambda: model(torch.ones(2, N)).sum())


def test_a_layer_that_is_not_called_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(N, 3), "unused": nn.Linear(N, 3)})
    opt = AGZO(model, mode="inplace")
    with pytest.raises(RuntimeError, match=r"^closure: the layer of 'unused.weight' was not called"):
        opt.step(lambda: model["used"](torch.ones(2, N)).sum())
    with pytest.raises(ValueError, match=r"^model: got None"):
        AGZO(list(model.named_parameters()))
