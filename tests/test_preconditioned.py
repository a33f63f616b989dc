"""preconditioned_update_ and preconditioned_perturb_: the rules in float64, states, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.bounds import Bounded, known, scalar
from support.cases import (
    DISTRIBUTIONS,
    IDS,
    KEYS,
    ROUNDINGS,
    RULES,
    flat,
    per_tensor,
    perturb_arguments,
    update_arguments,
)
from support.helpers import DTYPES, assert_all_same, clones, ops, weights
from support.refusals import refused
from torch.utils._pytree import tree_map_only

BACKENDS = ("reference", "cpu")


def own(value, t: int) -> float:
    """Tensor t's of a scalar or a list."""
    return value[t] if isinstance(value, list) else value


# ---- the rules in float64 ------------------------------------------------------------------------------------------


def total(coefficients, zs: list[Bounded], t: int) -> Bounded:
    """sum_j a_j z_j"""
    terms = [scalar(own(a, t)) * z for a, z in zip(coefficients, zs, strict=True)]
    for term in terms[1:]:
        terms[0] = terms[0] + term
    return terms[0]


def one_step(rule, t: int, states: list[Bounded], g: Bounded, b: Bounded, z: Bounded):
    """The rules as their papers write them: delta and the new states of tensor t."""
    if isinstance(rule, ops.AdaMURule):
        y = states[0] + b
        m = scalar(rule.beta1) * g + scalar(1 - rule.beta1) * y
        v = scalar(rule.beta2) * (g * g) + scalar(1 - rule.beta2) * (y * y)
        step, back = (scalar(own(value, t)) for value in (rule.step, rule.back))
        return back * m - step * (m / (v + scalar(rule.eps)).sqrt()), [scalar(rule.sign) * m]
    lr = scalar(own(rule.lr, t))
    if isinstance(rule, ops.MomentumRule):
        m = scalar(rule.beta) * states[0] + g
        return b - lr * m, [m]
    if isinstance(rule, ops.AdamRule):
        beta1, beta2 = rule.betas
        m = scalar(beta1) * states[0] + scalar(1 - beta1) * g
        v = scalar(beta2) * states[1] + scalar(1 - beta2) * (g * g)
        unbiased = m * scalar(1 / (1 - beta1**rule.step)), v * scalar(1 / (1 - beta2**rule.step))
        return b - lr * (unbiased[0] / (unbiased[1].sqrt() + scalar(rule.eps))), [m, v]
    if isinstance(rule, ops.HiZOORule):
        h = states[0]
        new = scalar(1 - rule.alpha) * h + scalar(rule.alpha) * scalar(rule.curvature) * h * (z * z)
        return b / h.sqrt() - lr * (g / new.sqrt()), [new]
    m = scalar(rule.beta1) * states[0] + scalar(rule.anneal) * g
    h = states[1]
    if rule.refresh is not None:
        beta2, batch = rule.refresh
        h = scalar(beta2) * h + scalar(1 - beta2) * scalar(batch) * (g * g)
    return b - lr * (m / (scalar(rule.gamma) * h.maximum(scalar(own(rule.floor, t))) + scalar(rule.eps))), [m, h]


def landed(w: torch.Tensor, delta: Bounded, decay: float, stochastic: bool) -> Bounded:
    """(1 - d) W + delta in W's dtype."""
    value = known(w.float())
    return (value + (delta - scalar(decay) * value)).stored(w.dtype, stochastic)


def noises(arguments: dict, t: int) -> list[Bounded]:
    shape = arguments["weights"][t].shape
    options = {"distribution": arguments["distribution"], "backend": "reference"}
    return [known(ops.draw(shape, key, arguments["tensor_ids"][t], **options)) for key, _ in arguments["draws"]]


FORMULA_SHAPES = [(1,), (31,), (37, 129), (4097,)]


