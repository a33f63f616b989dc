"""Several directions in a step of every method that has them: groups of examples, copies of the minibatch, baselines.

The model is linear and its loss too: with G the gradient of an example's loss, the loss at a point is exact but for
float32 rounding, and every estimate has a closed form in the directions that were drawn.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support.helpers import DTYPES
from support.models import filled
from torch import nn

from pgap_kernels import noise, ops
from pgap_kernels.directions import Direction
from pgap_kernels.noise import Role
from pgap_kernels.optim import EGGROLL, LOZO, LOZOM, PGAP, PIZO, LeZO, MeZO, NonFiniteLossError, PIZOSubZero
from pgap_kernels.optim.sampling import Sampling
from pgap_kernels.optim.signal import signal_of
from pgap_kernels.perturbation import points
from pgap_kernels.subspace import product_basis, randomized_svd

EXAMPLES, IN, OUT = 8, 6, 5
X = ops.draw((EXAMPLES, IN), 5, 1) + 1.5  # examples have something in common, as in training
T = ops.draw((EXAMPLES, OUT), 5, 2) + 1.5
METHODS = {
    "mezo": (MeZO, {}, "probes"),
    "pgap": (PGAP, {"rank": 3, "window": 4, "probes": 2}, "directions"),
    "lozo": (LOZO, {"rank": 2, "window": 4}, "directions"),
    "eggroll": (EGGROLL, {"rank": 1}, "population"),
    "pizo-subzero": (PIZOSubZero, {"rank": 3, "pool": 4}, "pool"),
}
# Rounding of a loss, relative to the sum of its terms' sizes: IN products, OUT of them, and the mean.
LOSS_ERROR = 32 * 2.0**-24


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)
        filled(self)

    def rows(self, copies: int = 1) -> torch.Tensor:
        """The loss of every row of a stacked batch."""
        return (self.layer(torch.cat([X] * copies)) * torch.cat([T] * copies)).sum(1)


def make(name: str, mode: str, **options):
    cls, own, count = METHODS[name]
    model = Linear()
    options = {count if key == "n" else key: value for key, value in options.items()}
    return model, cls(model, lr=0.1, eps=0.5, seed=7, mode=mode, **{**own, **options})


def closure_of(model: Linear, optimizer):
    stacked = optimizer.members * optimizer.groups > 1
    return lambda: model.rows(optimizer.members) if stacked else model.rows().mean()


def drawn(optimizer, number: int, step: int = 0) -> torch.Tensor:
    """A direction of a step, dense, in float64."""
    zero = torch.zeros(OUT, IN)
    for part in optimizer.direction(step, number):
        part.select([0], [zero]).apply([zero])
    return zero.double()


def gradients() -> torch.Tensor:
    """Of every example's loss."""
    return T.double()[:, :, None] * X.double()[:, None, :]


def slack(directions) -> float:
    """How far float32 losses may move the estimate, elementwise: it is a mean of slopes times directions."""
    weight, found = Linear().layer.weight.detach().abs(), 0.0
    for d in directions:
        size = ((weight + d.abs().float()) @ X.abs().T * T.abs().T).sum(0).max().item()
        found = max(found, size * d.abs().max().item())
    return 4 / 0.5 * LOSS_ERROR * found


