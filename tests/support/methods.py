"""The methods, one row for each set of options, and how each is run naively: on the contract's noise, by tests/naive.

A naive step gets of the optimizer nothing but its constructor's options. P-GAP's gets the bases too, as they hang on
the last bits of an SVD; they are compared with those of the gradient that the naive method has assembled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from naive import (
    adalezo,
    adam,
    agzo,
    dizo,
    eggroll,
    fzoo,
    helene,
    hizoo,
    loren,
    lozo_m,
    mezo,
    momentum,
    pgap,
    pizo,
    subzero,
    tezo,
    zo_adamu,
    zo_muon,
)
from torch import Tensor

from pgap_kernels import draw, masked_perturb_, noise
from pgap_kernels.noise import Role
from pgap_kernels.optim import (
    AGZO,
    EGGROLL,
    FZOO,
    LOREN,
    PGAP,
    SVD0,
    AdaLeZO,
    HiZOO,
    LeZO,
    LowRankOptimizer,
    MeZO,
    MeZOAdam,
    MeZOMomentum,
    SparseMeZO,
    SubZero,
    TeZO,
    ZOAdaMU,
    ZOMuon,
    ZOOptimizer,
)
from pgap_kernels.optim.dizo import DiZO
from pgap_kernels.optim.helene import HELENE
from pgap_kernels.optim.lozo import LOZO
from pgap_kernels.optim.lozo_m import LOZOM
from pgap_kernels.optim.pizo import PIZO, PIZOSubZero
from pgap_kernels.subspace import Basis, gradient_basis

from .bounds import UNIT
from .counted import Counted, known, total

Weights = dict[str, Counted]
RATES = ("lr", "eps", "weight_decay")  # hyper-parameters of every group of every method


def matrices(options: Mapping[str, Any], weights: Mapping[str, Counted | Tensor]) -> list[str]:
    """Names of the weights with low-rank directions."""
    if "rank" not in options:
        return []
    excluded = options.get("exclude", ())
    return [n for n, w in weights.items() if w.dim() == 2 and not any(fnmatchcase(n, p) for p in excluded)]


@dataclass
class Step:
    """One step as a naive method sees it.

    Attributes:
        number: of the step.
        weights: before it.
        names: of the weights for which it is taken: of one param group.
        state: of the method.
        losses: of every point that was evaluated, in order.
        options: of the optimizer's constructor.
        group: what the param group has instead.
        kept: an entry of the optimizer's state of a weight, after the step.
        points: where the naive method has asked for the losses.
    """

    number: int
    weights: Weights
    names: Collection[str]
    state: dict
    losses: list[float]
    options: Mapping[str, Any]
    group: Mapping[str, Any]
    kept: Callable[[str, str], Tensor]
    points: list[Weights] = field(default_factory=list)

    def loss(self, weights: Weights) -> float:
        self.points.append(weights)
        return self.losses[len(self.points) - 1]

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the options that were given; the naive method has the same defaults for the others."""
        found = {**self.options, **self.group}
        return {name: found[name] for name in names if name in found}

    @property
    def rates(self) -> dict[str, float]:
        return self.given(*RATES)

    def counted_state(self) -> dict:
        """The state of a method that counts steps: those that were skipped count."""
        return {**self.state, "t": self.number} if self.state else {}

    def matrices(self) -> list[str]:
        return matrices(self.options, self.weights)

    def rank(self, name: str) -> int:
        return min(self.options["rank"], *self.weights[name].shape)

    def key(self, role: Role, probe: int = 0) -> int:
        return noise.derive(self.options["seed"], self.number, role, probe)

    def draw(self, name: str, shape: Iterable[int], role: Role, probe: int = 0) -> Counted:
        return drawn(tuple(shape), self.key(role, probe), name)

    def z(self, role: Role = Role.DENSE, probe: int = 0, without: Collection[str] = ()) -> Weights:
        """Dense noise on the weights."""
        return {n: self.draw(n, w.shape, role, probe) for n, w in self.weights.items() if n not in without}

    def factors(self, role: Role, side: int, probe: int = 0) -> Weights:
        """A of the matrices (side 0), or B (side 1)."""
        return {n: self.draw(n, (self.weights[n].shape[side], self.rank(n)), role, probe) for n in self.matrices()}


