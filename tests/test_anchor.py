"""anchor_affine_: the formula in exact arithmetic, cpu = reference, layouts, refusals."""

import math
from fractions import Fraction

import pytest
import torch
from support.cases import IDS, ROUNDINGS, anchor_arguments, anchored, flat, per_tensor, run, storage
from support.exact import round32, scalar32
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, serving, weights
from support.refusals import refused

from pgap_kernels import reference

BACKENDS = ("reference", "cpu")
HALF_DTYPES = (torch.bfloat16, torch.float16)
STOCHASTIC = ROUNDINGS["stochastic"]
TABLE = torch.ops.pgap_kernels


# ---- the formula ---------------------------------------------------------------------------------------------------


def exact_affine(w: float, origin: float, delta: float | None, c: float) -> float:
    """fma(c, X, W0), X = Delta or W - W0 rounded to float32."""
    x = round32(Fraction(w) - Fraction(origin)) if delta is None else Fraction(delta)
    return float(round32(scalar32(c) * x + Fraction(origin)))


@pytest.mark.parametrize("coefficient", [0.7, -1.3, 1.0, 1e-8])
@pytest.mark.parametrize("deltas", ["none", "float32", "own"])
@pytest.mark.parametrize("anchors", ["float32", "own"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_in_exact_arithmetic(backend, dtype, anchors, deltas, coefficient):
    kinds = {"none": None, "float32": torch.float32, "own": dtype}
    options = {"coefficient": coefficient, "shapes": [(301,)]}
    arguments = anchor_arguments(dtype, kinds[anchors], kinds[deltas], **options)
    (w,), (origin,) = clones(arguments["weights"]), arguments["anchors"]
    distance = arguments["deltas"][0].tolist() if deltas != "none" else [None] * 301
    ops.anchor_affine_(**arguments, backend=backend)
    want = [exact_affine(*values, coefficient) for values in zip(w.tolist(), origin.tolist(), distance, strict=True)]
    assert_same_bits(arguments["weights"][0], torch.tensor(want, dtype=torch.float64).float().to(dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_pass_rounds_the_float32_pass(backend, dtype):
    """By the rounding that test_dense holds to its definition, with the words of the weight's own stream."""
    arguments = anchor_arguments(dtype, rounding="stochastic", shapes=[(3000,)])
    wide = {**arguments, "weights": [arguments["weights"][0].float()]}
    ops.anchor_affine_(**arguments, backend=backend)
    ops.anchor_affine_(**wide, backend=backend)
    (got,), (value,) = arguments["weights"], wide["weights"]
    words = reference.words(0, 3000, IDS[0], STOCHASTIC["rounding_key"], value.device)
    assert_same_bits(got, reference.stochastic_round(value, words, dtype))
    assert not torch.equal(got, value.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_is_the_anchor_and_stored_distances_do_not_drift(backend, dtype):
    arguments = anchor_arguments(dtype, dtype, torch.float32)
    want = clones(arguments["weights"])
    ops.anchor_affine_(**{**arguments, "weights": want, "coefficient": 0.25}, backend=backend)
    for c in (3.0, -7.0, 0.1, 0.25):
        ops.anchor_affine_(**{**arguments, "coefficient": c}, backend=backend)
    assert_all_same(arguments["weights"], want)
    ops.anchor_affine_(**{**arguments, "coefficient": 0.0}, backend=backend)
    assert all(torch.equal(w, a) for w, a in zip(arguments["weights"], arguments["anchors"], strict=True))


# ---- cpu = reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", anchored)
def test_cpu_is_the_reference(name):
    """Ragged sizes, every dtype of the three lists, rounding and layout; the memory around is compared too."""
    assert_all_same(run(anchored[name], "cpu"), run(anchored[name], "reference"))


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, 1e-40, -1e-45, 65504.0, 3.38e38, 0.5, -0.5]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, coefficient, rounding):
    results = []
    for backend in BACKENDS:
        w = [torch.tensor(SPECIAL * 12, dtype=torch.float64).to(dtype)]
        anchors = [torch.tensor([x for x in SPECIAL for _ in range(12)], dtype=torch.float64).to(dtype)]
        options = {"tensor_ids": [1], "backend": backend, **ROUNDINGS[rounding]}
        ops.anchor_affine_(w, anchors, coefficient, **options)
        results.append(w)
    assert_all_same(*results)


def test_threads_do_not_matter(set_threads):
    results = []
    for threads in (1, 2):
        set_threads(threads)
        arguments = anchor_arguments(torch.bfloat16, rounding="stochastic", shapes=[(300, 401), (70001,)])
        ops.anchor_affine_(**arguments, backend="cpu")
        results.append(arguments["weights"])
    assert_all_same(*results)


# ---- lists, layouts, shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [list, torch.tensor])
@pytest.mark.parametrize("deltas", [None, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_per_tensor_coefficients_are_single_calls(backend, deltas, wrap):
    coefficients = per_tensor([0.7, -1.3, 0.0], 9)
    options = {"deltas": deltas, "rounding": "stochastic", "coefficient": wrap(coefficients)}
    arguments = anchor_arguments(torch.float16, **options)
    singles = clones(arguments["weights"])
    ops.anchor_affine_(**arguments, backend=backend)
    for i, single in enumerate(singles):
        own = {
            "weights": [single],
            "anchors": arguments["anchors"][i : i + 1],
            "coefficient": coefficients[i],
            "deltas": arguments["deltas"][i : i + 1] if deltas else None,
            "tensor_ids": [IDS[i]],
        }
        ops.anchor_affine_(**own, backend=backend, **STOCHASTIC)
        assert_same_bits(single, arguments["weights"][i])


@pytest.mark.parametrize("shard", [(7, 19, 0, 300), (0, 50, 100, 300), (3, 44, 17, 18), (21, 50, 250, 300)], ids=str)
@pytest.mark.parametrize("deltas", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_are_slices_of_the_whole(backend, deltas, shard):
    top, bottom, left, right = shard
    whole = anchor_arguments(torch.bfloat16, deltas=deltas, rounding="stochastic", shapes=[(50, 300)])
    part = {**whole, "slices": [(top * 300 + left, 300)]}
    for name in ("weights", "anchors", "deltas"):
        if name in whole:
            part[name] = [whole[name][0][top:bottom, left:right].contiguous()]
    ops.anchor_affine_(**whole, backend=backend)
    ops.anchor_affine_(**part, backend=backend)
    assert_same_bits(part["weights"][0], whole["weights"][0][top:bottom, left:right].contiguous())


@pytest.mark.parametrize("deltas", [None, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_weights_are_written(backend, deltas):
    """What lies between the rows stays poison, no poison comes in, anchors and distances stay."""
    arguments = anchor_arguments(torch.bfloat16, deltas=deltas, layout="strided")
    read = flat([arguments["anchors"], arguments.get("deltas", [])])
    before = clones(read)
    ops.anchor_affine_(**arguments, backend=backend)
    assert_all_same(read, before)
    for t in arguments["weights"]:
        assert t.isfinite().all()
        assert storage(t).isnan().sum() == storage(t).numel() - t.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_poisoned_weights_are_only_written_where_distances_are_stored(backend):
    arguments = anchor_arguments(deltas=torch.float32)
    want = clones(arguments["weights"])
    ops.anchor_affine_(**{**arguments, "weights": want}, backend=backend)
    for t in arguments["weights"]:
        t.fill_(math.nan)
    ops.anchor_affine_(**arguments, backend=backend)
    assert_all_same(arguments["weights"], want)


@pytest.mark.parametrize("deltas", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_leaves_the_weights(backend, dtype, deltas):
    """With stored distances it does not even read them."""
    arguments = anchor_arguments(dtype, deltas=deltas, rounding="stochastic", layout="strided", out=True)
    out, w = arguments.pop("out"), arguments["weights"]
    want = clones(w)
    ops.anchor_affine_(**{**arguments, "weights": want}, backend=backend)
    if deltas is not None:
        for t in w:
            t.fill_(math.nan)
    before, versions, before_out = clones(w), [t._version for t in w], [t._version for t in out]
    ops.anchor_affine_(**arguments, out=out, backend=backend)
    assert_all_same(out, want)
    assert_all_same(w, before)
    assert [t._version for t in w] == versions
    assert all(t._version > b for t, b in zip(out, before_out, strict=True))


# ---- registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_version_counters(backend):
    arguments = anchor_arguments(deltas=torch.float32)
    read = flat([arguments["anchors"], arguments["deltas"]])
    before, before_read = ([t._version for t in tensors] for tensors in (arguments["weights"], read))
    ops.anchor_affine_(**arguments, backend=backend)
    assert all(t._version > b for t, b in zip(arguments["weights"], before, strict=True))
    assert [t._version for t in read] == before_read


def op_arguments(dtype, deltas: bool) -> tuple[list, dict]:
    """Weights, and the keywords of the op."""
    w, anchors, distances = (weights([(5, 7), (9,)], dtype, seed=i) for i in range(3))
    return w, {
        "anchors": anchors,
        "deltas": distances if deltas else [],
        "coefficient": torch.tensor([[0.5, 0.1]]),
        "rounding_key": torch.tensor([5]) if dtype != torch.float32 else None,
        "tensor_ids": [1, 2],
        "slices": [0, 7, 0, 9],
    }


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype, deltas):
    w, keywords = op_arguments(dtype, deltas)
    with serving(backend):
        torch.library.opcheck(TABLE.anchor_affine_.default, (w,), keywords)
        torch.library.opcheck(TABLE.anchor_affine_.out, (w,), {**keywords, "out": clones(w)})


def test_compiled_op():
    w, keywords = op_arguments(torch.bfloat16, False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(w):
        TABLE.anchor_affine_(w, **keywords)
        return w[0].float() * 2

    got, want = clones(w), clones(w)
    TABLE.anchor_affine_(want, **keywords)
    assert torch.equal(step(got), want[0].float() * 2)
    assert_all_same(got, want)


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(**changes) -> dict:
    arguments = anchor_arguments(deltas=torch.float32, shapes=[(6, 8), (5, 7)])
    return {**{key: arguments[key] for key in ("weights", "anchors", "deltas", "coefficient")}, **changes}


@pytest.mark.parametrize("name", ["anchors", "deltas"])
def test_other_sixteen_bits(name):
    arguments = {**good(), "weights": weights([(6, 8), (5, 7)], torch.bfloat16)}
    arguments[name] = [t.half() for t in arguments[name]]
    refused("anchor_affine_", arguments, TypeError, rf"^{name}\[0\]: got dtype torch.float16; accepted: .*bfloat16")


def test_stochastic_rounding_needs_ids():
    arguments = good(rounding="stochastic", rounding_key=1)
    refused("anchor_affine_", arguments, ValueError, "^tensor_ids: got None; accepted: one per tensor with stochastic")


@pytest.mark.parametrize("name", ["anchors", "deltas"])
def test_out_over_what_is_read(name):
    out = [torch.zeros(6, 8), good()[name][1]]
    arguments = good(out=out)
    arguments[name][1] = out[1]
    refused("anchor_affine_", arguments, ValueError, rf"^out \+ {name}\[\d\] overlaps")


def test_no_anchors():
    refused("anchor_affine_", good(anchors=None), TypeError, "^anchors: got NoneType")


def good_for_extension() -> dict:
    return {
        "weights": [],
        "out": [torch.zeros(40).bfloat16() for _ in range(3)],
        "in_place": True,
        "anchors": [torch.ones(40) for _ in range(3)],
        "deltas": [torch.ones(40).bfloat16() for _ in range(3)],
        "coefficient": torch.ones(1, 3),
        "rounding_key": None,
        "tensor_ids": [1, 2, 3],
        "slices": [0, 40] * 3,
    }


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"in_place": False, "deltas": []}, "weights: accepted: one per output"),
        ({"in_place": False, "weights": [torch.zeros(40).bfloat16()]}, "lists of one length"),
        ({"in_place": False, "weights": [torch.zeros(39).bfloat16()] * 3}, "the shapes of weights"),
        ({"anchors": []}, "anchors: accepted: one tensor per weight"),
        ({"anchors": [torch.ones(40)] * 2}, "anchors: accepted: one tensor per weight"),
        ({"anchors": [torch.ones(39)] * 3}, "anchors: accepted: the shapes"),
        ({"anchors": [torch.ones(40).half()] * 3}, "anchors: accepted: CPU tensors"),
        ({"deltas": [torch.ones(80)[::2]] * 3}, "deltas: accepted: contiguous rows"),
        ({"deltas": [torch.ones(40).double()] * 3}, "deltas: accepted: float32"),
        ({"deltas": [torch.ones(40)]}, "deltas: accepted: one tensor per weight"),
        ({"coefficient": torch.ones(1, 2)}, "coefficient"),
        ({"coefficient": torch.ones(3)}, "coefficient"),
        ({"rounding_key": torch.zeros(2, dtype=torch.int64)}, "rounding_key"),
        ({"slices": [0, 39] * 3}, "slices"),
        ({"tensor_ids": [1, 2, 1 << 32]}, "tensor_ids"),
    ],
)
def test_extension_refuses_what_it_cannot_index(change, accepted):
    arguments = {**good_for_extension(), **change}
    with pytest.raises(RuntimeError, match=accepted):
        torch.ops.pgap_kernels_cpu.anchor(**arguments)
    assert all((w == 0).all() for w in arguments["out"])


def test_extension_takes_what_the_refusals_start_from():
    arguments = good_for_extension()
    torch.ops.pgap_kernels_cpu.anchor(**arguments)
    assert all((w == 2).all() for w in arguments["out"])


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize("rounding_key", [None, torch.tensor([5])])
def test_extension_out_of_place_is_in_place(deltas, rounding_key):
    arguments = {**good_for_extension(), "rounding_key": rounding_key}
    arguments["coefficient"] = torch.full((1, 3), 0.3)
    if not deltas:
        arguments["deltas"] = []
    arguments["out"] = [torch.randn(40).bfloat16() for _ in range(3)]
    before = [w.clone() for w in arguments["out"]]
    apart = [torch.full_like(w, math.nan) for w in before]
    given = {**arguments, "weights": [] if deltas else before, "out": apart, "in_place": False}
    torch.ops.pgap_kernels_cpu.anchor(**given)
    torch.ops.pgap_kernels_cpu.anchor(**arguments)
    for found, want in zip(apart, arguments["out"], strict=True):
        assert_same_bits(found, want)
