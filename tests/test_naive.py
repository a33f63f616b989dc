"""The oracles of tests/naive: one worked step of every method, and what a single step of one tensor cannot show."""

import math

import pytest
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
    sparse_mezo,
    subzero,
    tezo,
    zo_adamu,
    zo_muon,
)
from naive.common import orthonormal
from torch import Tensor


def array(*values: float, shape: tuple[int, ...] = (2, 2)) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(shape)


def column(*values: float) -> Tensor:
    return array(*values, shape=(-1, 1))


def named(*tensors: Tensor) -> list[dict[str, Tensor]]:
    return [{"w": tensor} for tensor in tensors]


W = {"w": array(1, -1, 0.5, 2)}
NOISE = named(array(1, 0.5, -1, 2), array(-1, 1, 2, 0.5), array(0.5, -2, 1, 1), array(2, 1, 0, -1))
Z1, Z2 = NOISE[:2]
STEP = {"lr": 0.01, "eps": 0.1}


class Quadratic:
    """L(W) = 1/2 sum a w^2 over all tensors, a = 1, 2, 3, 4, .... It records every point and loss."""

    def __init__(self) -> None:
        self.points: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def __call__(self, weights: dict[str, Tensor]) -> float:
        flat = torch.cat([w.flatten() for w in weights.values()])
        curvature = torch.arange(1, len(flat) + 1, dtype=torch.float64)
        self.points.append(weights)
        self.losses.append(0.5 * float(curvature @ flat**2))
        return self.losses[-1]

    @property
    def direction(self) -> Tensor:
        """Half the way between the last two points, over eps."""
        return (self.points[-2]["w"] - self.points[-1]["w"]) / (2 * STEP["eps"])

    @property
    def rho(self) -> float:
        return (self.losses[-2] - self.losses[-1]) / (2 * STEP["eps"])


# ---- worked examples ------------------------------------------------------------------------------------------------
# Each returns the named values of its row in EXAMPLES.


def mezo_with_decay(loss):
    new, _ = mezo.step(W, loss, [Z1], {}, weight_decay=0.1, **STEP)
    return {"rho": loss.rho, "W": new["w"]}


def momentum_two_steps(loss):
    new, state = momentum.step(W, loss, Z1, {}, beta=0.9, **STEP)
    new, _ = momentum.step(new, loss, Z2, state, beta=0.9, **STEP)
    return {"rho": loss.rho, "W": new["w"]}


def adam_two_steps(loss):
    first, state = adam.step(W, loss, Z1, {}, **STEP)
    second, _ = adam.step(first, loss, Z2, state, **STEP)
    return {"W1": first["w"], "W2": second["w"]}


def lozo_m_three_steps(loss):
    u = named(column(1, -2), column(2, 1), column(-1, 1))
    v = named(column(0.5, 1), column(math.nan, math.nan), column(2, -0.5))  # the second is not read
    new, state, values = W, {}, {}
    for t in range(3):
        new, state = lozo_m.step(new, loss, u[t], v[t], {}, state, nu=2, beta=0.9, **STEP)
        values |= {f"rho{t + 1}": loss.rho, f"N{t + 1}": state["N"]["w"]}
    return {**values, "W": new["w"]}


def subzero_rank_1(loss):
    (basis,), (core,) = named(column(0.6, 0.8)), named(array(2, shape=(1, 1)))
    new, _ = subzero.step(W, loss, basis, basis, core, {}, {}, **STEP)
    return {"D": loss.direction, "rho": loss.rho, "W": new["w"]}


def pgap_unscaled(loss):
    S, Z_init = array(2, 1, shape=(2,)), array(1, 0.5, -0.5, -1)
    identity = torch.eye(2, dtype=torch.float64)
    bases = {"w": (identity, S, identity)}
    new, _ = pgap.step(W, loss, bases, {"w": Z_init}, {"w": 1.0}, {}, {}, delta=2.0, scale="paper", **STEP)
    Z = loss.direction
    return {"alpha": (Z_init - Z)[0, 0] / S[0], "<S, Z>": S @ Z.diagonal(), "rho": loss.rho, "W": new["w"]}