@functools.cache
def drawn(shape: tuple[int, ...], key: int, name: str) -> Counted:
    """Noise of the contract; every mode of a method draws the same."""
    return known(draw(shape, key, noise.tensor_id(name)))


def naive_mezo(s: Step):
    z, one_sided = [s.z(probe=i) for i in range(s.options["probes"])], s.options.get("baseline") == "loo"
    return mezo.step(s.weights, s.loss, z, s.state, leave_one_out=one_sided, **s.rates)


def naive_pgap(s: Step):
    options, matrices = s.options, s.matrices()
    if matrices and s.number % options["window"] == 0:
        eps = options.get("eps_probe", 1e-3 if options.get("scale") == "paper" else s.rates["eps"])
        gradients = pgap.refresh(s.weights, s.loss, [s.z(Role.PROBE, i) for i in range(options["probes"])], eps=eps)
        for name in {*matrices} & {*s.names}:
            check_basis(s, name, gradients[name], eps)
    bases = {n: tuple(known(s.kept(n, entry)) for entry in ("left", "singular_values", "right")) for n in matrices}
    delta = options.get("delta", 2.0)
    if "delta_steps" in options:
        delta *= max(0.0, 1 - s.number / options["delta_steps"])
    return pgap.step(
        s.weights,
        s.loss,
        bases,
        {n: s.draw(n, (s.rank(n), s.rank(n)), Role.CORE) for n in matrices},
        {n: sign(s, n) for n in matrices},
        s.z(without=matrices),
        s.state,
        delta=delta,
        dense_lr_ratio=options.get("lr_dense", options["lr"]) / options["lr"],
        **s.given("scale", "eps_dense"),
        **s.rates,
    )


def sign(s: Step, name: str) -> float:
    """xi of a matrix."""
    xi = s.options.get("xi", "per_matrix")
    if xi == "fixed":
        return 1.0
    return draw(1, s.key(Role.SIGN), 0 if xi == "global" else noise.tensor_id(name), distribution="rademacher").item()


def check_basis(s: Step, name: str, gradient: Counted, eps: float, kept: Collection[str] = Basis._fields) -> None:
    """The optimizer's U, S and V are, to the bit, the randomised SVD (test_subspace.py) of the naive method's G."""
    probes = s.options["probes"]
    pairs = zip(s.losses[0 : 2 * probes : 2], s.losses[1 : 2 * probes : 2], strict=True)
    draws = [(s.key(Role.PROBE, i), (plus - minus) / (2 * eps * probes)) for i, (plus, minus) in enumerate(pairs)]
    assembled = torch.empty(gradient.shape)
    basis = gradient_basis(
        gradient.shape,
        draws,
        s.rank(name),
        tensor_id=noise.tensor_id(name),
        range_key=s.key(Role.RANGE_FINDER),
        scratch=assembled.view(-1),
    )
    assert ((assembled - gradient.value).abs() <= gradient.bound()).all(), f"{name}: not the probes' gradient"
    for entry in kept:
        assert torch.equal(getattr(basis, entry), s.kept(name, entry)), f"{name}: not its basis"


def naive_pizo(s: Step):
    fresh = s.options["pool"] - (1 if s.options.get("history") and s.state else 0)
    options = {"greedy": s.options.get("guide") == "greedy", **s.given("alpha", "history", "normalise_v")}
    return pizo.step(s.weights, s.loss, [s.z(probe=i) for i in range(fresh)], s.state, **options, **s.rates)


def naive_helene(s: Step):
    (floor,) = s.given("floor").values()
    floors = {n: next((v for p, v in s.options.get("floors", {}).items() if fnmatchcase(n, p)), floor)
              for n in s.weights}  # fmt: skip
    options = s.given("batch_size", "anneal_steps", "refresh_every", "beta1", "beta2", "gamma", "e")
    return helene.step(s.weights, s.loss, s.z(), s.counted_state(), floor=floors, **options, **s.rates)