@pytest.mark.parametrize(
    "name, mode", [("mezo", "scratch"), ("pgap", "scratch"), ("pgap", "folded"), ("lozo", "folded")]
)
@pytest.mark.parametrize(
    "n, groups, members, baseline",
    [
        (1, 8, 2, "antithetic"),
        (2, 4, 4, "antithetic"),
        (3, 2, 2, "antithetic"),
        (4, 8, 4, "loo"),
        (3, 1, 3, "loo"),
        (2, 4, 3, "clean"),
        (3, 2, 1, "clean"),
    ],
)
def test_the_update_is_the_sum_over_groups(name, mode, n, groups, members, baseline):
    """Each direction by the slope of the examples that saw it: a loss that is linear has no other term."""
    if members == 1 and groups > 1:
        groups, members = 1, 1
    model, optimizer = make(name, mode, n=n, groups=groups, members=members, baseline=baseline)
    if name != "mezo":
        optimizer.step(closure_of(model, optimizer))  # makes the subspace
    step, before = optimizer.steps, model.layer.weight.detach().double().clone()
    flat = [drawn(optimizer, number, step) for number in range(n * groups)]
    optimizer.step(closure_of(model, optimizer))
    moved = (model.layer.weight.detach().double() - before) / -0.1
    expected = torch.zeros_like(before)
    size = EXAMPLES // groups
    for g in range(groups):
        slope = gradients()[g * size : (g + 1) * size].sum(0) / EXAMPLES
        own = flat[g::groups]
        along = torch.stack([(slope * d).sum() for d in own])
        if baseline == "loo":
            along = (along - along.mean()) * n / (n - 1)
        expected += sum(a * d for a, d in zip(along, own, strict=True)) / n
    assert (moved - expected).abs().max() <= slack(flat) + 2**-22 * before.abs().max() / 0.1
    assert moved.abs().max() > 100 * slack(flat)


@pytest.mark.parametrize("name, mode", [("mezo", "scratch"), ("pgap", "folded"), ("lozo", "folded")])
@pytest.mark.parametrize(
    "groups, baseline, n", [(1, "antithetic", 2), (4, "antithetic", 1), (8, "loo", 4), (2, "clean", 3)]
)
def test_one_forward_or_several(name, mode, groups, baseline, n):
    """How many copies a forward has changes nothing but its sums' order: the losses are those of the same points."""
    copies = Sampling(n, groups, baseline).copies
    runs = []
    for members in sorted({copies, min(d for d in range(1 + (groups > 1), copies + 1) if copies % d == 0)}):
        model, optimizer = make(name, mode, n=n, groups=groups, members=members, baseline=baseline)
        runs.append([optimizer.step(closure_of(model, optimizer)) for _ in range(3)])
    for a, b in itertools.pairwise(runs):
        assert a == pytest.approx(b, rel=1e-4)  # losses after updates, whose rounding 1 / (2 eps) multiplies


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("name, mode", [("pgap", "scratch"), ("pgap", "folded"), ("lozo", "folded")])
def test_each_of_many_slices_has_its_own_direction(name, mode, freed, monkeypatch):
    """As one forward for each has them; also where the memory of their operands is freed and made anew."""
    monkeypatch.setattr(points, "_MOST", 0)
    members, n = 32, 32
    model, optimizer = make(name, mode, n=n, members=members, baseline="loo")
    one_by_one, plain = make(name, mode, n=n, members=1, baseline="loo")
    memory: list[list[int]] = []
    for _ in range(4):
        if freed:
            optimizer.perturbation.points._memory.clear()
        loss = optimizer.step(closure_of(model, optimizer))
        assert loss == pytest.approx(plain.step(closure_of(one_by_one, plain)), rel=1e-4)
        assert optimizer.last.losses == pytest.approx(plain.last.losses, rel=1e-3)
        memory.append([*map(id, optimizer.perturbation.points._memory.values())])
    assert freed or {*memory[-1]} == {*memory[-2]}, "found again in every step, so that graphs can be replayed"


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_share_the_filling_of_a_dense_probe(groups):
    model, optimizer = make("pgap", "folded", groups=groups, members=2, window=1)
    optimizer.step(closure_of(model, optimizer))  # tries whether the model keeps slices apart
    before = optimizer.passes
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.passes - before == 2 * 2 + 1, "two probes of two signs, and the update"


