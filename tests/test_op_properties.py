"""What holds for every op, whatever it computes: each row of ``support.cases`` is held to all of it.

Under Triton's interpreter (test_interpreted.py) the same holds for the Triton kernels.
"""

import itertools
import math
import os
from dataclasses import fields, replace

import pytest
import torch
from support import interpreter
from support.cases import CASES, ROWS, SETTINGS, Row, flat, run, storage
from support.helpers import BACKENDS, DTYPES, assert_all_same, clones, ops, serving
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import pgap_kernels.ops

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # `make sanitize`
OTHERS = [backend for backend in BACKENDS if backend != "reference"]
cpu_alone = pytest.mark.skipif("cpu" not in BACKENDS, reason="of the C++ extension")


def rows(condition=lambda row: True):
    found = {name: row for name, row in ROWS.items() if condition(row)}
    if interpreter.ON:  # a call takes seconds there: every op, and every third row of those with several
        first = {row.op: name for name, row in reversed(found.items())}.values()
        found = {name: row for i, (name, row) in enumerate(found.items()) if i % 3 == 0 or name in first}
    return pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in found.items()])


every_op = pytest.mark.parametrize("row", {row.op: row for row in ROWS.values()}.values(), ids=lambda row: row.op)
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` is full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def after(row: Row, arguments: dict, backend: str | None = None) -> list[torch.Tensor]:
    """What the call has written, or what it returned; a number for each tensor of a reduction."""
    return results(row, arguments, getattr(ops, row.op)(**arguments, backend=backend))


def results(row: Row, arguments: dict, returned) -> list[torch.Tensor]:
    if row.written:
        return [t for name in row.written for t in flat(arguments.get("out", arguments[name]))]
    return list(returned) if row.op in ("seeded_dot", "squared_norms") else flat(returned)


# ---- every backend computes the same -------------------------------------------------------------------------------


def test_any_two_values_of_two_factors_meet_in_a_setting():
    for one, other in itertools.combinations(SETTINGS[0], 2):
        values = [list(dict.fromkeys(str(s[name]) for s in SETTINGS)) for name in (one, other)]
        met = {(str(s[one]), str(s[other])) for s in SETTINGS}
        # Rounding to nearest has one layout; see _settings.
        assert met == set(itertools.product(*values)) or {one, other} == {"layout", "rounding"}


@pytest.mark.parametrize("backend", OTHERS)
# The interpreter and sanitizers take long: there a row has every fourth or every second setting, and, as rows have 15,
# others than the row before. Without them, all run.
@pytest.mark.parametrize("name", [*CASES][:: 4 if interpreter.ON else 2 if SANITIZED else 1])
def test_bits_are_those_of_the_reference(name, backend):
    """Empty and ragged sizes, every dtype, rounding and layout; the memory around is compared too."""
    assert_all_same(run(CASES[name], backend), run(CASES[name], "reference"))


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 6e-8, 1e-40, -1e-45, 65504.0, -65504.0, 3.38e38, 1e-3, -0.5]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("dtype", "rounding"), [*zip(DTYPES, ["nearest", "stochastic", "nearest"], strict=True)])
@rows(lambda row: row.elementwise and {"dtype", "rounding"} <= set(row.heeds))
def test_special_values(row, dtype, rounding, backend):
    """Infinities, NaN, both zeros, subnormal numbers, overflow; in weights, states, anchors and masks' weights."""
    results = []
    for which in (backend, "reference"):
        shapes = [(39, 39)] * 4
        arguments = row.arguments(dtype=dtype, rounding=rounding, shapes=shapes)
        for i, t in enumerate(flat([arguments[name] for name in row.elementwise if name != "bits"])):
            special = torch.tensor(SPECIAL, dtype=torch.float64).roll(i).repeat(3)
            t.copy_(special.expand(39, 39) if i < 4 else special.expand(39, 39).T)
        if "anchors" in arguments:
            arguments["coefficient"] = [0.0, 0.5, 3e38, -1.0]
        before = clones(arguments["weights"])
        results.append(after(row, arguments, which))
    assert_all_same(*results)
    if "deltas" not in arguments:
        assert all(t[w.isnan()].isnan().all() for t, w in zip(results[0][:4], before, strict=True))


# ---- what does not matter ------------------------------------------------------------------------------------------


@on_each_backend
@rows(lambda row: "layout" in row.heeds and "strided" in row.layouts)
def test_strides_do_not_matter(row, backend):
    """Rows may lie apart; what lies between them stays poison, and no poison comes in."""
    plain, strided = row.arguments(), row.arguments(layout="strided")
    got = after(row, strided, backend)
    assert_all_same(got, after(row, plain, backend))
    for t in got if row.elementwise else []:
        assert t.isfinite().all() and storage(t).isnan().sum() == storage(t).numel() - t.numel()


def changed(arguments: dict, scalar=lambda value: value, key=lambda value: value) -> dict:
    """The arguments with every key changed, and everything else too, wherever it is."""

    def change(name: str, value):
        if name in ("key", "sign_key", "rounding_key", "left", "right", "core"):
            return key(value)
        if name == "draws":
            return [(key(k), scalar(a)) for k, a in value]
        if name == "share":
            return key(value[0]), value[1]
        if name in ("restore", "state"):
            return [scalar(v) for v in value]
        if name == "rule":
            names = [f.name for f in fields(value) if f.name not in ("betas", "refresh")]
            return replace(value, **{name: scalar(getattr(value, name)) for name in names})
        return value if name == "delta" else scalar(value)

    return {name: change(name, value) for name, value in arguments.items()}


def of_each(arguments: dict) -> int:
    """How many tensors are in a list."""
    return len(arguments["tensor_ids"] if "tensor_ids" in arguments else arguments["tensors"])


def spread(arguments: dict) -> dict:
    """With a scalar of its own for every tensor; rules have theirs."""
    count = of_each(arguments)

    def several(value):
        return [value * (1 + i / count) for i in range(count)] if isinstance(value, float) else value

    return arguments | changed({name: value for name, value in arguments.items() if name != "rule"}, several)


def chosen(arguments: dict, which: list[int]) -> dict:
    """The arguments of some of the tensors, in that order; tensors are copies."""
    count = of_each(arguments)

    def pick(value):
        if isinstance(value, list) and len(value) == count:
            return [value[i].clone() if isinstance(value[i], torch.Tensor) else value[i] for i in which]
        return value

    return changed(arguments, pick, pick)


@on_each_backend
@rows(lambda row: {"tensor_ids", "tensors"} & set(row.arguments()))
def test_the_list_does_not_matter(row, backend):
    """Subsets in any order, and single calls, each with its own scalars."""
    arguments = spread(row.arguments())
    count = of_each(arguments)
    singles = [chosen(arguments, [i]) for i in range(count)]
    orders = [[count - 1, 0, 2], [*range(count)][::-1]]
    several = [chosen(arguments, order) for order in orders]
    want = after(row, arguments, backend)
    lists = [want[i : i + count] for i in range(0, len(want), count)]  # weights, states
    for order, some in zip([*orders, *([i] for i in range(count))], [*several, *singles], strict=True):
        assert_all_same(after(row, some, backend), [values[i] for values in lists for i in order])


WHOLE = (12, 400)
SHARDS = [(3, 7, 0, 400), (0, 12, 177, 400), (2, 11, 17, 18)]


def repacked(bits: torch.Tensor, cut) -> torch.Tensor:
    """The bits of a part of the whole."""
    keep = (bits[:, None] >> torch.arange(32) & 1).flatten()[: math.prod(WHOLE)].view(WHOLE)
    return ops.threshold_bits([1.0 - cut(keep).float()], 0.5)[0]


@on_each_backend
@rows(lambda row: row.elementwise and "layout" in row.heeds)
def test_shards_are_slices_of_the_whole(row, backend):
    """Noise, factors and rounding words are drawn by the shard's place."""
    shapes = {"shapes": [WHOLE]}
    want = after(row, row.arguments(**shapes), backend)
    for top, bottom, left, right in SHARDS:

        def cut(value, box=(slice(top, bottom), slice(left, right))):
            return value[box].contiguous() if isinstance(value, torch.Tensor) else [cut(v) for v in value]

        arguments = row.arguments(**shapes)
        shard = {**arguments, "slices": [(top * WHOLE[1] + left, WHOLE[1])]}
        shard |= {name: cut(arguments[name]) for name in row.elementwise if name != "bits"}
        if "bits" in arguments:
            shard["bits"] = [repacked(arguments["bits"][0], cut)]
        for name, side in (("left", slice(top, bottom)), ("right", slice(left, right))):
            if isinstance(arguments.get(name), list):
                shard[name] = [f[side] for f in arguments[name]]
        assert_all_same(after(row, shard, backend), cut(want))


@cpu_alone
@rows()
def test_threads_do_not_matter(row, set_threads):
    results = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(after(row, row.arguments(**dict(row.large)), "cpu"))
    assert_all_same(*results)


@on_each_backend
@rows(lambda row: "out" in row.heeds)
def test_out_is_written_instead_of_the_weights(row, backend):
    arguments = row.arguments(layout="strided", out=True)
    before = clones(arguments["weights"])
    out = after(row, arguments, backend)
    assert_all_same(arguments["weights"], before)
    assert_all_same(out, after(row, row.arguments(layout="strided"), backend))
    assert all(t.isfinite().all() for t in out)


def in_tensors(arguments: dict) -> dict:
    """With every key and scalar in a tensor; float64 ones, so that what is computed from them is the same."""

    def key(value):
        return torch.tensor([value - (value >> 63 << 64)]) if isinstance(value, int) else value

    def number(value):
        numbers = isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))
        return torch.tensor(value, dtype=torch.float64) if numbers else value

    return changed(arguments, number, key)


@on_each_backend
@rows(lambda row: "forward" not in row.op and row.op != "squared_norms")
def test_keys_and_scalars_may_be_tensors(row, backend):
    assert_all_same(after(row, in_tensors(row.arguments()), backend), after(row, row.arguments(), backend))


# ---- what PyTorch is told ------------------------------------------------------------------------------------------


def versions(tensors):
    return [t._version for t in tensors]


@on_each_backend
@every_op
def test_version_counters(row, backend):
    """Those of what is written go up; nothing else is written."""
    for out in [False, *([True] if "out" in row.heeds else [])]:
        arguments = row.arguments(**({"out": True} if out else {}))
        written = flat([arguments[name] for name in (("out",) if out else row.written)])
        others = [t for t in flat(arguments) if not any(t is w for w in written)]
        before, before_others, contents = versions(written), versions(others), clones(others)
        after(row, arguments, backend)
        assert all(a > b for a, b in zip(versions(written), before, strict=True))
        assert versions(others) == before_others
        assert_all_same(others, contents)


@on_each_backend
@every_op
def test_inference_mode(row, backend):
    want = after(row, row.arguments(), backend)
    with torch.inference_mode():
        got = after(row, row.arguments(), backend)
        assert all(torch.equal(g.nan_to_num(), w.nan_to_num()) for g, w in zip(got, want, strict=True))


@on_each_backend
@every_op
def test_tensors_made_in_inference_mode(row, backend):
    want = after(row, row.arguments(), backend)
    with torch.inference_mode():
        arguments = row.arguments()
    got = after(row, arguments, backend)
    assert all(torch.equal(g.nan_to_num(), w.nan_to_num()) for g, w in zip(got, want, strict=True))


@on_each_backend
@every_op
def test_surroundings_change_nothing(row, backend):
    want, arguments = after(row, row.arguments(), backend), row.arguments()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        got = after(row, arguments, backend)
    assert all(torch.equal(g.nan_to_num(), w.nan_to_num()) for g, w in zip(got, want, strict=True))


class Registered(TorchDispatchMode):
    """Notes the registered op that a public function calls, with its arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pgap_kernels":
            self.call = (function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def registered(row: Row, **changes):
    with Registered() as mode:
        after(row, row.arguments(**changes))
    return mode.call


def small(row: Row) -> dict:
    return {"shapes": [(5, 7), (9, 4)]} if "shapes" in dict(row.large) else {}


@every_op
def test_opcheck(row):
    settings = [{}, {"dtype": torch.float32, "rounding": "nearest"}] if "rounding" in row.heeds else [{}]
    settings += [{"out": True}] if "out" in row.heeds else []
    for setting in settings:
        function, args, kwargs = registered(row, **small(row), **setting)
        with serving(OTHERS[0]):
            torch.library.opcheck(function, args, kwargs)


@every_op
def test_public_ops_are_traced(row):
    """A compiled function holds the public op in its one graph, checks and all."""
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(arguments):
        return [t * 2 for t in results(row, arguments, getattr(pgap_kernels.ops, row.op)(**arguments))]

    got = row.arguments(**small(row))
    want = after(row, row.arguments(**small(row)), OTHERS[0])
    with serving(OTHERS[0]):
        assert_all_same(step(got), [t * 2 for t in want])
    if row.written:
        assert_all_same(results(row, got, None), want)


@pytest.mark.parametrize("given", ["tensors", "numbers"])
def test_compiled_calls_take_other_keys_and_coefficients(given):
    """As tensors they take one graph; of each new Python number torch makes another."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(weights, key, coefficient):
        pgap_kernels.ops.dense_perturb_(weights, [(key, coefficient)], tensor_ids=[7])
        pgap_kernels.ops.lowrank_perturb_(weights, key, key, coefficient=coefficient, rank=2, tensor_ids=[7])

    got, want = [torch.zeros(5, 7)], [torch.zeros(5, 7)]
    for i in range(4):
        values = (i + 3, 0.25 * i)
        step(got, *(map(torch.tensor, values) if given == "tensors" else values))
        pgap_kernels.ops.dense_perturb_(want, [values], tensor_ids=[7])
        pgap_kernels.ops.lowrank_perturb_(want, i + 3, i + 3, coefficient=0.25 * i, rank=2, tensor_ids=[7])
    assert_all_same(got, want)
    assert counter.frame_count == 1 or given == "numbers"
