"""What the table of methods does not show of some of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from naive import adalezo, zo_muon
from support.models import Losses, Words, failing, snapshot
from torch import Tensor, nn

from pgap_kernels import draw, noise, use_backend
from pgap_kernels.noise import Role
from pgap_kernels.optim import (
    FZOO,
    HELENE,
    LOZO,
    PGAP,
    AdaLeZO,
    DiZO,
    LeZO,
    MeZOAdam,
    NonFiniteLossError,
    SparseMeZO,
    SubZero,
    TeZO,
    ZOMuon,
    lezo,
    sparse_mezo,
)
from pgap_kernels.optim import (
    zo_muon as ours,
)
from pgap_kernels.optim.subzero import nearly_square


class PlainSubZero:
    """SubZero in plain PyTorch on the same draws: in place, four lines a pass."""

    def __init__(self, model: nn.Module, lr: float, eps: float, rank: int, window: int, seed: int) -> None:
        self.named = dict(model.named_parameters())
        self.lr, self.eps, self.rank, self.window, self.seed, self.step_number = lr, eps, rank, window, seed, 0

    def drawn(self, name: str, shape: tuple[int, ...], role: Role) -> Tensor:
        return draw(shape, noise.derive(self.seed, self.step_number, role, 0), noise.tensor_id(name))

    def basis(self, name: str, rows: int, role: Role) -> Tensor:
        q, r = torch.linalg.qr(self.drawn(name, (rows, min(self.rank, *self.named[name].shape)), role))
        return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()  # another layout sums in another order

    def add(self, *amounts: float) -> None:
        for name, p in self.named.items():
            U, V = self.bases[name]
            scale = p.numel() ** 0.5 / U.shape[1]
            core = self.drawn(name, (U.shape[1],) * 2, Role.CORE)
            coefficient = torch.tensor(sum(scale * amount for amount in amounts), dtype=torch.float32)
            p.copy_(p + coefficient * ((U @ core) @ V.T))

    @torch.no_grad()
    def step(self, closure) -> None:
        if self.step_number % self.window == 0:
            self.bases = {
                name: (self.basis(name, p.shape[0], Role.LEFT), self.basis(name, p.shape[1], Role.RIGHT))
                for name, p in self.named.items()
            }
        self.add(self.eps)
        plus = closure().item()
        self.add(-self.eps, -self.eps)
        minus = closure().item()
        self.add(-self.lr * ((plus - minus) / 2) / self.eps, self.eps)
        self.step_number += 1


def lost(model: nn.Module) -> Callable[[], Tensor]:
    """A closure whose loss is not finite."""
    losses = Losses(model)
    return lambda: losses() * math.nan


def matrices() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 11, bias=False))


def test_subzero_in_place_is_plain_pytorch_to_the_bit():
    """On the reference, whose arithmetic is PyTorch's."""
    tokens, labels = torch.arange(24) % 11, torch.arange(24) % 7
    options = {"lr": 0.05, "eps": 2**-7, "rank": 4, "window": 3, "seed": 5}
    one, other = matrices(), matrices()
    with use_backend("reference"):
        plain, optimizer = PlainSubZero(other, **options), SubZero(one, mode="inplace", **options)
        for _ in range(8):
            optimizer.step(lambda: nn.functional.cross_entropy(one(tokens), labels))
            plain.step(lambda: nn.functional.cross_entropy(other(tokens), labels))
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q)


def test_subzeros_bases_are_orthonormal_and_new_in_every_window():
    model = Words()
    optimizer = SubZero(model, lr=0.0, rank=3, window=2, reshape=["lora_*"])
    seen = []
    for _ in range(4):
        optimizer.step(Losses(model))
        seen.append([optimizer.state[w.tensor]["left"].clone() for w in optimizer.matrices()])
    for w, left in zip(optimizer.matrices(), seen[0], strict=True):
        rows = nearly_square(w.tensor.numel())[0] if "lora" in w.name else w.tensor.shape[0]
        assert left.shape == (rows, optimizer.rank_of(w))
        torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1]))
    assert all(map(torch.equal, seen[0], seen[1])) and not any(map(torch.equal, seen[1], seen[2]))
    assert nearly_square(8 * 2560) == (128, 160) and nearly_square(7) == (1, 7)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_zo_muons_update_is_newton_schulz_of_the_estimate(shape):
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(size, generator=generator) for size in (shape, (3, 7), shape)]
    for one, M in zip(ours.orthogonalised(found), found, strict=True):
        torch.testing.assert_close(one.double(), zo_muon.newton_schulz(M.double()), rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(one)
        assert values.min() > 0.6 and values.max() < 1.3


def test_zo_muon_applies_it():
    moved = {}
    for update in ("sgd", "newton-schulz"):
        model = Words()
        optimizer = ZOMuon(model, lr=1.0, eps=1e-2, rank=3, directions=3, update=update, mode="scratch")
        before = snapshot(model)
        optimizer.step(Losses(model))
        moved[update] = {w.name: before[w.name] - w.tensor.detach() for w in optimizer.matrices()}
        bases = {w.name: optimizer.state[w.tensor]["left"] for w in optimizer.matrices()}
    for name, P in bases.items():
        M = P.T.double() @ moved["sgd"][name].double()
        want = P.double() @ zo_muon.newton_schulz(M)
        torch.testing.assert_close(moved["newton-schulz"][name].double(), want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 1.0])