def naive_lozo(s: Step):
    u, v, z = s.factors(Role.LEFT, 0), s.factors(Role.RIGHT, 1), s.z(without=s.matrices())
    options = s.given("beta", "divide_by_rank")
    return lozo_m.step(s.weights, s.loss, u, v, z, s.counted_state(), nu=s.options["window"], **options, **s.rates)


def naive_eggroll(s: Step):
    reuse = s.options.get("noise_reuse", 1)
    drawn = replace(s, number=s.number // reuse * reuse)
    count = s.options["population"] // (2 if s.options.get("antithetic", True) else 1)
    left, right = ([drawn.factors(r, side, k) for k in range(count)] for side, r in enumerate((Role.LEFT, Role.RIGHT)))
    pairs = [{n: (a[n], b[n]) for n in a} for a, b in zip(left, right, strict=True)]
    z = [drawn.z(probe=k, without=s.matrices()) for k in range(count)]
    options = s.given("update", "antithetic", "normalise", "scale_by_root")
    rates = {"lr": s.rates["lr"], "sigma": s.rates["eps"], "weight_decay": s.rates["weight_decay"]}
    return eggroll.step(s.weights, s.loss, pairs, z, s.state, **rates, **options)


def naive_agzo(s: Step):
    """A is the optimizer's: it hangs on the last bits of a QR (test_agzo.py compares it with the naive one)."""
    matrices, sides = s.matrices(), s.options.get("sides", 1)
    if sides == 2 and s.number % s.options["basis_interval"] == 0:
        s.loss(s.weights)  # the forward that shows the inputs
    A = {n: known(s.kept(n, "right")) for n in matrices}
    R, z, rates = s.factors(Role.LEFT, 0), s.z(without=matrices), s.rates
    options = {"lr": rates["lr"], "mu": rates["eps"], "weight_decay": rates["weight_decay"], "sides": sides}
    return agzo.step(s.weights, s.loss, A, R, z, s.state, **options)


def naive_loren(s: Step):
    first = noise.derive(s.options["seed"], 0, Role.RIGHT)
    a = {n: drawn((w.shape[1],), first, n) for n, w in s.weights.items() if w.dim() == 2}
    options = s.given("damping", "beta", "momentum")
    lr_a = s.options["lr_a"] if s.options.get("curvature") == "learned" else 0.0
    u = [s.z(probe=k) for k in range(s.options["probes"])]
    return loren.step(s.weights, s.loss, u, s.state or {"a": a}, lr_a=lr_a, **options, **s.rates)


def naive_dizo(s: Step):
    """Iterations of a projection are steps of their own: each is run after those before it, on the losses they had."""
    kappa, iterations = s.options["kappa"], s.options["iterations"]
    anchors = {n: w for n, w in s.weights.items() if any(fnmatchcase(n, p) for p in s.options["select"])}
    state = s.state or {"anchors": anchors}
    iteration = s.number % (kappa + iterations) - kappa
    if iteration < 0:
        return dizo.step(s.weights, s.loss, s.z(), state, **s.rates)
    before = state if iteration else {**state, "from": s.weights, "earlier": []}
    draws = {n: draw(1, s.key(Role.DATA), noise.tensor_id(n)).item() for n in anchors}
    projection = s.given("eps_p", "tau", "s")

    def measured(weights: Weights) -> Weights:
        return {**weights, **{n: unsure(weights[n], before["from"][n], projection["tau"], iteration) for n in anchors}}

    earlier = [iter(losses).__next__ for losses, _ in before["earlier"]]
    losses = [lambda _, then=then: then() for then in earlier] + [lambda weights: s.loss(measured(weights))]
    zs = [z for _, z in before["earlier"]] + [draws]
    new, _ = dizo.project(before["from"], losses, state["anchors"], zs, **projection)
    if iteration < iterations - 1:
        return s.weights, {**before, "earlier": [*before["earlier"], (s.losses[-2:], draws)]}
    return measured(new), {"anchors": state["anchors"]}


def naive_momentum(s: Step):
    return momentum.step(s.weights, s.loss, s.z(), s.state, **s.given("beta"), **s.rates)


def naive_adam(s: Step):
    return adam.step(s.weights, s.loss, s.z(), s.state, **s.given("beta1", "beta2", "e"), **s.rates)


def naive_hizoo(s: Step):
    state = s.state or {"H": {n: known(torch.ones(w.shape)) for n, w in s.weights.items()}}
    return hizoo.step(s.weights, s.loss, s.z(), state, **s.given("alpha"), **s.rates)


def naive_fzoo(s: Step):
    def signs(name: str, probe: int) -> Counted:
        key = s.key(Role.DENSE, probe)
        return known(draw(s.weights[name].shape, key, noise.tensor_id(name), distribution="rademacher"))

    u = [{n: signs(n, i) for n in s.weights} for i in range(s.options["probes"])]
    return fzoo.step(s.weights, s.loss, u, s.state, **s.given("ddof"), lr=s.rates["lr"], eps=s.rates["eps"])


def naive_sparse_mezo(s: Step):
    """MeZO along masked noise; thresholds are compared with the weights' values, far from which none of them is."""
    keep = 1 - s.options["sparsity"]
    levels = s.state or {n: w.value.float().abs().flatten().quantile(keep).item() for n, w in s.weights.items()}
    z = s.z()
    for name, w in s.weights.items():
        mask = w.value.abs() <= levels[name]
        if s.options.get("mask") == "random":
            ones = torch.zeros(w.shape)
            share, where = (s.key(Role.MASK), keep), [noise.tensor_id(name)]
            masked_perturb_([ones], [(1, 1.0)], tensor_ids=where, share=share, distribution="rademacher")
            mask = ones != 0
        z[name] = z[name] * known(mask)
    new, _ = mezo.step(s.weights, s.loss, [z], {}, **s.rates)
    return new, levels


def viewed_shape(s: Step, name: str) -> tuple[int, int]:
    """Of a matrix in SubZero's eyes."""
    if any(fnmatchcase(name, p) for p in s.options.get("reshape", ())):
        return subzero.nearly_square(s.weights[name].numel())
    return tuple(s.weights[name].shape)


def naive_subzero(s: Step):
    """U and V are the optimizer's, as they hang on the last bits of a QR; test_baselines.py shows that they are one."""
    matrices = s.matrices()
    U, V = ({n: known(s.kept(n, side)) for n in matrices} for side in ("left", "right"))
    ranks = {n: min(s.options["rank"], *viewed_shape(s, n)) for n in matrices}
    Z = {n: s.draw(n, (r, r), Role.CORE) for n, r in ranks.items()}
    return subzero.step(
        s.weights, s.loss, U, V, Z, s.z(without=matrices), s.state, lr=s.rates["lr"], eps=s.rates["eps"]
    )


def naive_pizo_subzero(s: Step):
    """PIZO on directions in the optimizer's subspaces; the best core is kept, and is tried in those of the step."""
    matrices = s.matrices()
    U, V = ({n: known(s.kept(n, side)) for n in matrices} for side in ("left", "right"))

    def direction(number: int, probe: int) -> Weights:
        at = replace(s, number=number)
        cores = {n: at.draw(n, (s.rank(n), s.rank(n)), Role.CORE, probe) for n in matrices}
        scale = {n: s.weights[n].numel() ** 0.5 / s.rank(n) for n in matrices}
        projected = {n: scale[n] * (U[n] @ cores[n] @ V[n].T) for n in matrices}
        return {**at.z(probe=probe, without=matrices), **projected}

    tried = [(s.number, i) for i in range(s.options["pool"])]
    tried = [s.state["tried"], *tried[:-1]] if s.state else tried
    pool = [direction(*each) for each in tried]
    state, fresh = ({"best": pool[0]}, pool[1:]) if s.state else ({}, pool)
    options = {"greedy": s.options.get("guide") == "greedy", **s.given("alpha", "history")}
    new, after = pizo.step(s.weights, s.loss, fresh, state, **options, **s.rates)
    best = next((each for each, d in zip(tried, pool, strict=True) if after and d is after["best"]), None)
    return new, {"tried": best} if best else {}


def naive_svd0(s: Step):
    options, matrices, rates = s.options, s.matrices(), s.rates
    if s.number % options["window"] == 0:
        probes = [s.z(Role.PROBE, i) for i in range(options["probes"])]
        gradients = pgap.refresh(s.weights, s.loss, probes, eps=rates["eps"])
        for name in {*matrices} & {*s.names}:
            check_basis(s, name, gradients[name], rates["eps"], SVD0.kept)
    U, V = ({n: known(s.kept(n, side)) for n in matrices} for side in ("left", "right"))
    Z = {n: s.draw(n, (s.rank(n), s.rank(n)), Role.CORE) for n in matrices}
    return subzero.step(s.weights, s.loss, U, V, Z, s.z(without=matrices), s.state, lr=rates["lr"], eps=rates["eps"])


def naive_tezo(s: Step):
    first, matrices = replace(s, number=0), s.matrices()
    tau = {n: s.draw(n, (s.rank(n),), Role.DIAGONAL_CORE) for n in matrices}
    options = {"normalise": s.options.get("scale", "norm") == "norm", "rule": s.options.get("rule", "sgd")}
    beta = {"beta1": s.options["beta"]} if "beta" in s.options else {}
    beta |= s.given("beta2", "e")
    factors = first.factors(Role.LEFT, 0), first.factors(Role.RIGHT, 1)
    return tezo.step(s.weights, s.loss, *factors, tau, s.z(without=matrices), s.state, **options, **beta, **s.rates)


def naive_zo_muon(s: Step):
    """P is the optimizer's, as it hangs on the last bits of a QR."""
    matrices, count = s.matrices(), s.options["directions"]
    P = {n: known(s.kept(n, "left")) for n in matrices}
    u = [{n: f.T for n, f in s.factors(Role.RIGHT, 1, i).items()} for i in range(count)]
    z = [s.z(probe=i, without=matrices) for i in range(count)]
    rates, dense = s.rates, s.options["lr_dense"] / s.options["lr"]
    return zo_muon.step(s.weights, s.loss, P, u, z, s.state, lr=rates["lr"], eps=rates["eps"],
                        lr_dense=dense * rates["lr"], orthogonalise=False)  # fmt: skip


def naive_zo_adamu(s: Step):
    times = s.options["warmup_steps"], s.options["total_steps"]
    alpha, beta1, beta2 = (zo_adamu.annealed(s.number, *times, pace) for pace in (1.0, 0.1, 1.5))
    if s.number >= 0.8 * times[1] and s.options.get("final", "text") == "text":
        alpha, beta1, beta2 = 0.5, 0.9, 0.01
    p, q = ({n: z * share**0.5 for n, z in s.z(probe=i).items()} for i, share in enumerate((alpha, 1 - alpha)))
    return zo_adamu.step(s.weights, s.loss, p, q, s.state, beta1=beta1, beta2=beta2, **s.given("e"), **s.rates)


def modules(weights: Weights) -> list[list[str]]:
    """The layers of a model whose names have no numbers."""
    found: dict[str, list[str]] = {}
    for name in weights:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return [found[name] for name in sorted(found)]


def uniform(s: Step, number: int) -> float:
    return noise.derive(s.options["seed"], s.number, Role.DATA, number) / 2**64


def naive_lezo(s: Step):
    layers = modules(s.weights)
    count = max(1, round((1 - s.options["sparsity"]) * len(layers)))
    moved = sorted(range(len(layers)), key=lambda i: uniform(s, i))[:count]
    every = s.z()
    own = {n: s.weights[n] for i in moved for n in layers[i]}
    new, _ = mezo.step(own, lambda w: s.loss({**s.weights, **w}), [{n: every[n] for n in own}], {}, **s.rates)
    return {**s.weights, **new}, {}


def naive_adalezo(s: Step):
    layers = modules(s.weights)
    numbers = [uniform(s, i) for i in range(max(1, int(s.options["share"] * len(layers))))]
    options = s.given("tau", "gamma", "clip", "ema")
    rates = {"lr": s.rates["lr"], "eps": s.rates["eps"]}
    return adalezo.step(s.weights, s.loss, s.z(), layers, numbers, s.state, **options, **rates)


def unsure(w: Counted, start: Counted, tau: float, iteration: int) -> Counted:
    """A point of a projection, whose coefficient of Delta hangs on |Delta| as float32 has it.

    |Delta| is a sum of squares, off by numel + 3 roundings. A ratio moves by no more than tau from 1 and by a multiple
    of z / |Delta| in each iteration; where it is not cut off, that is at most 2 tau.
    """
    relative = (w.numel() + 3) * UNIT * tau * (2 * iteration + 3)
    return Counted(w.value, w.size, total(w.error, relative * (w.size + start.size)), w.depth)


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A method with options.

    Attributes:
        make: the optimizer.
        naive: takes a step, its losses given.
        options: of the constructor.
        groups: None for one param group, else what the second of two has beside rates of its own.
        reported: how many of the last losses ``step`` returns the mean of.
        state: entries of the optimizer's state, by their names in the naive method's.
        constant: entries that are not meant to move.
        parts: of a direction on one weight.
    """

    id: str
    make: type[ZOOptimizer]
    naive: Callable[[Step], tuple[Weights, dict]]
    options: Mapping[str, Any]
    groups: Mapping[str, float] | None = None
    reported: int = 2
    state: Mapping[str, str] = field(default_factory=dict)
    constant: Collection[str] = ()
    parts: int = 1

    @property
    def modes(self) -> list[str]:
        """The ways in which it can be run: see ``options_of``."""
        ways = ["inplace", "scratch", "scratch-stacked"]
        if self.make.plans_ahead:
            ways.insert(1, "two_pass")
        if issubclass(self.make, LowRankOptimizer):
            ways += ["folded", "folded-stacked"]
            if self.make not in (EGGROLL, ZOMuon):  # whose factors are new in every step: nothing gathers
                ways += ["window", "window-stacked"]
        # An odd number of points leaves a copy over, which sees one of them again.
        odd = self.reported == 1 or self.make is HiZOO
        return [way for way in ways if not (odd and way.endswith("stacked"))]

    @property
    def period(self) -> int:
        """Steps after which it does the same again."""
        long = self.options.get("kappa", 0) + self.options.get("iterations", 1)
        return self.options.get("window", self.options.get("basis_interval", long))


def options_of(mode: str) -> dict[str, Any]:
    """Constructor arguments of a way to run."""
    if mode == "two_pass":
        return {"mode": "inplace", "two_pass": True}
    way, _, stacked = mode.partition("-")
    if way == "window":
        return {"mode": "folded", "merge": "window", "members": 2 if stacked else 1}
    return {"mode": way, "members": 2 if stacked else 1}


def is_exact(mode: str) -> bool:
    """Whether the weights see updates only."""
    return mode not in ("inplace", "two_pass")


def row(id: str, make, naive, groups=None, reported: int = 2, state=(), constant=(), parts=1, **options: Any) -> Row:
    base = {"lr": 0.05, "eps": 0.02, "seed": 13} | ({} if make is DiZO else {"weight_decay": 0.0})
    return Row(id, make, naive, base | options, groups, reported, dict(state), constant, parts)


SMALL_PGAP = {"rank": 3, "window": 3, "probes": 2}
MOMENTS = {"m": "momentum", "h": "curvature"}
HELENE_OPTIONS = {"batch_size": 8, "anneal_steps": 5.0, "refresh_every": 3, "floor": 1.0}
LOREN_STATE = {"a": "a", "m": "momentum"}
LOZO_OPTIONS = {"rank": 2, "window": 3, "lr": 0.03}

ROWS = [
    row("mezo", MeZO, naive_mezo, probes=1),
    row("mezo-3", MeZO, naive_mezo, probes=3, weight_decay=4.0, reported=6),
    row("mezo-groups", MeZO, naive_mezo, probes=2, weight_decay=0.2, groups={}, reported=4),
    row("pgap", PGAP, naive_pgap, **SMALL_PGAP, eps=0.05),
    row("pgap-groups", PGAP, naive_pgap, **SMALL_PGAP, weight_decay=4.0, groups={}, eps_dense=0.01, lr_dense=0.02),
    row("pgap-global", PGAP, naive_pgap, **SMALL_PGAP, xi="global", delta=0.5, eps=0.05, eps_probe=0.02,
        exclude=["embed*"], weight_decay=4.0),
    row("pgap-fixed", PGAP, naive_pgap, **SMALL_PGAP | {"rank": 99}, xi="fixed", delta=5.0, delta_steps=3, eps=0.05,
        lr=0.01),
    row("pgap-paper", PGAP, naive_pgap, **SMALL_PGAP, scale="paper", lr=0.2, eps=0.1, eps_dense=0.02, lr_dense=0.05),
    row("pgap-dense", PGAP, naive_pgap, **SMALL_PGAP | {"probes": 1}, exclude=["*"], delta=0.0, lr_dense=0.02),
    row("pizo-gv", PIZO, naive_pizo, pool=4, weight_decay=4.0),
    row("pizo-greedy", PIZO, naive_pizo, pool=4, guide="greedy", history=True, lr=0.01),
    row("pizo-normal", PIZO, naive_pizo, pool=6, alpha=0.34, normalise_v=True, history=True, groups={}, lr=0.02),
    row("helene", HELENE, naive_helene, **HELENE_OPTIONS, state=MOMENTS),
    row("helene-groups", HELENE, naive_helene, **HELENE_OPTIONS | {"floor": 0.5}, floors={"*bias": 2.0}, gamma=1.5,
        e=1e-3, beta1=0.8, beta2=0.7, weight_decay=4.0, state=MOMENTS,
        groups={"beta1": 0.5, "beta2": 0.9, "gamma": 3.0, "floor": 0.25}),
    row("lozo", LOZO, naive_lozo, **LOZO_OPTIONS, state={"v": "right"}),
    row("lozo-groups", LOZO, naive_lozo, **LOZO_OPTIONS | {"rank": 3}, divide_by_rank=True, exclude=["embed*"],
        weight_decay=4.0, groups={}, state={"v": "right"}),
    row("lozo-m", LOZOM, naive_lozo, **LOZO_OPTIONS, beta=0.9, state={"v": "right", "N": "momentum"}),
    row("lozo-m-groups", LOZOM, naive_lozo, **LOZO_OPTIONS | {"window": 1}, beta=0.5, weight_decay=4.0, groups={},
        divide_by_rank=True, state={"v": "right", "N": "momentum"}),
    row("mezo-loo", MeZO, naive_mezo, probes=4, baseline="loo", weight_decay=4.0, reported=4, eps=0.05),
    row("eggroll", EGGROLL, naive_eggroll, population=4, rank=1, update="llm", noise_reuse=3, lr=0.15, reported=4),
    row("eggroll-jax", EGGROLL, naive_eggroll, population=6, update="jax", rank=2, groups={}, lr=2.0, reported=6,
        exclude=["embed*"]),
    row("eggroll-single", EGGROLL, naive_eggroll, population=3, rank=1, update="llm", antithetic=False, normalise=True,
        scale_by_root=True, lr=0.01, weight_decay=4.0, reported=3),
    row("agzo", AGZO, naive_agzo, rank=2, basis_interval=3, reported=1, state={}),
    row("agzo-two", AGZO, naive_agzo, rank=1, basis_interval=1, sides=2, exclude=["embed*"], weight_decay=4.0),
    row("mezo-momentum", MeZOMomentum, naive_momentum, beta=0.8, weight_decay=4.0, state={"m": "momentum"}),
    row("mezo-adam", MeZOAdam, naive_adam, beta1=0.8, beta2=0.9, e=1e-3, weight_decay=1.0, lr=0.01, groups={"e": 1e-2},
        state={"m": "momentum", "v": "second_moment"}),
    row("hizoo", HiZOO, naive_hizoo, alpha=0.05, weight_decay=4.0, state={"H": "curvature"}),
    row("hizoo-groups", HiZOO, naive_hizoo, alpha=0.05, groups={"alpha": 0.1}, state={"H": "curvature"}),
    row("fzoo", FZOO, naive_fzoo, probes=3, reported=3),
    row("fzoo-sample", FZOO, naive_fzoo, probes=4, ddof=1, groups={}, lr=0.01, reported=4),
    row("sparse-mezo", SparseMeZO, naive_sparse_mezo, sparsity=0.63, weight_decay=4.0,
        constant=("threshold", "mask")),
    row("sparse-mezo-random", SparseMeZO, naive_sparse_mezo, sparsity=0.3, mask="random"),
    row("subzero", SubZero, naive_subzero, rank=3, window=3),
    row("subzero-viewed", SubZero, naive_subzero, rank=2, window=3, reshape=["lora_*"], exclude=["embed*"], groups={}),
    row("pizo-subzero", PIZOSubZero, naive_pizo_subzero, rank=3, window=3, pool=4),
    row("pizo-subzero-greedy", PIZOSubZero, naive_pizo_subzero, rank=3, window=4, pool=3, guide="greedy", history=True,
        lr=0.001),
    row("svd-0", SVD0, naive_svd0, rank=3, window=3, probes=2, eps=0.05),
    row("tezo", TeZO, naive_tezo, rank=3, weight_decay=4.0, constant=("left", "right"), exclude=["embed*"]),
    row("tezo-momentum", TeZO, naive_tezo, rank=2, rule="momentum", beta=0.8, scale="paper",
        state={"m": "momentum"}, lr=0.02, constant=("left", "right")),
    row("tezo-adam", TeZO, naive_tezo, rank=2, rule="adam", beta=0.8, beta2=0.7, e=0.1, exclude=["embed*"], lr=0.02,
        state={"m": "momentum", "v": "second_moment"}, constant=("left", "right")),
    row("zo-muon", ZOMuon, naive_zo_muon, rank=3, window=3, directions=3, update="sgd", lr_dense=0.01, reported=3),
    row("zo-adamu", ZOAdaMU, naive_zo_adamu, warmup_steps=2, total_steps=20, e=0.1, weight_decay=4.0,
        state={"h": "history"}),
    row("zo-adamu-freeze", ZOAdaMU, naive_zo_adamu, warmup_steps=1, total_steps=6, final="freeze", e=0.1, groups={},
        state={"h": "history"}),
    row("lezo", LeZO, naive_lezo, sparsity=0.6, weight_decay=4.0),
    row("adalezo", AdaLeZO, naive_adalezo, share=0.5, clip=2.0),
    row("loren", LOREN, naive_loren, parts=2, probes=4, eps=0.05, reported=4, state=LOREN_STATE, constant=("a",)),
    row("loren-learned", LOREN, naive_loren, parts=2, probes=3, eps=0.05, reported=3, beta=0.8, curvature="learned",
        lr_a=0.3, weight_decay=0.5, groups={}, state=LOREN_STATE),
    row("loren-query", LOREN, naive_loren, parts=2, probes=3, eps=0.05, reported=3, beta=0.7, momentum="per_query",
        state=LOREN_STATE, constant=("a",)),
    row("dizo", DiZO, naive_dizo, select=["up.weight", "lora*", "down.bias"], kappa=3, iterations=3, tau=0.3, eps_p=0.5,
        s=0.5, constant=("anchor",)),
    row("dizo-far", DiZO, naive_dizo, select=["up.weight", "lora*", "down.bias"], kappa=3, iterations=3, tau=0.3,
        eps_p=0.5, s=200.0, constant=("anchor",)),
]  # fmt: skip
# One of each method.
METHODS = [
    r
    for r in ROWS
    if r.id
    in (
        "mezo-3",
        "pgap",
        "pizo-greedy",
        "helene",
        "lozo",
        "lozo-m",
        "dizo",
        "eggroll",
        "agzo",
        "loren",
        "mezo-momentum",
        "mezo-adam",
        "hizoo",
        "fzoo",
        "sparse-mezo",
        "subzero",
        "svd-0",
        "tezo-momentum",
        "zo-muon",
        "lezo",
        "adalezo",
        "zo-adamu",
    )
]
