"""preconditioned_update_ and preconditioned_perturb_: the rules in float64, cpu = reference, states, refusals."""

import math

import numpy as np
import pytest
import torch
from support.bounds import Bounded, known, scalar
from support.cases import (
    IDS,
    KEYS,
    ROUNDINGS,
    RULES,
    flat,
    per_tensor,
    perturb_arguments,
    preconditioned,
    rule_named,
    run,
    storage,
    update_arguments,
)
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, poison, serving, weights
from support.refusals import refused
from torch.utils._pytree import tree_map_only

BACKENDS = ("reference", "cpu")
TABLE = torch.ops.pgap_kernels


def draw_counts(rule: str) -> tuple[int, ...]:
    return (1,) if rule == "hizoo" else (1, 2, 3)


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


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize(("rule", "draws"), [(rule, n) for rule in RULES for n in draw_counts(rule)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_in_float64(backend, dtype, rule, draws, distribution, rounding):
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


# ---- cpu = reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preconditioned)
def test_cpu_is_the_reference(name):
    """Ragged sizes, every dtype, rule, rounding and layout; the memory around is compared too."""
    assert_all_same(run(preconditioned[name], "cpu"), run(preconditioned[name], "reference"))


@pytest.mark.parametrize("rule", RULES)
def test_special_values(rule):
    """Infinities, NaN, zeros and subnormal numbers in weights and states."""
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-45, 3e38, 1e-3, 1.0])
    results = []
    for backend in BACKENDS:
        arguments = update_arguments(rule, shapes=[(1000,)], decay=0.5)
        arguments["weights"] = [special.repeat(100)]
        for i, s in enumerate(arguments["state"]):
            s[0].copy_(special.repeat_interleave(10).repeat(10).roll(7 * i))
        ops.preconditioned_update_(**arguments, backend=backend)
        results.append([*arguments["weights"], *flat(arguments["state"])])
    assert_all_same(*results)


@pytest.mark.parametrize("rule", RULES)
def test_threads_do_not_matter(set_threads, rule):
    results = []
    for threads in (1, 2):
        set_threads(threads)
        arguments = update_arguments(rule, torch.bfloat16, rounding="stochastic", shapes=[(300, 401), (70001,)])
        ops.preconditioned_update_(**arguments, backend="cpu")
        results.append([*arguments["weights"], *flat(arguments["state"])])
    assert_all_same(*results)


# ---- lists, layouts, shards ----------------------------------------------------------------------------------------