def test_thresholds_are_quantiles(q):
    values = torch.randn(37, generator=torch.Generator().manual_seed(0)).abs()
    assert sparse_mezo.quantile(values, q) == pytest.approx(values.quantile(q).item(), rel=1e-6)


def test_sparse_mezo_leaves_large_weights_alone():
    model = Words()
    before = snapshot(model)
    optimizer = SparseMeZO(model, lr=0.1, sparsity=0.7, mode="scratch")
    optimizer.step(Losses(model))
    for w in optimizer.weights():
        level = optimizer.state[w.tensor]["threshold"]
        assert torch.equal(before[w.name] != w.tensor, before[w.name].abs() <= level), w.name


def test_sparse_mezo_takes_the_mask_anew_after_a_step_that_failed():
    """A mask of thresholds, as of the mode before, would be read off perturbed weights in place."""
    model = Words()
    optimizer = SparseMeZO(model, lr=0.0, eps=0.3, mode="scratch")
    with pytest.raises(NonFiniteLossError):
        optimizer.step(lost(model))
    before, optimizer.mode = snapshot(model), "inplace"
    optimizer.step(Losses(model))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)


def test_parameters_without_elements():
    model = Words()
    model.none = nn.Parameter(torch.empty(0))
    assert math.isfinite(SparseMeZO(model, mode="inplace").step(Losses(model)))


def test_adams_correction_counts_the_updates_of_each_weight():
    """A first update is lr in size whatever came before, and so is that of a weight that was frozen."""
    model = Words()
    model.up.weight.requires_grad_(False)
    optimizer = MeZOAdam(model, lr=1e-2, e=1e-30, on_nonfinite="skip", mode="scratch")
    for _ in range(3):
        optimizer.step(lost(model))
    before = snapshot(model)
    for name in ("down.weight", "up.weight"):
        optimizer.step(Losses(model))
        moved = (model.get_parameter(name).detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)
        model.up.weight.requires_grad_(True)


@pytest.mark.parametrize("method, lowrank", [(SubZero, False), (LOZO, True)])
def test_a_matrix_of_one_row_is_a_vector_to_subzero(method, lowrank):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    assert ("1.weight" in {w.name for w in method(model).matrices()}) == lowrank


def test_no_probes_without_a_matrix():
    model = Words()
    closure = Losses(model)
    PGAP(model, probes=5, exclude=["*"], mode="inplace").step(closure)
    assert closure.calls == 2


def test_helene_takes_up_an_estimate_that_was_skipped():
    model = Words()
    optimizer = HELENE(model, batch_size=8, refresh_every=10, on_nonfinite="skip", mode="inplace")
    optimizer.step(lost(model))
    for refreshed in (True, False):
        optimizer.step(Losses(model))
        assert optimizer.last.refreshed == refreshed
    assert all(optimizer.state[w.tensor]["curvature"].abs().sum() > 0 for w in optimizer.weights())


def test_dizos_projections_find_the_memory_that_captured_forwards_read():
    model = Words()
    optimizer = DiZO(model, select=["up.weight"], kappa=1, iterations=2, lr=0.1, mode="scratch")
    optimizer.perturbation.replays.add("as if a graph had been captured")
    keys, held, closure = [], [], Losses(model)

    def noting():
        keys.append(optimizer.perturbation.graph_key)
        held.extend(state["delta"] for state in optimizer.state.values() if "delta" in state)  # as a graph does
        return closure()

    for _ in range(9):
        optimizer.step(noting)
    assert keys[2:6] == keys[8:12] == keys[14:18]