def pizo_gv(loss):
    new, _ = pizo.step(W, loss, NOISE, {}, alpha=0.5, **STEP)
    return {"F": loss.losses[:4], "v": loss.direction, "g": loss.rho, "W": new["w"]}


def pizo_greedy(loss):
    new, _ = pizo.step(W, loss, NOISE, {}, greedy=True, **STEP)
    return {"F": loss.losses[:4], "v": loss.direction, "g": loss.rho, "W": new["w"]}


def dizo_one_iteration(loss):
    rows = {"first": W["w"][0], "second": W["w"][1]}
    anchors = {"first": array(0.9, -0.8, shape=(2,)), "second": array(0.4, 1.7, shape=(2,))}
    z = [{"first": 1.5, "second": -0.3}]
    new, state = dizo.project(rows, [loss], anchors, z, eps_p=0.1, tau=0.2, s=2.0)
    return {"c": list(state["c"].values()), "W": torch.cat(list(new.values()))}


def agzo_one_sided(loss):
    H, omega = array(2, 0, 1, 0, 1, 0, shape=(2, 3)), column(1, 1, 0)
    A = agzo.basis(H, omega, iterations=3)
    new, _ = agzo.step(W, loss, {"w": A}, {"w": column(1, -1)}, {}, {}, lr=0.01, mu=0.01)
    return {"A": A, "g": (loss.losses[1] - loss.losses[0]) / 0.01, "W": new["w"]}


def loren_per_step(loss):
    a = {"w": array(1, 0.5, shape=(2,))}
    new, _ = loren.step(W, loss, NOISE[:2], {"a": a}, damping=0.1, beta=0.9, **STEP)
    z = [(point["w"] - W["w"]) / STEP["eps"] for point in loss.points]
    return {"z1": z[0], "z2": z[1], "f": loss.losses, "W": new["w"]}


HELENE = {"floor": {"w": 0.5}, "batch_size": 4, "anneal_steps": 10, "refresh_every": 2, **STEP}


def helene_first_step(loss):
    new, state = helene.step(W, loss, Z1, {}, **HELENE)
    return {"rho": loss.rho, "h": state["h"]["w"], "W": new["w"]}


def hizoo_alpha_tenth(loss):
    new, state = hizoo.step(W, loss, Z1, {"H": {"w": array(1, 4, 0.25, 1)}}, alpha=0.1, **STEP)
    return {"rho": loss.rho, "H": state["H"]["w"], "W": new["w"]}


def sparse_mezo_half(loss):
    weights = {"w": array(0.3, -1, 0.5, 2)}
    h = sparse_mezo.thresholds(weights, 0.5)
    new, _ = sparse_mezo.step(weights, loss, Z1, h, {}, **STEP)
    return {"h": h["w"], "D": loss.direction, "rho": loss.rho, "W": new["w"]}


def fzoo_two_probes(loss):
    signs = named(array(1, 1, -1, 1), array(1, -1, 1, 1))
    new, _ = fzoo.step(W, loss, signs, {}, **STEP)
    return {"l": loss.losses[1:], "W": new["w"]}


def zo_adamu_last_phase(loss):
    new, state = zo_adamu.step(W, loss, Z1, Z2, {}, beta1=0.9, beta2=0.01, **STEP)
    return {"m": state["h"]["w"], "rho": loss.rho, "W": new["w"]}


def zo_muon_two_samples(loss):
    identity, draws = {"w": torch.eye(2, dtype=torch.float64)}, [Z1, Z2]
    new, _ = zo_muon.step(W, loss, identity, draws, [{}, {}], {}, **STEP)
    plain, _ = zo_muon.step(W, Quadratic(), identity, draws, [{}, {}], {}, orthogonalise=False, **STEP)
    return {"M": (W["w"] - plain["w"]) / STEP["lr"], "O": (W["w"] - new["w"]) / STEP["lr"], "W": new["w"]}