def only(arguments: dict, t: int) -> dict:
    """The arguments of tensor t alone."""
    rule = arguments["rule"]
    changes = {name: own(getattr(rule, name), t) for name in ("lr", "floor") if hasattr(rule, name)}
    return {
        **arguments,
        "weights": [arguments["weights"][t].clone()],
        "state": [[s[t].clone()] for s in arguments["state"]],
        "draws": [(key, own(a, t)) for key, a in arguments["draws"]],
        "restore": [own(r, t) for r in arguments["restore"]],
        "tensor_ids": [IDS[t]],
        "decay": own(arguments["decay"], t),
        "rule": type(rule)(**{**rule.__dict__, **changes}),
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_per_tensor_scalars_are_single_calls(backend, rule):
    arguments = update_arguments(rule, torch.float16, rounding="stochastic", decay=per_tensor([0.0, 0.1, 0.2], 9))
    arguments["draws"] = [(key, [0.1 * (i + 1) for i in range(9)]) for key, _ in arguments["draws"]]
    singles = [only(arguments, t) for t in range(9)]
    ops.preconditioned_update_(**arguments, backend=backend)
    for t, single in enumerate(singles):
        ops.preconditioned_update_(**single, backend=backend)
        assert_same_bits(single["weights"][0], arguments["weights"][t])
        assert_all_same(flat(single["state"]), [s[t] for s in arguments["state"]])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_in_tensors(backend, rule):
    """Every field of a rule may be a tensor: of float64, so that what is computed from it is the same."""
    results = []
    for wrapped in (False, True):
        arguments = update_arguments(rule, shapes=[(33,), (11, 7)])
        if wrapped:
            fields = {
                name: torch.tensor(value, dtype=torch.float64)
                for name, value in arguments["rule"].__dict__.items()
                if name not in ("betas", "refresh", "step") and not (rule == "adam" and name == "eps")
            }
            if rule == "adam":
                fields["step"] = torch.tensor(3.0, dtype=torch.float64)
            arguments["rule"] = type(arguments["rule"])(**{**arguments["rule"].__dict__, **fields})
            arguments["restore"] = [torch.tensor(r) for r in arguments["restore"]]
        ops.preconditioned_update_(**arguments, backend=backend)
        results.append([*arguments["weights"], *flat(arguments["state"])])
    assert_all_same(*results)


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


WHOLE = (50, 300)


@pytest.mark.parametrize("shard", [(7, 19, 0, 300), (0, 50, 100, 300), (3, 44, 17, 18), (21, 50, 250, 300)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_are_slices_of_the_whole(backend, rule, shard):
    top, bottom, left, right = shard
    whole = update_arguments(rule, torch.bfloat16, rounding="stochastic", decay=0.02, shapes=[WHOLE])
    part = {
        **whole,
        "weights": [whole["weights"][0][top:bottom, left:right].contiguous()],
        "state": [[s[0][top:bottom, left:right].contiguous()] for s in whole["state"]],
        "slices": [(top * WHOLE[1] + left, WHOLE[1])],
    }
    ops.preconditioned_update_(**whole, backend=backend)
    ops.preconditioned_update_(**part, backend=backend)
    written = zip(flat([part["weights"], part["state"]]), flat([whole["weights"], whole["state"]]), strict=True)
    for got, want in written:
        assert_same_bits(got, want[top:bottom, left:right].contiguous())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_around_is_written(backend, rule):
    """What lies between the rows of weights and states stays poison, and no poison comes in."""
    arguments = update_arguments(rule, layout="strided")
    ops.preconditioned_update_(**arguments, backend=backend)
    for t in flat([arguments["weights"], arguments["state"]]):
        assert t.isfinite().all()
        assert storage(t).isnan().sum() == storage(t).numel() - t.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb_out_leaves_the_weights(backend):
    arguments = perturb_arguments(torch.bfloat16, rounding="stochastic", layout="strided", out=True, decay=0.01)
    before = clones(flat([arguments["weights"], arguments["curvature"]]))
    ops.preconditioned_perturb_(**arguments, backend=backend)
    assert_all_same(flat([arguments["weights"], arguments["curvature"]]), before)
    out = arguments.pop("out")
    ops.preconditioned_perturb_(**arguments, backend=backend)
    assert_all_same(out, arguments["weights"])
    assert all(t.isfinite().all() for t in out)


# ---- registration --------------------------------------------------------------------------------------------------


def versions(tensors):
    return [t._version for t in tensors]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_update_version_counters(backend, rule):
    arguments = update_arguments(rule)
    written = flat([arguments["weights"], arguments["state"]])
    before = versions(written)
    ops.preconditioned_update_(**arguments, backend=backend)
    assert all(a > b for a, b in zip(versions(written), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb_version_counters(backend):
    arguments = perturb_arguments()
    w, curvature, out = arguments["weights"], arguments["curvature"], poison(arguments["weights"])
    before, read = versions(w), versions(curvature)
    before_out = versions(out)
    ops.preconditioned_perturb_(**arguments, out=out, backend=backend)
    assert versions(w) == before and versions(curvature) == read
    assert all(a > b for a, b in zip(versions(out), before_out, strict=True))
    ops.preconditioned_perturb_(**arguments, backend=backend)
    assert all(a > b for a, b in zip(versions(w), before, strict=True))
    assert versions(curvature) == read


def op_arguments(dtype, rule) -> tuple[tuple, dict]:
    """Arguments and keywords of the registered op of a rule, or of the perturbation for None."""
    w, state = weights([(5, 7), (9,)], dtype), [t.abs() + 0.5 for t in weights([(5, 7), (9,)], seed=1)]
    keywords = {
        "keys": torch.tensor([3]),
        "decay": torch.tensor([[0.0, 0.1]]),
        "rounding_key": torch.tensor([5]) if dtype != torch.float32 else None,
        "tensor_ids": [1, 2],
    }
    amount = torch.tensor([[0.5]])
    if rule is None:
        return (w,), {"curvature": state, "coefficients": amount, **keywords}
    chosen = rule_named(rule, 2)
    rows = [torch.tensor(value, dtype=torch.float32).expand(2) for _, value in chosen.scalars()]
    keywords |= {"gradient": amount, "restore": 0.1 * amount, "scalars": torch.stack(rows), "rule": rule}
    return (w, state, clones(state) if chosen.states == 2 else []), keywords


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_update(backend, dtype, rule):
    with serving(backend):
        torch.library.opcheck(TABLE.preconditioned_update_.default, *op_arguments(dtype, rule))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_perturb(backend, dtype):
    (w,), keywords = op_arguments(dtype, None)
    with serving(backend):
        torch.library.opcheck(TABLE.preconditioned_perturb_.default, (w,), keywords)
        torch.library.opcheck(TABLE.preconditioned_perturb_.out, (w,), {**keywords, "out": clones(w)})


def test_compiled_op():
    lists, keywords = op_arguments(torch.bfloat16, "adam")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(w, m, v):
        TABLE.preconditioned_update_(w, m, v, **keywords)
        return m[0] * 2

    got, want = ([clones(x) for x in lists] for _ in range(2))
    TABLE.preconditioned_update_(*want, **keywords)
    assert torch.equal(step(*got), want[1][0] * 2)
    assert_all_same(flat(got), flat(want))


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(name="momentum", /, **changes) -> dict:
    arguments = update_arguments(name, shapes=[(6, 8), (5, 7)])
    return {**{key: arguments[key] for key in ("weights", "state", "draws", "tensor_ids", "rule")}, **changes}


def good_perturb(**changes) -> dict:
    arguments = perturb_arguments(shapes=[(6, 8), (5, 7)])
    return {**{key: arguments[key] for key in ("weights", "curvature", "draws", "tensor_ids")}, **changes}


NEEDED = {"adam": {"step": 1}, "hizoo": {"curvature": 1.0}, "helene": {"anneal": 0.1, "floor": 1.0}}
CLASSES = {"momentum": ops.MomentumRule, "adam": ops.AdamRule, "hizoo": ops.HiZOORule, "helene": ops.HELENERule}
FIELDS = [
    *(("momentum", name) for name in ("lr", "beta")),
    *(("adam", name) for name in ("lr", "eps")),
    *(("hizoo", name) for name in ("lr", "curvature", "alpha")),
    *(("helene", name) for name in ("lr", "anneal", "floor", "beta1", "gamma", "eps")),
]


@pytest.mark.parametrize(("rule", "field"), FIELDS)
def test_fields_of_rules(rule, field):
    """A list is one per tensor for a learning rate or a floor, and wrong elsewhere."""
    for value, error in ((math.nan, ValueError), ("0.1", TypeError), ([0.1, math.inf], (TypeError, ValueError))):
        bad = CLASSES[rule](**{"lr": 0.1, **NEEDED.get(rule, {}), field: value})
        refused("preconditioned_update_", good(rule, rule=bad), error, rf"^rule\.{field}: got")
    if field not in ("lr", "floor"):
        bad = CLASSES[rule](**{"lr": 0.1, **NEEDED.get(rule, {}), field: [0.1, 0.2]})
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
        (ops.AdamRule(0.1, 1, (0.9,)), TypeError, r"rule\.betas: got \(0.9,\); accepted: two floats"),
        (ops.AdamRule(0.1, 1, 0.9), TypeError, r"rule\.betas: got 0.9"),
        (ops.AdamRule(0.1, 1, (0.9, 1.0)), ValueError, r"rule\.betas: got \(0.9, 1.0\); accepted: .* below 1"),
        (ops.AdamRule(0.1, 1, (-0.1, 0.9)), ValueError, r"rule\.betas: got"),
        (ops.AdamRule(0.1, 1, (0.9, math.nan)), ValueError, r"rule\.betas: got nan"),
        (ops.AdamRule(0.1, 1, (0.9, "x")), TypeError, r"rule\.betas: got 'x'"),
        (ops.HELENERule(0.1, 0.1, 1.0, refresh=0.9), TypeError, r"rule\.refresh: got 0.9"),
        (ops.HELENERule(0.1, 0.1, 1.0, refresh=(0.9, 8.0, 1)), TypeError, r"rule\.refresh: got"),
        (ops.HELENERule(0.1, 0.1, 1.0, refresh=(0.9, math.inf)), ValueError, r"rule\.refresh: got inf"),
        (None, TypeError, "rule: got None; accepted: MomentumRule, AdamRule, HiZOORule or HELENERule"),
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
        ([t.bfloat16() for t in arguments["state"][which]], TypeError, r"\[0\]: got dtype torch.bfloat16"),
        (arguments["weights"], ValueError, r" \+ weights\[\d\] overlaps"),
    ):
        arguments["state"][which] = value
        refused("preconditioned_update_", arguments, error, rf"^state\[{which}\]{match}")


def test_numbers_and_overlaps_of_states():
    arguments = good("adam")
    m, v = arguments["state"]
    for bad, match in (
        ([m], r"state: got 1; accepted: 2 list\(s\) of tensors, as adam keeps"),
        ([m, v, v], "state: got 3"),
        (None, "state: got NoneType"),
        (m[0], "state: got Tensor"),
        ([m, [v[0], m[1]]], r"state\[0\] \+ state\[1\]\[\d\] overlaps"),
        ([m, m], r"state\[0\] \+ state\[1\]\[\d\] overlaps"),
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
    refused("preconditioned_perturb_", {**arguments, "out": out}, ValueError, r"^out \+ curvature\[\d\] overlaps")


def good_for_extension() -> dict:
    return {
        "weights": [torch.zeros(40).bfloat16() for _ in range(3)],
        "state0": [torch.ones(40) for _ in range(3)],
        "state1": [torch.ones(40) for _ in range(3)],
        "keys": torch.tensor([1]),
        "gradient": torch.ones(1, 1),
        "restore": torch.ones(1, 3),
        "scalars": torch.ones(7, 1),
        "rule": "adam",
        "decay": torch.zeros(1, 1),
        "rounding_key": None,
        "tensor_ids": [1, 2, 3],
        "slices": [0, 40] * 3,
        "distribution": "normal",
    }


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"rule": "sgd"}, "rule: accepted"),
        ({"rule": "momentum"}, "scalars: accepted"),
        ({"rule": "momentum", "scalars": torch.ones(2, 1)}, "state0, state1: accepted"),
        ({"state1": []}, "state0, state1: accepted"),
        ({"state0": []}, "state0, state1: accepted"),
        ({"state0": [torch.ones(40)] * 2}, "state0: accepted: one tensor per weight"),
        ({"state0": [torch.ones(39)] * 3}, "state0: accepted: the shapes"),
        ({"state1": [torch.ones(80)[::2]] * 3}, "state1: accepted: contiguous rows"),
        ({"state0": [torch.ones(40).bfloat16()] * 3}, "state0: accepted: CPU tensors of float32"),
        ({"state1": [torch.ones(40).long()] * 3}, "state1: accepted: float32"),
        ({"keys": torch.zeros(0, dtype=torch.int64)}, "keys: accepted"),
        ({"gradient": torch.ones(2, 1)}, "gradient"),
        ({"restore": torch.ones(1, 2)}, "restore"),
        ({"scalars": torch.ones(7, 2)}, "scalars"),
        ({"scalars": torch.ones(7)}, "scalars"),
        ({"decay": torch.ones(0, 1)}, "decay"),
        ({"rounding_key": torch.zeros(0, dtype=torch.int64)}, "rounding_key"),
        ({"slices": [0, 39] * 3}, "slices"),
        ({"tensor_ids": [1, 2]}, "tensor_ids"),
        ({"distribution": "uniform"}, "distribution"),
    ],
)
def test_extension_refuses_what_it_cannot_index(change, accepted):
    arguments = {**good_for_extension(), **change}
    with pytest.raises(RuntimeError, match=accepted):
        torch.ops.pgap_kernels_cpu.preconditioned(out=arguments["weights"], **arguments)
    assert all((w == 0).all() for w in arguments["weights"])


def test_extension_takes_what_the_refusals_start_from():
    arguments = good_for_extension()
    torch.ops.pgap_kernels_cpu.preconditioned(out=arguments["weights"], **arguments)
    assert all((w != 0).all() for w in arguments["weights"])