@pytest.mark.parametrize("between", ["rollback", "exception"])
@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_dizo_goes_on_with_a_projection_after(between, mode):
    """What it, or a checkpoint, has written into the weights is not somebody else's."""
    ends = []
    for happens in (False, True):
        model = Words()
        opt = DiZO(model, select=["up.weight"], kappa=1, iterations=4, lr=0.1, eps=1e-2, s=0.5, mode=mode)
        closure = Losses(model)
        for step in range(4):
            if step == 3 and happens and between == "rollback":
                saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
                opt.step(closure)
                opt.load_state_dict(state)
                model.load_state_dict(saved)
            if step == 3 and happens and between == "exception":
                with pytest.raises(ZeroDivisionError):
                    opt.step(failing(ZeroDivisionError))
            opt.step(closure)
        ends.append(opt.state[model.up.weight]["ratio"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4) and abs(ends[0] - 1) > 1e-3


def test_dizo_drops_a_projection_whose_end_was_skipped():
    model = Words()
    optimizer = DiZO(model, select=["up.weight"], kappa=2, iterations=2, on_nonfinite="skip", mode="inplace")
    for step in range(5):
        optimizer.step(lost(model) if step == 3 else Losses(model))
        assert ("delta" in optimizer.state[model.up.weight]) == (step in (2, 3))


def test_fzoo_takes_no_step_where_all_losses_are_equal():
    model = Words()
    before = snapshot(model)
    optimizer = FZOO(model, lr=1.0)
    optimizer.step(lambda: model(torch.arange(24).view(8, 3) % 11).sum() * 0.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)


def test_adalezo_remembers_what_layers_were_worth(tmp_path):
    model = Words()
    optimizer = AdaLeZO(model, lr=1e-3, share=0.5)
    for _ in range(5):
        optimizer.step(Losses(model))
    assert optimizer.worth.keys() == optimizer.layers().keys() and max(optimizer.worth.values()) > 0
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = AdaLeZO(Words(), lr=1e-3, share=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.worth, other.drawn) == (optimizer.worth, optimizer.drawn)
    for Q in ([0.0, 0.0], [2.0, 1.0, 0.0]):
        assert lezo.probabilities(Q, 0.6, 0.1) == pytest.approx(adalezo.probabilities(Q, 0.6, 0.1))
    draws = [lezo.pick([0.2, 0.5, 0.3], (i + 0.5) / 100) for i in range(100)]
    assert [draws.count(i) for i in range(3)] == [20, 50, 30]


def test_adalezo_scores_a_layer_by_its_own_radius_and_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": list(layer.named_parameters(str(i))), "eps": 10.0**-i} for i, layer in enumerate(model)]
    optimizer = AdaLeZO(groups, model=model, share=1.0, gamma=0.99, ema=1.0, mode="inplace")
    model[2].requires_grad_(False)
    while len(set(optimizer.drawn or ())) < 2:
        losses = iter([1.0, 0.5])
        optimizer.step(lambda: next(losses))  # noqa: B023
    assert optimizer.worth == pytest.approx({"0": 0.25, "1": 2.5})
    model[0].requires_grad_(False)
    model[2].requires_grad_(True)
    losses = iter([1.0, 1.0])
    optimizer.step(lambda: next(losses))
    assert optimizer.worth["0"] == 0.25 and optimizer.worth["2"] == 0, "a frozen layer keeps what it was worth"


def test_layers_are_numbered_blocks_or_else_modules():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))
            self.head = nn.Linear(4, 3)

    names = [{w.name for w in layer} for layer in LeZO(Blocks()).layers().values()]
    assert names == [
        {"embed.weight", "head.weight", "head.bias"},
        *({f"layers.{i}.{x}.{kind}" for x in "ab" for kind in ("weight", "bias")} for i in range(2)),
    ]
    assert len(LeZO(Words()).layers()) == len({name.rpartition(".")[0] for name in snapshot(Words())})


def test_tezos_factors_are_drawn_once_whenever_a_matrix_comes():
    model = Words()
    optimizer = TeZO(model, lr=1e-3, rank=3)
    optimizer.step(Losses(model))
    weight = optimizer.matrices()[0]
    left = optimizer.state[weight.tensor]["left"].clone()
    del optimizer.state[weight.tensor]["left"]
    optimizer.step(Losses(model))
    assert torch.equal(optimizer.state[weight.tensor]["left"], left)