def forms() -> list[tuple]:
    """Every rule in every dtype, and with every number of draws. The rest acts before or after the rule and takes
    turns: the distribution on z, the rounding on W."""
    result = []
    for (i, rule), (j, dtype) in itertools.product(enumerate(RULES), enumerate(DTYPES)):
        draws = {"hizoo": 1, "adamu": 2}.get(rule, (1, 2, 3)[(i + j) % 3])
        result.append((rule, dtype, draws, DISTRIBUTIONS[(i + j) % 2], [*ROUNDINGS][(i + j // 2) % 2]))
    return result


@pytest.mark.parametrize(("rule", "dtype", "draws", "distribution", "rounding"), forms(), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_in_float64(backend, rule, dtype, draws, distribution, rounding):
    """Within the running error bound of the plain formula in float32, weights and states."""
    decay = per_tensor([0.0, 0.1], len(FORMULA_SHAPES))
    options = {"decay": decay, "shapes": FORMULA_SHAPES, "distribution": distribution, "rounding": rounding}
    arguments = update_arguments(rule, dtype, draws, **options)
    before, states = clones(arguments["weights"]), [clones(s) for s in arguments["state"]]
    ops.preconditioned_update_(**arguments, backend=backend)
    for t, w in enumerate(before):
        zs = noises(arguments, t)
        g, b = total([a for _, a in arguments["draws"]], zs, t), total(arguments["restore"], zs, t)
        delta, new = one_step(arguments["rule"], t, [known(s[t]) for s in states], g, b, zs[-1])
        assert landed(w, delta, decay[t], rounding == "stochastic").holds(arguments["weights"][t])
        assert not torch.equal(arguments["weights"][t], w) or w.numel() == 1
        for state, want in zip(arguments["state"], new, strict=True):
            assert want.holds(state[t])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb_in_float64(backend, dtype, draws, rounding):
    arguments = perturb_arguments(dtype, draws, rounding=rounding, decay=0.1, shapes=FORMULA_SHAPES)
    before = clones(arguments["weights"])
    ops.preconditioned_perturb_(**arguments, backend=backend)
    for t, w in enumerate(before):
        delta = total([a for _, a in arguments["draws"]], noises(arguments, t), t)
        delta = delta / known(arguments["curvature"][t]).sqrt()
        assert landed(w, delta, 0.1, rounding == "stochastic").holds(arguments["weights"][t])


def test_the_bounds_tell_formulas_apart():
    """A relative change of 2**-20 in a scalar is seen."""
    arguments = update_arguments("adam", shapes=[(4097,)])
    (w,), states = clones(arguments["weights"]), [s[0].clone() for s in arguments["state"]]
    ops.preconditioned_update_(**arguments)
    (z,) = noises(arguments, 0)
    g, b = total([0.1], [z], 0), total([arguments["restore"][0]], [z], 0)
    for change, within in ((0.0, True), (2.0**-20, False)):
        rule = ops.AdamRule(arguments["rule"].lr, 3, (0.9 + change, 0.95))
        delta, new = one_step(rule, 0, [known(s) for s in states], g, b, z)
        assert new[0].holds(arguments["state"][0][0]) == within
        assert landed(w, delta, 0.0, False).holds(arguments["weights"][0]) or not within


@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_is_torch_adam(backend):
    """Five steps against torch.optim.Adam in float64."""
    (w,) = weights([(501,)])
    parameter = torch.nn.Parameter(w.double())
    optimizer = torch.optim.Adam([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    m, v = torch.zeros(501), torch.zeros(501)
    for step in range(1, 6):
        rho = [0.5, -0.3, 0.7, 0.1, -0.9][step - 1]
        parameter.grad = rho * ops.draw(501, step, IDS[0]).double()
        optimizer.step()
        rule = ops.AdamRule(1e-2, step, (0.9, 0.95), 1e-6)
        ops.preconditioned_update_([w], [[m], [v]], [(step, rho)], rule, tensor_ids=IDS[:1], backend=backend)
    # A step rounds W once, and at most 25 times on the way to lr times a quotient that Cauchy-Schwarz holds below 1.1.
    bound = 5 * 2.0**-24 * (parameter.detach().abs() + 25 * 1.1 * 1e-2)
    assert ((w.double() - parameter.detach()).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_without_memory_is_a_dense_update(backend):
    """beta = 0: m is the gradient; assemble_gradient_ gives its bits."""
    arguments = update_arguments("momentum", draws=3)
    arguments["rule"] = ops.MomentumRule(0.1, 0.0)
    gradient = [torch.empty(t.shape) for t in arguments["weights"]]
    ops.assemble_gradient_(gradient, arguments["draws"], tensor_ids=IDS, backend=backend)
    ops.preconditioned_update_(**arguments, backend=backend)
    for m, g in zip(arguments["state"][0], gradient, strict=True):
        assert torch.equal(m, g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_helene_keeps_what_it_only_reads(backend):
    arguments = update_arguments("helene")
    before = clones(arguments["state"][1])
    ops.preconditioned_update_(**arguments, backend=backend)
    assert_all_same(arguments["state"][1], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hizoo_perturbs_and_comes_back(backend):
    """The update's restore is along z / sqrt(H) with the H that the perturbation used."""
    (w,), (h,) = weights([(4097,)]), [weights([(4097,)], seed=1)[0].abs() + 0.1]
    start = w.double()
    options = {"tensor_ids": IDS[:1], "backend": backend}
    ops.preconditioned_perturb_([w], [(KEYS[0], -1e-2)], [h], **options)
    step = (w.double() - start).abs()
    ops.preconditioned_update_([w], [[h]], [(KEYS[0], 0.0)], ops.HiZOORule(1.0, 3.0), restore=[1e-2], **options)
    assert ((w.double() - start).abs() <= 2.0**-23 * (start.abs() + step)).all() and step.max() > 1e-2


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_numpy_scalars_are_floats(rule):
    """What a rule computes from float32 numbers is not rounded to float32 on the way."""
    results = []
    for number in (np.float32, lambda x: float(np.float32(x))):
        arguments = update_arguments(rule, shapes=[(33,), (11, 7)])
        arguments["rule"] = type(arguments["rule"])(
            **{name: tree_map_only(float, number, value) for name, value in arguments["rule"].__dict__.items()}
        )
        ops.preconditioned_update_(**arguments)
        results.append([*arguments["weights"], *flat(arguments["state"])])
    assert_all_same(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_restore_is_zero_unless_given(backend):
    results = []
    for change in ({"restore": [0.0, 0.0]}, {"restore": None}):
        arguments = {**update_arguments("momentum", draws=2), **change}
        ops.preconditioned_update_(**arguments, backend=backend)
        results.append(arguments["weights"])
    assert_all_same(*results)


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(name="momentum", /, **changes) -> dict:
    arguments = update_arguments(name, shapes=[(6, 8), (5, 7)])
    return {**{key: arguments[key] for key in ("weights", "state", "draws", "tensor_ids", "rule")}, **changes}


def good_perturb(**changes) -> dict:
    arguments = perturb_arguments(shapes=[(6, 8), (5, 7)])
    return {**{key: arguments[key] for key in ("weights", "curvature", "draws", "tensor_ids")}, **changes}


NEEDED = {
    "momentum": {"lr": 0.1},
    "adam": {"lr": 0.1, "step": 1},
    "hizoo": {"lr": 0.1, "curvature": 1.0},
    "helene": {"lr": 0.1, "anneal": 0.1, "floor": 1.0},
    "adamu": {"step": 1.0, "sign": 1.0, "beta1": 0.9, "beta2": 0.1},
}
CLASSES = {"momentum": ops.MomentumRule, "adam": ops.AdamRule, "hizoo": ops.HiZOORule, "helene": ops.HELENERule}
CLASSES |= {"adamu": ops.AdaMURule}
FIELDS = [
    *(("momentum", name) for name in ("lr", "beta")),
    *(("adam", name) for name in ("lr", "eps")),
    *(("hizoo", name) for name in ("lr", "curvature", "alpha")),
    *(("adamu", name) for name in ("step", "sign", "beta1", "beta2", "back", "eps")),
    *(("helene", name) for name in ("lr", "anneal", "floor", "beta1", "gamma", "eps")),
]


@pytest.mark.parametrize(("rule", "field"), FIELDS)
def test_fields_of_rules(rule, field):
    """A list is one per tensor for a learning rate or a floor, and wrong elsewhere."""
    for value, error in ((math.nan, ValueError), ("0.1", TypeError), ([0.1, math.inf], (TypeError, ValueError))):
        bad = CLASSES[rule](**{**NEEDED[rule], field: value})
        refused("preconditioned_update_", good(rule, rule=bad), error, rf"^rule\.{field}: got")
    if field not in CLASSES[rule].per_tensor:
        bad = CLASSES[rule](**{**NEEDED[rule], field: [0.1, 0.2]})
        refused(
            "preconditioned_update_", good(rule, rule=bad), TypeError, rf"^rule\.{field}: got .*a float or a tensor"
        )


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (ops.AdamRule(0.1, 0), ValueError, r"rule\.step: got 0; accepted: an integer, 1 for the first"),
        (ops.AdamRule(0.1, -1), ValueError, r"rule\.step: got -1"),
        (ops.AdamRule(0.1, 1.5), ValueError, r"rule\.step: got 1.5"),
        (ops.AdamRule(0.1, True), ValueError, r"rule\.step: got True"),
        (ops.AdamRule(0.1, torch.tensor(0)), ValueError, r"rule\.step: got 0"),
        (ops.AdamRule(0.1, torch.tensor(1.0)), TypeError, r"rule\.step: got torch.float32"),
        (ops.AdamRule(0.1, torch.tensor([1, 2])), TypeError, r"rule\.step: got torch.int64 of shape \(2,\)"),
        (ops.AdamRule(0.1, 1, (0.9,)), TypeError, r"rule\.betas: got \(0.9,\); accepted: two floats"),
        (ops.AdamRule(0.1, 1, 0.9), TypeError, r"rule\.betas: got 0.9"),
        (ops.AdamRule(0.1, 1, (0.9, 1.0)), ValueError, r"rule\.betas: got \(0.9, 1.0\); accepted: .* below 1"),
        (ops.AdamRule(0.1, 1, (-0.1, 0.9)), ValueError, r"rule\.betas: got"),
        (ops.AdamRule(0.1, 1, (0.9, math.nan)), ValueError, r"rule\.betas: got nan"),
        (ops.AdamRule(0.1, 1, (0.9, "x")), TypeError, r"rule\.betas: got 'x'"),
        (ops.HELENERule(0.1, 0.1, 1.0, refresh=0.9), TypeError, r"rule\.refresh: got 0.9"),
        (ops.HELENERule(0.1, 0.1, 1.0, refresh=(0.9, 8.0, 1)), TypeError, r"rule\.refresh: got"),
        (ops.HELENERule(0.1, 0.1, 1.0, refresh=(0.9, math.inf)), ValueError, r"rule\.refresh: got inf"),
        (None, TypeError, "rule: got None; accepted: MomentumRule, AdamRule, HiZOORule, HELENERule or AdaMURule"),
        ("adam", TypeError, "rule: got 'adam'"),
        (ops.AdamRule, TypeError, "rule: got <class"),
    ],
    ids=repr,
)
def test_rules(rule, error, match):
    refused("preconditioned_update_", good("adam", rule=rule), error, f"^{match}")


@pytest.mark.parametrize(("rule", "which"), [("momentum", 0), ("adam", 0), ("adam", 1), ("hizoo", 0), ("helene", 1)])
def test_states(rule, which):
    arguments = good(rule)
    for value, error, match in (
        ([t.bfloat16() for t in arguments["state"][which]], TypeError, r"^{}\[0\]: got dtype torch.bfloat16"),
        (arguments["weights"], ValueError, r"^({0}|weights)\[\d\] overlaps ({0}|weights)\[\d\]"),
    ):
        arguments["state"][which] = value
        refused("preconditioned_update_", arguments, error, match.format(rf"state\[{which}\]"))


def test_a_step_in_a_tensor_is_that_step():
    updated = []
    for step in (3, torch.tensor(3), torch.tensor([3], dtype=torch.int32)):
        arguments = good("adam", rule=ops.AdamRule(0.1, step, (0.9, 0.999)))
        ops.preconditioned_update_(**arguments)
        updated.append(arguments["weights"])
    assert all(map(torch.equal, updated[0], updated[1])) and all(map(torch.equal, updated[0], updated[2]))


def test_numbers_and_overlaps_of_states():
    arguments = good("adam")
    m, v = arguments["state"]
    for bad, match in (
        ([m], r"state: got 1; accepted: 2 list\(s\) of tensors, as adam keeps"),
        ([m, v, v], "state: got 3"),
        (None, "state: got NoneType"),
        (m[0], "state: got Tensor"),
        ([m, [v[0], m[1]]], r"state\[\d\]\[1\] overlaps state\[\d\]\[1\]"),
        ([m, m], r"state\[\d\]\[\d\] overlaps state\[\d\]\[\d\]"),
    ):
        refused("preconditioned_update_", {**arguments, "state": bad}, ValueError, f"^{match}")
    refused("preconditioned_update_", good("momentum", state=[m, v]), ValueError, "^state: got 2; accepted: 1")
    refused("preconditioned_update_", good("momentum", state=m), ValueError, "^state: got 2; accepted: 1")


def test_hizoo_takes_one_draw():
    draws = [(1, 0.1), (2, 0.1)]
    refused(
        "preconditioned_update_", good("hizoo", draws=draws), ValueError, "^draws: got 2; accepted: one with HiZOORule"
    )


@pytest.mark.parametrize("restore", [[], [0.1, 0.1], 0.1, "x"])
def test_numbers_of_restores(restore):
    refused("preconditioned_update_", good(restore=restore), ValueError, r"^restore: got .*; accepted: 1 scalar\(s\)")


def test_out_over_the_curvature():
    arguments = good_perturb()
    out = [torch.zeros(6, 8), arguments["curvature"][1]]
    refused(
        "preconditioned_perturb_", {**arguments, "out": out}, ValueError, r"^curvature\[1\]: shares memory with out"
    )