def adalezo_draws(loss):
    """The weights of what two draws from three layers move: the first layer twice, or it and the second once each."""
    layers, start, z = [["a"], ["b"], ["c"]], dict.fromkeys("abc", array(1, shape=(1,))), Z1["w"].flatten()[:1]
    moved = []
    for uniform in ([0.1, 0.5], [0.1, 0.7]):
        new, _ = adalezo.step(start, loss, dict.fromkeys("abc", z), layers, uniform, {"Q": [2.0, 1.0, 0.0]}, **STEP)
        moved.append({name: float((1 - w) / STEP["lr"] / loss.rho) for name, w in new.items()})
    assert moved[0]["b"] == moved[0]["c"] == 0
    return {"p": adalezo.probabilities([2.0, 1.0, 0.0], 0.6, 0.1), "twice": moved[0]["a"], "once": moved[1]["b"]}


def tezo_unscaled(loss):
    (U,), (V,) = named(array(1, 0, -1, 2)), named(array(0.5, 1, 1, -1))
    tau = {"w": array(2, -0.5, shape=(2,))}
    new, _ = tezo.step(W, loss, U, V, tau, {}, {}, normalise=False, **STEP)
    return {"D": loss.direction, "rho": loss.rho, "W": new["w"]}


def eggroll_members(loss, update):
    pairs = [{"w": (column(1, -2), column(0.5, 1))}, {"w": (column(2, 1), column(-1, 1))}]
    new, _ = eggroll.step(W, loss, pairs, [{}, {}], {}, lr=0.01, sigma=0.1, update=update)
    return {"F": [-value for value in loss.losses], "W": new["w"]}


def eggroll_jax(loss):
    return eggroll_members(loss, "jax")


def eggroll_llm(loss):
    return eggroll_members(loss, "llm")


