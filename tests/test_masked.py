"""masked_perturb_ and threshold_bits: the formula, the three masks, cpu = reference, shards, refusals."""

import math

import pytest
import torch
from support.cases import IDS, KEYS, MASK_KEY, MASKS, ROUNDINGS, masked, masked_arguments, per_tensor, run
from support.exact import exact_dense
from support.helpers import DTYPES, assert_all_same, assert_same_bits, clones, ops, poison, serving, weights
from support.refusals import refused

from pgap_kernels import noise

BACKENDS = ("reference", "cpu")
STOCHASTIC = ROUNDINGS["stochastic"]
TABLE = torch.ops.pgap_kernels
DRAWS = [(KEYS[0], 1e-1), (KEYS[1], -0.37), (KEYS[2], 2.5e-2)]


def perturbed(tensors, draws, ids=None, **options):
    """Copies of the tensors after the op."""
    tensors = clones(tensors)
    ops.masked_perturb_(tensors, draws, tensor_ids=IDS[: len(tensors)] if ids is None else ids, **options)
    return tensors


def word(index: int, ident: int, key: int) -> int:
    """The word of one element, from the scalar definition of the stream."""
    counter, lane = noise.element_counter(index, ident)
    return noise.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32), noise.ROUNDS)[lane]


# ---- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_in_exact_arithmetic(backend, dtype, mask, draws, decay):
    (w,) = weights([(300,)], dtype, seed=draws)
    if mask == "threshold":
        options, keep = {"threshold": 0.7}, [abs(x) <= torch.tensor(0.7).item() for x in w.tolist()]
    elif mask == "share":
        options = {"share": (MASK_KEY, 0.3)}
        keep = [word(e, IDS[0], MASK_KEY) < 0.3 * 2**32 for e in range(300)]
    else:
        numbers = [0x5A0F3C96 * (i + 1) & 0x7FFFFFFF for i in range(10)]
        options = {"bits": [torch.tensor(numbers, dtype=torch.int32)]}
        keep = [numbers[e // 32] >> e % 32 & 1 for e in range(300)]
    (got,) = perturbed([w], DRAWS[:draws], decay=decay, backend=backend, **options)
    zs = torch.stack([ops.draw(300, key, IDS[0], backend="reference") for key, _ in DRAWS[:draws]], 1).tolist()
    coefficients = [a for _, a in DRAWS[:draws]]
    want = [
        exact_dense(x, z, coefficients, decay) if k else exact_dense(x, [0.0], [0.0], decay)
        for x, z, k in zip(w.tolist(), zs, keep, strict=True)
    ]
    assert 50 < sum(map(bool, keep)) < 250
    assert_same_bits(got, torch.tensor(want, dtype=torch.float64).float().to(dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_kept_is_the_dense_pass_and_none_the_decay(backend, mask):
    w = weights([(37, 129), (4097,)], torch.bfloat16)
    ones = [torch.full((-(-t.numel() // 32),), -1, dtype=torch.int32) for t in w]
    everything = {"threshold": 1e30, "share": (MASK_KEY, 1.0), "bits": ones}[mask]
    nothing = {"threshold": -1.0, "share": (MASK_KEY, 0.0), "bits": [torch.zeros_like(b) for b in ones]}[mask]
    for decay in (0.0, 0.1):
        options = {"decay": decay, "backend": backend, **STOCHASTIC}
        dense = clones(w)
        ops.dense_perturb_(dense, DRAWS[:2], tensor_ids=IDS[:2], **options)
        assert_all_same(perturbed(w, DRAWS[:2], **{mask: everything}, **options), dense)
        decayed = clones(w)
        ops.dense_perturb_(decayed, [(KEYS[0], 0.0)], tensor_ids=IDS[:2], **options)
        assert_all_same(perturbed(w, DRAWS[:2], **{mask: nothing}, **options), decayed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_that_are_not_kept_keep_their_sign(backend, dtype):
    w = [torch.tensor([0.0, -0.0] * 200, dtype=dtype)]
    assert_all_same(perturbed(w, DRAWS[:1], threshold=-1.0, backend=backend), w)


def test_share_keeps_that_part():
    """Within 5 sigma, and whether or not an element is kept does not depend on the noise's key."""
    n, p = 200_000, 0.3
    (got,) = perturbed([torch.zeros(n)], DRAWS[:1], share=(MASK_KEY, p))
    (other,) = perturbed([torch.zeros(n)], DRAWS[1:2], share=(MASK_KEY, p))
    assert abs((got != 0).sum().item() - n * p) <= 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(got != 0, other != 0)


# ---- cpu = reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", masked)
def test_cpu_is_the_reference(name):
    """Ragged sizes, every dtype, mask, rounding and layout; the memory around is compared too."""
    assert_all_same(run(masked[name], "cpu"), run(masked[name], "reference"))


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, 1e-40, -1e-45, 65504.0, 3.38e38, 0.5, -0.5]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e-30, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_weights(dtype, threshold, rounding):
    w = [torch.tensor(SPECIAL * 40, dtype=torch.float64).to(dtype)]
    options = {"threshold": threshold, "decay": 0.5, **ROUNDINGS[rounding]}
    got, want = (perturbed(w, DRAWS[:2], backend=b, **options) for b in ("cpu", "reference"))
    assert_all_same(got, want)
    assert got[0][w[0].isnan()].isnan().all()


@pytest.mark.parametrize("mask", MASKS)
def test_threads_do_not_matter(set_threads, mask):
    shapes = [(300, 401), (70001,)]
    arguments = masked_arguments(mask, torch.bfloat16, rounding="stochastic", shapes=shapes)
    results = []
    for threads in (1, 2):
        set_threads(threads)
        arguments["weights"] = weights(shapes, torch.bfloat16)
        ops.masked_perturb_(**arguments, backend="cpu")
        results.append(arguments["weights"])
    assert_all_same(*results)


# ---- lists, layouts, shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_per_tensor_scalars_are_single_calls(backend, mask):
    arguments = masked_arguments(mask, torch.float16, decay=per_tensor([0.0, 0.1], 9), rounding="stochastic")
    count = len(arguments["weights"])
    many = [0.1 * (i + 1) for i in range(count)]
    arguments["draws"] = [(KEYS[0], many), (KEYS[1], 0.5)]
    singles = clones(arguments["weights"])
    ops.masked_perturb_(**arguments, backend=backend)
    for i in range(count):
        own = {
            **arguments,
            "weights": singles[i : i + 1],
            "tensor_ids": [IDS[i]],
            "draws": [(KEYS[0], many[i]), (KEYS[1], 0.5)],
            "decay": arguments["decay"][i],
        }
        for name in ("threshold", "bits"):
            if name in own:
                own[name] = own[name][i : i + 1]
        ops.masked_perturb_(**own, backend=backend)
        assert_same_bits(singles[i], arguments["weights"][i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_and_keys_in_tensors(backend):
    w = weights([(33,), (11, 7)])
    signed = [torch.tensor(key - (key >> 63 << 64)) for key in (KEYS[0], MASK_KEY)]
    want = perturbed(w, DRAWS[:1], share=(MASK_KEY, 0.5), backend=backend)
    assert_all_same(perturbed(w, [(signed[0], torch.tensor(1e-1))], share=(signed[1], 0.5), backend=backend), want)
    want = perturbed(w, DRAWS[:1], threshold=[0.5, 1.0], backend=backend)
    assert_all_same(perturbed(w, DRAWS[:1], threshold=torch.tensor([0.5, 1.0]), backend=backend), want)
    want = perturbed(w, DRAWS[:1], threshold=0.5, backend=backend)
    assert_all_same(perturbed(w, DRAWS[:1], threshold=torch.tensor(0.5), backend=backend), want)


WHOLE = (50, 300)


@pytest.mark.parametrize("shard", [(7, 19, 0, 300), (0, 50, 100, 300), (3, 44, 17, 18), (21, 50, 250, 300)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_are_slices_of_the_whole(backend, mask, shard):
    """A shard's bits are its own; the other masks follow its place or its weights."""
    top, bottom, left, right = shard
    (w,) = weights([WHOLE], torch.bfloat16)
    local = w[top:bottom, left:right].contiguous()

    def options(tensor):
        bits = ops.threshold_bits([tensor], 0.5) if mask == "bits" else None
        own = {"threshold": 0.5, "share": (MASK_KEY, 0.4), "bits": bits}[mask]
        return {mask: own, "decay": 0.02, "backend": backend, **STOCHASTIC}

    (whole,) = perturbed([w], DRAWS[:2], **options(w))
    (got,) = perturbed([local], DRAWS[:2], slices=[(top * WHOLE[1] + left, WHOLE[1])], **options(local))
    assert_same_bits(got, whole[top:bottom, left:right].contiguous())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_leaves_the_weights(backend, mask):
    arguments = masked_arguments(mask, torch.bfloat16, layout="strided", out=True, rounding="stochastic")
    before = clones(arguments["weights"])
    ops.masked_perturb_(**arguments, backend=backend)
    assert_all_same(arguments["weights"], before)
    out = arguments.pop("out")
    ops.masked_perturb_(**arguments, backend=backend)
    assert_all_same(out, arguments["weights"])
    assert all(t.isfinite().all() for t in out)


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (31,), (32,), (33,), (7, 13), (4097,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_bits(dtype, shape):
    (w,) = weights([shape], dtype)
    if w.numel() > 20:
        w.view(-1)[3], w.view(-1)[20] = math.nan, torch.tensor(0.6, dtype=dtype)
    threshold = torch.tensor(0.6, dtype=dtype).item()
    (bits,) = ops.threshold_bits([w], threshold)
    keep = [abs(x) <= threshold for x in w.flatten().tolist()]
    want = [sum(k << i for i, k in enumerate(keep[at : at + 32])) for at in range(0, len(keep), 32)]
    assert bits.dtype == torch.int32 and [b & 0xFFFFFFFF for b in bits.tolist()] == want


def test_threshold_bits_of_lists():
    w = weights([(33,), (11, 7), (0,)])
    apart = torch.zeros(11, 20)
    apart[:, 4:11] = w[1]
    got = ops.threshold_bits([w[0], apart[:, 4:11], w[2]], [0.5, 1.0, 2.0])
    want = [ops.threshold_bits([t], level)[0] for t, level in zip(w, [0.5, 1.0, 2.0], strict=True)]
    assert all(torch.equal(g, x) for g, x in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["plain", "strided", "shard"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_clean_weights_are_the_threshold(backend, dtype, layout):
    arguments = masked_arguments("threshold", dtype, layout=layout, rounding="stochastic", decay=0.01)
    other = masked_arguments("threshold", dtype, layout=layout, rounding="stochastic", decay=0.01)
    other["bits"] = ops.threshold_bits(other["weights"], other.pop("threshold"))
    ops.masked_perturb_(**arguments, backend=backend)
    ops.masked_perturb_(**other, backend=backend)
    assert_all_same(other["weights"], arguments["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_restore_where_a_threshold_of_perturbed_weights_would_not(backend):
    """Perturbed through bits of the clean weights and back: each pass rounds once; the same elements move."""
    (w,) = weights([(37, 129)])
    mask = ops.threshold_bits([w], 0.7)
    (up,) = perturbed([w], [(KEYS[0], 0.3)], bits=mask, backend=backend)
    (same,) = perturbed([w], [(KEYS[0], 0.3)], threshold=0.7, backend=backend)
    assert_same_bits(up, same)
    (back,) = perturbed([up], [(KEYS[0], -0.3)], bits=mask, backend=backend)
    rounding = 2.0**-24 * (up.double().abs() * (1 + 2.0**-23) + w.double().abs() + up.double().abs() * 2.0**-23)
    assert ((back.double() - w.double()).abs() <= rounding).all()
    assert_same_bits(back[w.abs() > 0.7], w[w.abs() > 0.7])
    (lost,) = perturbed([up], [(KEYS[0], -0.3)], threshold=0.7, backend=backend)
    assert ((lost.double() - w.double()).abs() > rounding).sum() > 100


# ---- registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_version_counters(backend, mask):
    arguments = masked_arguments(mask)
    w, others = arguments["weights"], arguments.get("bits", [])
    out = poison(w)

    def versions(tensors):
        return [t._version for t in tensors]

    before, before_out, before_others = versions(w), versions(out), versions(others)
    ops.masked_perturb_(**arguments, out=out, backend=backend)
    assert versions(w) == before
    assert all(a > b for a, b in zip(versions(out), before_out, strict=True))
    ops.masked_perturb_(**arguments, backend=backend)
    assert all(a > b for a, b in zip(versions(w), before, strict=True))
    assert versions(others) == before_others


def op_arguments(dtype, mask) -> tuple[list, dict]:
    """Weights, and the keywords of the op."""
    w = weights([(5, 7), (9,)], dtype)
    return w, {
        "keys": torch.tensor([3, -4]),
        "coefficients": torch.tensor([[0.5], [-0.25]]),
        "decay": torch.tensor([[0.0, 0.1]]),
        "rounding_key": torch.tensor([5]) if dtype != torch.float32 else None,
        "mask": mask,
        "mask_key": torch.tensor([9]),
        "mask_level": torch.tensor([[0.5]]) if mask != "share" else torch.tensor([[1 << 30]]),
        "mask_bits": ops.threshold_bits(w, 0.5) if mask == "bits" else [],
        "tensor_ids": [1, 2],
        "slices": [0, 7, 0, 9],
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype, mask):
    w, keywords = op_arguments(dtype, mask)
    with serving(backend):
        torch.library.opcheck(TABLE.masked_perturb_.default, (w,), keywords)
        torch.library.opcheck(TABLE.masked_perturb_.out, (w,), {**keywords, "out": clones(w)})


def test_compiled_op():
    w, keywords = op_arguments(torch.bfloat16, "bits")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(w):
        TABLE.masked_perturb_(w, **keywords)
        return w[0].float() * 2

    got, want = clones(w), clones(w)
    TABLE.masked_perturb_(want, **keywords)
    assert torch.equal(step(got), want[0].float() * 2)
    assert_all_same(got, want)


# ---- refusals ------------------------------------------------------------------------------------------------------


def good(**changes) -> dict:
    w = weights([(6, 8), (5, 7)])
    return {"weights": w, "draws": [(1, 0.5)], "tensor_ids": [1, 2], "threshold": 0.5, **changes}


INTS = [torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)]
ONE_MASK = "^threshold, share, bits: got"
REFUSED = {
    "no mask": ({"threshold": None}, ValueError, f"{ONE_MASK} none"),
    "two masks": ({"share": (1, 0.5)}, ValueError, f"{ONE_MASK} threshold, share"),
    "three masks": ({"share": (1, 0.5), "bits": INTS}, ValueError, f"{ONE_MASK} threshold, share, bits"),
    "share a float": ({"threshold": None, "share": 0.5}, TypeError, r"^share: got 0.5; accepted: \(key, probability\)"),
    "share of three": ({"threshold": None, "share": (1, 2, 3)}, TypeError, "^share: got"),
    **{
        f"probability {p!r}": ({"threshold": None, "share": (1, p)}, ValueError, "^share probability: got")
        for p in (-0.1, 1.1, math.nan, torch.tensor(1.5))
    },
    "bits one short": ({"threshold": None, "bits": INTS[:1]}, ValueError, "^bits: got 1 tensors"),
    "bits a tensor": ({"threshold": None, "bits": INTS[0]}, TypeError, "^bits: got Tensor"),
    "bits int64": ({"threshold": None, "bits": [b.long() for b in INTS]}, TypeError, r"^bits\[0\]: got dtype"),
    "bits too short": (
        {"threshold": None, "bits": [INTS[0], INTS[1][:1]]},
        ValueError,
        r"^bits\[1\]: got shape \(1,\).*\(2,\)",
    ),
    "bits too long": ({"threshold": None, "bits": [INTS[0], INTS[0].repeat(2)]}, ValueError, r"^bits\[1\]: got shape"),
    "bits of the shape": (
        {"threshold": None, "bits": [torch.zeros(6, 8, dtype=torch.int32), INTS[1]]},
        ValueError,
        r"^bits\[0\]: got shape",
    ),
    "bits strided": (
        {"threshold": None, "bits": [INTS[0], torch.zeros(4, dtype=torch.int32)[::2]]},
        ValueError,
        r"^bits\[1\]: got shape .* strides",
    ),
    "bits on meta": ({"threshold": None, "bits": [b.to("meta") for b in INTS]}, ValueError, "^bits: got 2 .* on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, error, match = REFUSED[case]
    refused("masked_perturb_", good(**change), error, match)


def test_thresholds_and_keys():
    refused("masked_perturb_", good(threshold=[0.5, math.nan]), ValueError, "^threshold: got nan")
    refused("masked_perturb_", good(threshold=None, share=(-1, 0.5)), ValueError, r"^share key\[0\]: got -1")
    with pytest.raises(ValueError, match=r"^threshold: got nan"):
        ops.threshold_bits(good()["weights"], math.nan)


def test_threshold_bits_refuses():
    for bad, error in ((torch.zeros(3), TypeError), ([], ValueError), ([torch.zeros(3).double()], TypeError)):
        with pytest.raises(error, match=r"^weights"):
            ops.threshold_bits(bad, 0.5)


def good_for_extension() -> dict:
    return {
        "weights": [torch.zeros(40) for _ in range(3)],
        "keys": torch.tensor([1]),
        "coefficients": torch.ones(1, 1),
        "decay": torch.zeros(1, 1),
        "rounding_key": None,
        "mask": "bits",
        "mask_key": torch.zeros(1, dtype=torch.int64),
        "mask_level": torch.zeros(1, 1),
        "mask_bits": [torch.full((2,), -1, dtype=torch.int32) for _ in range(3)],
        "tensor_ids": [1, 2, 3],
        "slices": [0, 40] * 3,
        "distribution": "normal",
    }


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"mask": "none"}, "mask: accepted"),
        ({"mask_bits": []}, "mask_bits"),
        ({"mask_bits": [torch.zeros(1, dtype=torch.int32)] * 3}, "mask_bits"),
        ({"mask_bits": [torch.zeros(2, dtype=torch.int64)] * 3}, "mask_bits"),
        ({"mask": "threshold", "mask_level": torch.ones(1, 2)}, "mask_level"),
        ({"mask": "threshold", "mask_level": torch.ones(1, 1).double()}, "mask_level"),
        ({"mask": "share"}, "mask_level"),
        ({"mask": "share", "mask_level": torch.zeros(1, 0, dtype=torch.int64)}, "mask_level"),
        ({"coefficients": torch.ones(2, 1)}, "coefficients"),
        ({"decay": torch.ones(0, 1)}, "decay"),
        ({"rounding_key": torch.zeros(0, dtype=torch.int64)}, "rounding_key"),
        ({"slices": [0, 39] * 3}, "slices"),
        ({"tensor_ids": [1, 2]}, "tensor_ids"),
    ],
)
def test_extension_refuses_what_it_cannot_index(change, accepted):
    arguments = {**good_for_extension(), **change}
    with pytest.raises(RuntimeError, match=accepted):
        torch.ops.pgap_kernels_cpu.masked(out=arguments["weights"], **arguments)
    assert all((w == 0).all() for w in arguments["weights"])


def test_extension_takes_what_the_refusals_start_from():
    arguments = good_for_extension()
    torch.ops.pgap_kernels_cpu.masked(out=arguments["weights"], **arguments)
    assert all((w != 0).all() for w in arguments["weights"])