def test_a_slice_that_nothing_is_added_to_fades_beside_one_that_is_filled():
    model, optimizer = make("pgap", "folded", members=2, merge="window", weight_decay=1.0)
    for _ in range(2):
        optimizer.step(closure_of(model, optimizer))
    perturbation = optimizer.perturbation
    assert perturbation.pending and perturbation.fades
    still, dense = Direction(), optimizer.noise(optimizer.key(Role.PROBE)).scaled([0.5])

    def losses(*points):
        perturbation.perturb_to(points)
        return perturbation.forward(lambda: model.rows(len(points)))

    alone = torch.cat([losses(still), losses(dense)])
    assert torch.allclose(losses(still, dense), alone, rtol=1e-5)


def test_stray_uses_are_looked_for_while_a_window_fades():
    """What puts the bias of each slice back to its scale is no stray use of it."""
    model = filled(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, OUT)))
    optimizer = LOZO(model, lr=0.1, rank=2, mode="folded", members=2, merge="window", weight_decay=1.0)
    for training in (True, True, False):
        model.train(training)
        optimizer.step(lambda: model(torch.cat([X, X])).square().sum(1))
        assert optimizer.pending


def test_slices_are_tried_with_every_weight_that_moves():
    """LeZO moves other layers in each step, at first perhaps those alone behind what mixes the rows."""

    class Mixing(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1](x - x.mean(0)).square().sum(1)

    for seed in range(4):
        model = filled(Mixing(nn.Linear(IN, OUT), nn.Linear(OUT, OUT)))
        optimizer = LeZO(model, lr=0.0, eps=0.5, seed=seed, mode="scratch", members=2, sparsity=0.5)
        with pytest.raises(RuntimeError, match=r"^members: a point of one slice"):
            for _ in range(12):
                optimizer.step(lambda model=model: model(torch.cat([X, X])))


def test_slices_do_not_see_one_another():
    """Another direction of one group moves the loss of that group alone, to the bit."""
    model, optimizer = make("pgap", "folded", groups=4, members=2)
    optimizer.step(closure_of(model, optimizer))
    perturbation = optimizer.perturbation
    points = [optimizer.direction(1, number) for number in range(4)] * 2
    losses = []
    for other in (None, 1):
        shown = [optimizer.direction(1, 9) if i == other else p for i, p in enumerate(points)]
        perturbation.perturb_to([p.scaled([0.5]) for p in shown])
        losses.append(perturbation.forward(lambda: model.rows(2)).detach())
        perturbation.restore()
    same = losses[0] == losses[1]
    assert same.tolist() == [True] * 2 + [False] * 2 + [True] * 12


# ---- what the losses say -------------------------------------------------------------------------------------------


def test_the_signal_is_that_of_reduced_losses():
    """As each of several processes has rows of its own, and their signal sets the learning rate of all."""
    moments = []
    for factor in (1.0, 2.0):
        model, optimizer = make("lozo", "folded", groups=4, members=2)
        optimizer.reduce_losses = lambda losses, factor=factor: factor * losses
        optimizer.step(closure_of(model, optimizer))
        moments.append(optimizer.last.signal.second_moment)
    assert moments[1] == pytest.approx(4 * moments[0])


def test_curvature_of_a_quadratic_loss():
    """l = s.d + d.H.d / 2 along directions of independent elements, each beside the loss at W itself."""
    h, slope, eps, found = torch.arange(1.0, 13.0, dtype=torch.float64), torch.ones(12, dtype=torch.float64), 0.5, []
    for seed in range(400):
        d = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tried = eps * d @ slope + eps**2 / 2 * d.square() @ h
        found.append(signal_of(torch.cat([tried, torch.zeros(1)])[:, None], 1, "clean", eps).curvature)
    values = torch.tensor(found)
    assert abs(values.mean() - h.sum()) <= 5 * values.std() / 20
    assert abs(values.mean() - 2 * h.sum()) > 5 * values.std() / 20
    assert signal_of(torch.ones(2, 4), 1, "antithetic", eps).curvature is None