# Values of twelve decimals are rounded, shorter ones exact. Adam's W1 is off by e / |g|. P-GAP's rho is printed without
# the 1e-12 in alpha's denominator, which moves it by 9e-13.
POOL = (11.4275, 10.355, 11.35125, 9.125)
FITNESS = (-8.08125, -11.88125, -10.02, -9.92)
EXAMPLES = [
    (mezo_with_decay, {"rho": 14.5, "W": (0.854, -1.0715, 0.6445, 1.708)}),
    (momentum_two_steps, {"rho": 4.29, "W": (0.7674, -1.18065, 0.6897, 1.42755)}),
    (
        adam_two_steps,
        {
            "W1": pytest.approx([0.99, -1.01, 0.51, 1.99], rel=0, abs=1e-10),
            "W2": (0.985537937761, -1.019472661883, 0.512239155981, 1.982799489889),
        },
    ),
    (
        lozo_m_three_steps,
        {
            "rho1": -19,
            "N1": (-19, 38),
            "rho2": 4.8,
            "N2": (-16.14, 34.68),
            "rho3": -4.7268,
            "N3": (-3.15882, 7.33032),
            "W": (1.2388764, -0.6643941, -0.0100064, 1.3098516),
        },
    ),
    (
        subzero_rank_1,
        {"D": (1.44, 1.92, 1.92, 2.56), "rho": 20.96, "W": (0.698176, -1.402432, 0.097568, 1.463424)},
    ),
    (
        pgap_unscaled,
        {
            "alpha": -0.432455532034,
            "<S, Z>": math.sqrt(10),
            "rho": pytest.approx([-4.425444679663], rel=0, abs=2e-12),
            "W": (1.082530607465, -0.977872776602, 0.477872776602, 1.974883633538),
        },
    ),
    (
        pizo_gv,
        {"F": POOL, "v": (-0.25, 1.75, 1, -1.75), "g": -16.25, "W": (0.959375, -0.715625, 0.6625, 1.715625)},
    ),
    (pizo_greedy, {"F": POOL, "v": (2, 1, 0, -1), "g": -8, "W": (1.16, -0.92, 0.5, 1.92)}),
    (dizo_one_iteration, {"c": (1.2, 0.8), "W": (1.02, -1.04, 0.48, 1.94)}),
    (
        agzo_one_sided,
        {
            "A": (0.999992000096, 0.003999968),
            "g": -0.519995520054,
            "W": (1.005199913601, -0.999979200346, 0.494800086399, 1.999979200346),
        },
    ),
    (
        loren_per_step,
        {
            "z1": (0.401941932431, 0.200970966215, -1.598058067569, 1.700970966215),
            "z2": (-1.837281294597, 0.581359352702, 1.162718705403, 0.081359352702),
            "f": (11.093452631083, 9.855164196423),
            "W": (0.861359788767, -0.976448473017, 0.670931897432, 1.899722683517),
        },
    ),
    (
        helene_first_step,
        {
            "rho": 14.5,
            "h": (8.41, 2.1025, 8.41, 33.64),
            "W": (0.98275862071, -1.034482758457, 0.51724137929, 1.991379310347),
        },
    ),
    (
        hizoo_alpha_tenth,
        {
            "rho": 13.5,
            "H": (2.35625, 5.05625, 0.5890625, 6.725),
            "W": (0.912052583832, -1.030018535683, 0.675894832336, 1.895883965217),
        },
    ),
    (sparse_mezo_half, {"h": 0.75, "D": (1, 0, -1, 0), "rho": -1.2, "W": (0.312, -1, 0.488, 2)}),
    (fzoo_two_probes, {"l": (10.475, 11.175), "W": (0.972857142857, -0.99, 0.49, 1.972857142857)}),
    (tezo_unscaled, {"D": (1, 2, -2, -1), "rho": -14, "W": (1.14, -0.72, 0.22, 1.86)}),
    (
        zo_adamu_last_phase,
        {
            "m": (0.8, 0.55, -0.7, 1.85),
            "rho": 13.45,
            "W": (0.892400000538, -1.074253976103, 0.547252530426, 1.53593899025),
        },
    ),
    (
        zo_muon_two_samples,
        {
            "M": (5.3625, 6.28125, -2.9625, 16.725),
            "O": (1.053196097721, 0.310771868767, -0.417639872072, 0.687309035561),
            "W": (0.989468039023, -1.003107718688, 0.504176398721, 1.993126909644),
        },
    ),
    (
        adalezo_draws,
        {"p": (0.587700144618, 0.274260156374, 0.138039699008), "twice": 1.701547975867, "once": 1.82308650843},
    ),
    (
        eggroll_jax,
        {"F": FITNESS, "W": (1.000781259593, -0.998660697841, 0.498623495003, 1.997135381492)},
    ),
    (eggroll_llm, {"F": FITNESS, "W": (1.00525, -0.991, 0.49075, 1.98075)}),
]


@pytest.mark.parametrize(("example", "expected"), EXAMPLES, ids=[example.__name__ for example, _ in EXAMPLES])
def test_worked_example(example, expected):
    got = example(Quadratic())
    assert got.keys() == expected.keys()
    for name, value in got.items():
        want = expected[name]
        if isinstance(want, (int, float)):
            want = (want,)
        if isinstance(want, tuple):
            want = pytest.approx(list(want), rel=0, abs=1e-12)
        assert torch.as_tensor(value, dtype=torch.float64).flatten().tolist() == want, name


# ---- what one step of one matrix cannot show ------------------------------------------------------------------------
# rho of a quadratic is <gradient, direction>: 14.5 and 4 for Z1 and Z2, and 10 times a bias's draw.

GRADIENT = array(1, -2, 1.5, 8)
BOTH = {**W, "b": array(2, shape=(1,))}