# ---- P-GAP's probes ------------------------------------------------------------------------------------------------


def test_the_basis_of_a_product_is_that_of_the_matrix():
    left, right = ops.draw((9, 4), 1, 1), ops.draw((7, 4), 1, 2)
    basis = product_basis(left, right, 3)
    direct = torch.linalg.svd(left.double() @ right.double().T)
    assert torch.allclose(basis.singular_values.double(), direct.S[:3], rtol=1e-5)
    projector = direct.U[:, :3] @ direct.U[:, :3].T
    assert torch.allclose((basis.left @ basis.left.T).double(), projector, atol=1e-5)
    other = randomized_svd(left @ right.T, 3, ops.draw((7, 7), 1, 3))
    assert torch.allclose(basis.left, other.left, atol=1e-4) and torch.allclose(basis.right, other.right, atol=1e-4)


@pytest.mark.parametrize("groups, probe_rank", [(1, 1), (4, 1), (2, 2)])
def test_low_rank_probes_estimate_the_gradient(groups, probe_rank):
    """U, S, V are the SVD of sum_jg rho_jg D_jg / h with the slopes of the examples that saw D_jg."""
    model, optimizer = make("pgap", "folded", groups=groups, members=2, probe_rank=probe_rank, probes=4, window=1)
    weight = optimizer.matrices()[0]
    optimizer.step(closure_of(model, optimizer))
    estimate, size = torch.zeros(OUT, IN, dtype=torch.float64), EXAMPLES // groups
    for j, g in itertools.product(range(4), range(groups)):
        a, b = (
            ops.draw((side, probe_rank), noise.derive(7, 0, role, j * groups + g), weight.id).double()
            for side, role in ((OUT, Role.LEFT), (IN, Role.RIGHT))
        )
        d = a @ b.T / probe_rank**0.5
        estimate += (gradients()[g * size : (g + 1) * size].sum(0) / EXAMPLES * d).sum() * d / 4
    (basis,) = optimizer.bases.values()
    values = torch.linalg.svdvals(estimate)[:3]
    assert torch.allclose(basis.singular_values.double(), values, rtol=1e-3, atol=1e-3 * values[0].item())
    rebuilt = basis.left @ torch.diag(basis.singular_values) @ basis.right.T
    u, s, vh = torch.linalg.svd(estimate)
    best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    assert torch.allclose(rebuilt.double(), best, atol=1e-2 * s[0].item())


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mezo", {"mode": "inplace", "members": 2}, "members, groups: got 2 slices of a batch with mode='inplace'"),
        ("mezo", {"mode": "scratch", "members": 3}, "members: got 3 for 2 points of each group"),
        ("mezo", {"mode": "scratch", "baseline": "loo"}, "probes: got 1 with baseline='loo'; accepted: 2 or more"),
        ("pgap", {"mode": "folded", "baseline": "rloo"}, "baseline: got 'rloo'; accepted: "),
        ("pgap", {"mode": "folded", "n": 0}, "directions: got 0; accepted: "),
        ("pgap", {"mode": "folded", "groups": 0}, "groups: got 0; accepted: "),
        ("pgap", {"mode": "folded", "probe_rank": 1, "probes": 2}, "rank: got 3 for 'layer.weight' with probe_rank=1"),
        ("lozo", {"mode": "folded", "lr_rule": "adaptive"}, "lr_rule: got 'adaptive'; accepted: "),
        ("eggroll", {"mode": "folded", "update": "jax", "normalise": True}, "normalise: got True with update='jax'"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(name, **options)


def test_methods_without_groups_say_so():
    for cls in (PIZO, LOZOM):
        with pytest.raises(ValueError, match=r"^groups: got 2; accepted: 1 with"):
            cls(Linear(), mode="scratch", members=2, groups=2)
        with pytest.raises(ValueError, match=r"^lr_rule: got 'signal'; accepted: None with"):
            cls(Linear(), mode="scratch", members=2, lr_rule="signal")
    with pytest.raises(ValueError, match=r"^directions, baseline: got 2"):
        LOZOM(Linear(), mode="scratch", directions=2)


def test_closures_and_batches_that_do_not_fit():
    model, optimizer = make("pgap", "folded", groups=4, members=2)
    before = model.layer.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"^closure: returned .*accepted: with members=2 and groups=4 the 8 real losses of"
    ):
        optimizer.step(lambda: model.rows(2).mean())
    with pytest.raises(RuntimeError, match=r"^closure: the 2 copies of the minibatch have different losses at the"):
        optimizer.step(lambda: (model.layer(X.repeat_interleave(2, 0)) * T.repeat_interleave(2, 0)).sum(1))
    with pytest.raises(RuntimeError, match=r"^points: 'layer' got 14 rows, .* for 8 points"):
        optimizer.step(lambda: model.rows(2)[:14] + 0 * model.layer(torch.cat([X, X])[:14]).sum(1))
    with pytest.raises(NonFiniteLossError, match=r"^loss at point"):
        optimizer.step(lambda: model.rows(2) * torch.tensor([1.0] * 15 + [float("nan")]))
    model2, alone = make("mezo", "scratch", lr_rule="signal")
    with pytest.raises(ValueError, match=r"^lr_rule: got 'signal' without a loss per row"):
        alone.step(lambda: model2.rows().mean())
    apart = PGAP(nn.Linear(IN, OUT), mode="folded", members=2, eps_dense=0.25, lr_rule="signal")
    with pytest.raises(ValueError, match=r"^lr_rule: got 'signal' with weights of several eps; accepted: one eps"):
        apart.step(lambda: pytest.fail("called"))
    assert torch.equal(model.layer.weight, before)