def with_bias(draw: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    return {**draw, "b": array(value, shape=(1,))}


def assert_close(got: Tensor | list[float], want: Tensor | list[float]) -> None:
    got, want = (torch.as_tensor(value, dtype=torch.float64) for value in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_mezo_averages_its_probes_and_spares_biases_from_decay():
    loss = Quadratic()
    new, _ = mezo.step(BOTH, loss, [with_bias(Z1, 1), with_bias(Z2, -1)], {}, weight_decay=0.1, **STEP)
    assert_close(new["w"], 0.999 * W["w"] - 0.005 * (24.5 * Z1["w"] - 6 * Z2["w"]))
    assert_close(new["b"], [2 - 0.005 * (24.5 + 6)])
    assert_close(torch.stack([point["b"] for point in loss.points]).flatten(), [2.1, 1.9, 1.9, 2.1])


def test_pgap_assembles_the_gradient_of_matrices():
    gradients = pgap.refresh(BOTH, Quadratic(), [with_bias(Z1, 1), with_bias(Z2, -1)], eps=0.1)
    assert list(gradients) == ["w"]
    assert_close(gradients["w"], (24.5 * Z1["w"] - 6 * Z2["w"]) / 2)
    U, S, V = pgap.truncated_svd(gradients["w"], 2)
    assert_close(U * S @ V.T, gradients["w"])
    assert_close(pgap.truncated_svd(gradients["w"], 1)[1], S[:1])


def test_pgap_scale_and_tensors_without_a_subspace():
    e1 = column(1, 0)
    new, _ = pgap.step(
        BOTH,
        Quadratic(),
        {"w": (e1, array(2, shape=(1,)), e1)},
        {"w": array(0.5, shape=(1, 1))},
        {"w": -1.0},
        {"b": array(1, shape=(1,))},
        {},
        delta=4.0,
        scale="subzero",
        weight_decay=0.1,
        eps_dense=0.05,
        dense_lr_ratio=3.0,
        **STEP,
    )
    # Z = -2, so D = -4 in one element; L+ - L- = 2 (0.1 * -4 + 0.05 * 10).
    assert_close(new["w"], 0.999 * W["w"] - 0.01 * 1 * array(-4, 0, 0, 0))
    assert_close(new["b"], [2 - 0.03 * 2])


def test_pizo_ties_and_shares():
    assert pizo.coefficients([1, 1, 0.5, 1], alpha=0.5, greedy=False) == [0.5, -0.5, 0.5, -0.5]
    assert pizo.coefficients([1, 1], alpha=0.5, greedy=True) == [1, 0]
    for M, alpha in ((1, 0.5), (2, 0.4), (2, 1.0)):
        with pytest.raises(ValueError, match="alpha"):
            pizo.coefficients([0.0] * M, alpha=alpha, greedy=False)


def test_pizo_normalises_v():
    loss = Quadratic()
    pizo.step(W, loss, NOISE, {}, alpha=0.25, normalise_v=True, **STEP)
    others = (NOISE[0]["w"] + NOISE[1]["w"] + NOISE[2]["w"]) / 3
    assert_close(loss.direction, (NOISE[3]["w"] - others) / math.sqrt(4 / 3))


def test_pizo_history_evaluates_the_kept_draw_again():
    loss = Quadratic()
    new, state = pizo.step(W, loss, [Z2, Z1], {}, history=True, **STEP)
    assert state == {"best": Z2}
    _, state = pizo.step(new, loss, NOISE[3:], state, history=True, **STEP)
    assert_close(loss.points[4]["w"], new["w"] + 0.1 * Z2["w"])
    assert_close(loss.points[5]["w"], new["w"] + 0.1 * NOISE[3]["w"])
    assert loss.losses[5] < loss.losses[4] and state == {"best": NOISE[3]}
    assert_close(loss.direction, NOISE[3]["w"] - Z2["w"])


def test_helene_between_refreshes():
    options = {**HELENE, "floor": {"w": 5.0}, "gamma": 2.0}
    loss = Quadratic()
    first, state = helene.step(W, loss, Z1, {}, **options)
    second, after = helene.step(first, loss, Z2, state, **options)
    m = 0.9 * 14.5 * Z1["w"] + (0.9 + 0.1 * math.exp(-0.1)) * loss.rho * Z2["w"]
    assert_close(second["w"], first["w"] - 0.01 * m / (array(16.82, 10, 16.82, 67.28) + 1e-8))
    assert_close(after["h"]["w"], state["h"]["w"])
    _, last = helene.step(second, loss, Z1, after, **options)
    assert_close(last["h"]["w"], 0.99 * after["h"]["w"] + 0.04 * (loss.rho * Z1["w"]) ** 2)


def test_lozo_divides_by_rank():
    u, v = {"w": array(1, 0.5, -1, 2)}, {"w": array(1, 0, 1, 1)}
    D = u["w"] @ v["w"].T
    rho = float((GRADIENT * D).sum())
    for divide, r in ((False, 1), (True, 2)):
        new, _ = lozo_m.step(W, Quadratic(), u, v, {}, {}, nu=50, divide_by_rank=divide, weight_decay=0.1, **STEP)
        assert_close(new["w"], 0.999 * W["w"] - 0.01 * rho * D / r)


def test_lozo_m_keeps_a_dense_momentum_of_biases():
    loss, z = Quadratic(), [{"b": array(value, shape=(1,))} for value in (1, -1)]
    u, v = {"w": column(0, 0)}, {"w": column(1, 1)}
    first, state = lozo_m.step(BOTH, loss, u, v, z[0], {}, nu=2, beta=0.9, **STEP)
    second, state = lozo_m.step(first, loss, u, v, z[1], state, nu=2, beta=0.9, **STEP)
    third, _ = lozo_m.step(second, loss, u, v, z[0], state, nu=2, beta=0.9, **STEP)
    gradients = [5 * float(weights["b"]) for weights in (BOTH, first, second)]
    N = [gradients[0], 0.9 * gradients[0] + 0.1 * gradients[1]]
    N.append(0.9 * N[1] + 0.1 * gradients[2])
    assert_close(third["b"], [2 - 0.01 * sum(N)])


def test_dizo_step_is_mezo_without_decay():
    got, want = dizo.step(W, Quadratic(), Z1, {}, **STEP), mezo.step(W, Quadratic(), [Z1], {}, **STEP)
    assert_close(got[0]["w"], want[0]["w"])


def test_dizo_iterations_have_losses_and_draws_of_their_own():
    first, second = Quadratic(), Quadratic()
    new, state = dizo.project(
        BOTH, [first, lambda weights: 2 * second(weights)], {"w": 0 * W["w"]}, [{"w": 0.1}, {"w": -0.05}], s=0.5
    )
    # L = 9.875 c^2 + ..., |Delta| = 2.5, so g = 19.75 c z / 2.5, twice that on the second batch.
    n = 2.5 + 1e-8
    c = (1 - 0.5 * 19.75 * 0.1**2 / n) * (1 - 0.5 * 39.5 * 0.05**2 / n)
    assert_close([state["c"]["w"]], [c])
    assert_close(new["w"], c * W["w"])
    assert new["b"] is BOTH["b"] and len(first.losses) == len(second.losses) == 2


def test_dizo_does_not_move_a_tensor_at_its_anchor():
    new, state = dizo.project(W, [Quadratic()], W, [{"w": 1.0}])
    assert state["c"] == {"w": 1.0}
    assert_close(new["w"], W["w"])


def test_orthonormal_has_one_sign():
    basis = orthonormal(array(-3, 1, -4, 2))
    assert_close(basis[:, 0], [-0.6, -0.8])
    assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    assert float(basis[:, 1] @ array(1, 2, shape=(2,))) > 0


def test_subzero_one_sided_and_viewed():
    assert subzero.nearly_square(8 * 2560) == (128, 160) and subzero.nearly_square(7) == (1, 7)
    loss, flat = Quadratic(), {"w": W["w"].view(1, 4)}
    U, V, Z = {"w": column(1, 0)}, {"w": column(0, 1)}, {"w": array(1, shape=(1, 1))}
    new, _ = subzero.step(flat, loss, U, V, Z, {}, {}, one_sided=True, **STEP)
    D = array(0, 2, 0, 0, shape=(1, 4))
    assert_close(loss.points[0]["w"], flat["w"])
    assert_close(loss.points[1]["w"], flat["w"] + 0.1 * D)
    assert_close(new["w"], flat["w"] - 0.01 * (-2 * 2 + 0.1 * 2**2) * D)


def test_agzo_two_sided():
    A, R = {"w": column(0.6, 0.8)}, {"w": column(1, -1)}
    D = array(0.6, 0.8, -0.6, -0.8)
    new, _ = agzo.step(W, Quadratic(), A, R, {}, {}, lr=0.01, mu=0.1, sides=2)
    assert_close(new["w"], W["w"] - 0.01 * float((GRADIENT * D).sum()) * D)


def test_loren_per_query_and_learned_curvature():
    loss, a = Quadratic(), array(1, 0.5, shape=(2,))
    options = {"momentum": "per_query", "lr_a": 0.1, **STEP}
    new, state = loren.step(W, loss, NOISE[:2], {"a": {"w": a}}, **options)
    z = [(point["w"] - W["w"]) / 0.1 for point in loss.points]
    half = (loss.losses[0] - loss.losses[1]) / 2
    assert_close(new["w"], W["w"] - 0.01 * half / 0.1 * (1.9 * z[0] - z[1]))
    assert_close(state["m"]["w"], half / 0.1 * (0.9 * z[0] - z[1]))
    moves = [loren.gradient_of_a(draw["w"], a, 0.1) for draw in NOISE[:2]]
    assert_close(state["a"]["w"], a - 0.1 * half * (moves[0] - moves[1]))


def test_loren_moves_a_along_the_score():
    """sqrt(rho) times the gradient of log N(z / sqrt(rho); 0, (rho I + a~ a~^T)^-1) in a."""
    a = array(1, 0.5, shape=(2,)).requires_grad_()
    x = loren.damped(Z1["w"], a.detach(), 0.1).flatten() / math.sqrt(0.1)
    tiled = a.repeat(2)
    precision = 0.1 * torch.eye(4, dtype=torch.float64) + torch.outer(tiled, tiled)
    log_density = (precision.logdet() - x @ precision @ x) / 2
    (score,) = torch.autograd.grad(log_density, a)
    assert_close(loren.gradient_of_a(Z1["w"], a.detach(), 0.1), math.sqrt(0.1) * score)


def test_loren_biases_have_no_momentum():
    loss = Quadratic()
    draws = [with_bias(Z1, 1), with_bias(Z2, -1)]
    first, state = loren.step(BOTH, loss, draws, {"a": {"w": array(1, 0.5, shape=(2,)), "b": BOTH["b"]}}, **STEP)
    assert list(state["m"]) == ["w"]
    z = [(point["b"] - BOTH["b"]) / 0.1 for point in loss.points]
    assert_close(first["b"], BOTH["b"] - 0.01 * (loss.losses[0] - loss.losses[1]) / 0.2 * (z[0] - z[1]))


def test_hizoo_starts_at_one_and_decays_matrices():
    new, state = hizoo.step(BOTH, Quadratic(), with_bias(Z1, 1), {}, alpha=0.0, weight_decay=0.1, **STEP)
    assert_close(new["w"], 0.999 * W["w"] - 0.245 * Z1["w"])
    assert_close(new["b"], [2 - 0.245])
    assert_close(state["H"]["w"], torch.ones(2, 2))


def test_fzoo_sample_deviation_and_none():
    signs = named(array(1, 1, -1, 1), array(1, -1, 1, 1))
    (population, _), (sample, _) = (fzoo.step(W, Quadratic(), signs, {}, ddof=ddof, **STEP) for ddof in (0, 1))
    assert_close(population["w"] - W["w"], math.sqrt(2) * (sample["w"] - W["w"]))
    still, _ = fzoo.step(W, lambda weights: 1.0, signs, {}, **STEP)
    assert_close(still["w"], W["w"])


def test_tezo_scale_and_moments():
    U, V, tau = {"w": array(1, 0, -1, 2)}, {"w": array(0.5, 1, 1, -1)}, {"w": array(2, -0.5, shape=(2,))}
    D = array(1, 2, -2, -1) / math.sqrt(2)
    new, _ = tezo.step(W, Quadratic(), U, V, tau, {}, {}, **STEP)
    assert_close(new["w"], W["w"] - 0.01 * float((GRADIENT * D).sum()) * D)
    loss = Quadratic()
    first, state = tezo.step(W, loss, U, V, tau, {}, {}, rule="momentum", **STEP)
    second, _ = tezo.step(first, loss, U, V, tau, {}, state, rule="momentum", **STEP)
    rho = float((GRADIENT * D).sum())
    assert_close(first["w"], W["w"] - 0.01 * 0.1 * rho * D)
    assert_close(second["w"], first["w"] - 0.01 * (0.09 * rho + 0.1 * loss.rho) * D)


def test_tezo_adam_divides_by_separable_moments():
    U, V, tau = {"w": array(1, 0, -1, 2)}, {"w": array(0.5, 1, 1, -1)}, {"w": array(2, -0.5, shape=(2,))}
    new, _ = tezo.step(W, Quadratic(), U, V, tau, {}, {}, rule="adam", e=0.5, **STEP)
    D = array(1, 2, -2, -1) / math.sqrt(2)
    squares = array(1, 4, 2, 5) / 2  # sum_k (U_ik tau_k V_jk)^2 / r
    rho = float((GRADIENT * D).sum())
    assert_close(new["w"], W["w"] - 0.01 * 0.1 * rho * D / (0.001 * rho**2 * squares + 0.5).sqrt())


def test_eggroll_moves_biases_only_with_noise():
    pairs = [{"w": (column(1, -2), column(0.5, 1))}, {"w": (column(2, 1), column(-1, 1))}]
    options = {"lr": 0.01, "sigma": 0.1}
    still, _ = eggroll.step(BOTH, Quadratic(), pairs, [{}, {}], {}, **options)
    assert_close(still["b"], BOTH["b"])
    loss, z = Quadratic(), [{"b": array(value, shape=(1,))} for value in (1, -1)]
    moved, _ = eggroll.step(BOTH, loss, pairs, z, {}, update="llm", **options)
    F = [-value for value in loss.losses]
    assert_close(moved["b"], [2 + 0.01 * (F[0] - F[1] - F[2] + F[3]) / 4])


def test_eggroll_of_single_members_normalised():
    """Two members: f is +1 and -1."""
    single = [{"w": (column(1, -2), column(0.5, 1))}, {"w": (column(2, 1), column(-1, 1))}]
    options = {"update": "llm", "antithetic": False, "normalise": True, "scale_by_root": True}
    loss = Quadratic()
    new, _ = eggroll.step(W, loss, single, [{}, {}], {}, lr=0.01, sigma=0.1, **options)
    E = [A @ B.T for ((A, B),) in (pair.values() for pair in single)]
    assert [torch.equal(point["w"], W["w"] + 0.1 * e) for point, e in zip(loss.points, E, strict=True)] == [True] * 2
    f = 1.0 if loss.losses[0] < loss.losses[1] else -1.0
    assert_close(new["w"], W["w"] + 0.01 * math.sqrt(2) * f * (E[0] - E[1]) / 2)