def test_any_number_of_members_tries_a_pool():
    model, optimizer = make("pizo-subzero", "folded", members=4)
    optimizer.step(closure_of(model, optimizer))
    assert len(optimizer.last.losses) == 6, "four of the pool, and two along v"


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_see_updates_only(dtype):
    """Whatever the dtype, groups or members: the forwards read the weights that are stored."""
    model, optimizer = make("pgap", "folded", groups=4, members=4, n=4, baseline="loo")
    model.to(dtype)
    seen = []

    def closure():
        with torch._C.DisableTorchFunction():  # the hooks' search for weights that are read elsewhere
            seen.append(model.layer.weight.detach().clone())
        inputs = torch.cat([X] * 4).to(dtype)
        return (model.layer(inputs).float() * torch.cat([T] * 4)).sum(1)

    for _ in range(3):
        before = model.layer.weight.detach().clone()
        del seen[:]
        optimizer.step(closure)
        assert seen and all(torch.equal(w, before) for w in seen)
        assert not torch.equal(model.layer.weight, before)


class Positioned(nn.Module):
    """Positions are one row, as in GPT-2 and BERT, whatever the number of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 6), nn.Embedding(4, 6), nn.Linear(6, 3)
        filled(self)

    def forward(self, ids):
        return self.head(self.words(ids) + self.places(torch.arange(ids.shape[1])[None]))


@pytest.mark.parametrize("merge", ["step", "window"])
def test_positions_of_one_row_fold(merge):
    losses = {}
    for mode in ("scratch", "folded"):
        model, ids = Positioned(), torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [2, 2, 1]])
        options = {"merge": merge} if mode == "folded" else {}
        opt = PGAP(model, lr=0.05, rank=2, window=3, probes=2, members=2, mode=mode, **options)

        def closure(model=model, ids=ids):
            return model(torch.cat([ids] * 2)).square().mean((1, 2))

        losses[mode] = [opt.step(closure) for _ in range(5)]
    assert losses["folded"] == pytest.approx(losses["scratch"], rel=1e-4) and losses["folded"][0] != losses["folded"][1]
