"""The host side of the Triton launches: tables that are kept, what autograd is told, calls that are refused."""

import gc

import pytest
import torch
from support.cases import IDS, KEYS
from support.helpers import assert_all_same, assert_same_bits, clones, ops, weights

from pgap_kernels import use_backend
from pgap_kernels.triton import cache, guard, launch, table
from pgap_kernels.triton.table import ALIGNED

TABLE = torch.ops.pgap_kernels
DRAWS = [(KEYS[0], 0.1)]
SHAPES = [(33,), (5, 7), (0,)]


def perturb(tensors, backend="triton", **options):
    ops.dense_perturb_(tensors, DRAWS, backend=backend, **{"tensor_ids": IDS[: len(tensors)], **options})
    return tensors


def add_lowrank(tensors, backend="triton", **options):
    ops.lowrank_perturb_(tensors, 1, 2, core=3, rank=2, coefficient=0.5, backend=backend, **options)
    return tensors


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """A cache of the test's own, and what it has made."""
    own = cache.Cache(64)
    monkeypatch.setattr(table, "_tables", own)
    return own


def test_one_table_for_one_list(own_tables):
    w = weights(SHAPES)
    perturb(w)
    (made,) = own_tables.entries.values()
    perturb(w, decay=0.5)
    ops.dense_perturb_(w, [(KEYS[1], 0.5), (KEYS[2], 0.25)], tensor_ids=IDS[:3], backend="triton")
    assert [*own_tables.entries.values()] == [made] and own_tables.entries.popitem()[1] is made


def test_lowrank_tables_are_kept(own_tables):
    w = weights([(9, 7), (5, 6)], torch.bfloat16)
    add_lowrank(w, tensor_ids=IDS[:2])
    tables = [*own_tables.entries.values()]
    add_lowrank(w, tensor_ids=IDS[:2], decay=0.5)
    assert len(tables) == len(own_tables.entries)
    assert all(a is b for a, b in zip(tables, own_tables.entries.values(), strict=True))


def test_whatever_enters_a_table_makes_another(own_tables):
    """The same memory as another list: other ids, place in the unsharded tensor, shape, dtype, order, output."""
    memory, mask = torch.zeros(24), [torch.tensor([0x5A5A5A], dtype=torch.int32)]

    def run(backend, view, **options):
        memory.copy_(torch.linspace(0, 1, 24))
        if options.pop("masked", False):
            ops.masked_perturb_([view], DRAWS, bits=mask, tensor_ids=IDS[:1], backend=backend)
        elif options.pop("pair", False):
            perturb([view[:5], view[5:]], backend, **options)
        else:
            perturb([view], backend, **{"tensor_ids": IDS[:1], **options})
        return memory.clone()

    calls = [
        (memory, {}),
        (memory, {"tensor_ids": [5]}),
        (memory, {"slices": [(100, 200)]}),
        (memory, {"slices": [(101, 200)]}),
        (memory[:23], {}),
        (memory.view(4, 6), {}),
        (memory.view(4, 6), {"slices": [(100, 200)]}),
        (memory.view(4, 6)[:, :5], {"slices": [(100, 200)]}),
        (memory.view(torch.bfloat16), {}),
        (memory.view(torch.float16), {}),
        (memory, {"masked": True}),
        (memory, {"pair": True, "decay": [0.5, 0.1]}),
        (memory, {"pair": True, "decay": 0.5}),
        (memory, {"pair": True, "tensor_ids": [2, 1]}),
    ]
    for _ in range(2):  # made, then found again
        for view, options in calls:
            assert_same_bits(run("triton", view, **options), run("reference", view, **options))
    assert len(own_tables.entries) == len(calls)


def test_a_tensor_whose_storage_moved():
    """The same Python object elsewhere in memory is another list; what it was is no longer written."""
    (w,), (other,) = weights([(33,)]), weights([(33,)], seed=1)
    perturb([w])
    left_behind, before = w.data, w.data.clone()
    want = perturb([other.clone()])
    w.data = other
    perturb([w])
    assert_same_bits(w, want[0])
    assert_same_bits(left_behind, before)


def test_memory_that_is_used_again():
    """Lists come and go at the same addresses."""
    for seed in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            w = weights(SHAPES, dtype, seed)
            want = perturb(clones(w), "reference")
            assert_all_same(perturb(w), want)
            del w
            gc.collect()


@pytest.mark.parametrize("size", [1, 2])
def test_what_was_dropped_is_made_again(own_tables, size):
    own_tables.size = size
    lists = [weights(SHAPES, seed=seed) for seed in range(3)]
    for _ in range(2):
        for w in lists:
            want = perturb(clones(w), "reference")
            assert_all_same(perturb(w), want)
            assert len(own_tables.entries) <= size
    matrices = weights([(9, 7), (5, 6)])
    want = add_lowrank(clones(matrices), tensor_ids=IDS[:2])
    own_tables.entries.clear()
    assert_all_same(add_lowrank(matrices, tensor_ids=IDS[:2]), want)
    assert len(own_tables.entries) == size


def test_the_least_recently_used_goes_first():
    lru, made = cache.Cache(2), []

    def get(key):
        return lru.get(key, lambda: made.append(key) or key)

    assert [get(key) for key in "abacab"] == [*"abacab"]
    assert made == ["a", "b", "c", "b"]


# ---- graph captures ------------------------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch):
    """What follows is taken for a graph capture."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


@pytest.mark.parametrize("rank", [2, 12])
def test_factors_of_a_captured_pass_may_lie_anywhere(capture, monkeypatch, rank):
    """A capture has memory of its own, so what a pass makes beforehand has another address than at the warm-up."""
    kept, empty = [], torch.empty

    def keeping(*args, **options):
        kept.append(empty(*args, **options))
        return kept[-1]

    monkeypatch.setattr(torch, "empty", keeping)
    start = weights([(20, 33), (40, 18)], torch.bfloat16)
    w = clones(start)
    options = {"rank": rank, "core": 3, "coefficient": 0.5, "tensor_ids": IDS[:2], "backend": "triton"}
    ops.lowrank_perturb_(w, 1, 2, **options)
    want = clones(w)
    for t, s in zip(w, start, strict=True):
        t.copy_(s)
    first = {t.data_ptr() for t in kept if t.dtype == torch.bfloat16}
    capture()
    ops.lowrank_perturb_(w, 1, 2, **options)
    assert_all_same(w, want)
    assert first and len({t.data_ptr() for t in kept if t.dtype == torch.bfloat16}) == 2 * len(first)


@pytest.mark.parametrize("call", [perturb, add_lowrank])
def test_a_refused_capture_leaves_no_flag_behind(capture, monkeypatch, call):
    """It would lie in the memory of a graph that never is: a flag is made at the first call that is not refused."""
    monkeypatch.setattr(guard, "_sticky", {})
    w = weights([(9, 7)])
    before = clones(w)
    capture()
    with pytest.raises(RuntimeError, match="new to a graph capture"):
        call(w, tensor_ids=IDS[:1])
    assert guard._sticky == {}
    assert_all_same(w, before)


# ---- scalars of the host ---------------------------------------------------------------------------------------------


def test_values_of_the_host_are_found_by_their_bits():
    meta = torch.device("meta")
    zero, same, negative = (cache.to_device_cached(meta, torch.tensor([[x]])) for x in (0.0, 0.0, -0.0))
    assert zero is same and zero is not negative
    key, other = (cache.to_device_cached(meta, torch.tensor([x])) for x in (7, 7 + 2**32))
    assert key is cache.to_device_cached(meta, torch.tensor([7])) and key is not other
    assert cache.to_device_cached(meta, torch.zeros(1)) is not cache.to_device_cached(meta, torch.zeros(1).int())


def test_blackwell_is_not_hopper(monkeypatch):
    """Products of warp groups are Hopper's alone; nothing is compiled here for what came after."""
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, name in (((8, 0), "nvidia"), ((9, 0), "hopper"), ((10, 0), "nvidia"), ((12, 0), "nvidia")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
        assert launch.architecture.__wrapped__(torch.device("cuda", 0)) == name


# ---- alignment -----------------------------------------------------------------------------------------------------


def aligned(made: table.Table) -> list[int]:
    return made.pointers.entries[:, ALIGNED.value].tolist()


def rows_of(columns: int, gap: int, dtype=torch.float32, shift: int = 0) -> torch.Tensor:
    """Two rows so far apart in memory, of a buffer that begins aligned (but for a shift)."""
    buffer = torch.zeros(2 * (columns + gap) + 64, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    return buffer[shift : shift + 2 * (columns + gap)].view(2, -1)[:, :columns]


@pytest.mark.parametrize(
    ("tensor", "base", "row_stride", "whole"),
    [
        (rows_of(64, 0), 0, 64, True),
        (rows_of(64, 0), 8192, 64, True),
        (rows_of(64, 0), 8, 64, False),
        (rows_of(64, 0, shift=4), 0, 64, True),
        (rows_of(64, 0, shift=1), 0, 64, False),
        (rows_of(64, 0, torch.bfloat16, shift=4), 0, 64, False),
        (rows_of(64, 0), 0, 4096, True),
        (rows_of(64, 0), 0, 4097, False),
        (rows_of(64, 4), 0, 8192, True),
        (rows_of(64, 1), 0, 8192, False),
        (rows_of(64, 4, torch.float16), 0, 8192, False),
        (rows_of(65, 0)[:1], 0, 65, True),
    ],
)
def test_accesses_without_a_mask_are_aligned(tensor, base, row_stride, whole):
    """A tile is read 16 bytes at a time only where every row, in each tensor, begins at a multiple of 16 bytes."""
    place, plain = [base, row_stride], torch.zeros(tensor.shape, dtype=tensor.dtype)
    assert aligned(table.dense_table([tensor], [tensor], [1], place, False)) == [whole]
    assert aligned(table.dense_table([tensor], [], [1], place, False)) == [whole]
    for lists in ([[plain], [tensor]], [[plain], [plain], [tensor]], [[plain], [plain], [plain], [tensor]]):
        out, source, *others = lists
        assert aligned(table.dense_table(out, source, [1], place, False, *others)) == [whole]


@pytest.mark.parametrize(
    ("tensor", "whole"),
    [
        (rows_of(8, 0), True),
        (rows_of(8, 0, shift=4), True),
        (rows_of(8, 0, shift=1), False),
        (rows_of(8, 4), True),
        (rows_of(8, 3), False),
        (rows_of(8, 4, torch.bfloat16), False),
    ],
)
def test_lowrank_accesses_without_a_mask_are_aligned(own_tables, tensor, whole):
    plain = torch.zeros(tensor.shape, dtype=tensor.dtype)
    for weight, out in ((tensor, plain), (plain, tensor), (tensor, None)):
        factors = [torch.ones(2, 1)], [torch.ones(8, 1)]
        ops.lowrank_perturb_([weight], *factors, coefficient=1.0, out=out if out is None else [out], backend="triton")
        assert aligned(own_tables.entries.popitem()[1]) == [whole]


# ---- autograd and tracing ------------------------------------------------------------------------------------------


def test_autograd_sees_the_write():
    w, x = torch.nn.Parameter(torch.ones(4)), torch.ones(4, requires_grad=True)
    y = (x * w).sum()
    perturb([w])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ([torch.zeros(3, dtype=torch.float64)], TypeError, r"^weights\[0\]: got dtype torch.float64"),
        ([torch.zeros(3, dtype=torch.int32)], TypeError, r"^weights\[0\]: got dtype torch.int32"),
        ([torch.zeros(3), torch.zeros(3).half()], ValueError, r"^weights\[1\]: got torch.float16"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], ValueError, r"^weights\[1\]: got torch.float32 on meta"),
        ([torch.zeros(4, 4).T[:, 1:]], ValueError, r"^weights\[0\]: got shape .* strides"),
    ],
    ids=["float64", "int32", "two dtypes", "two devices", "transposed"],
)
def test_tensors_that_are_refused(tensors, error, match):
    with pytest.raises(error, match=match):
        perturb(tensors)
    assert all((t == 0).all() for t in tensors if t.device.type == "cpu")


def test_a_dtype_below_the_checks():
    """Hooks call the op itself, with whatever the model has become."""
    w = [torch.zeros(3, dtype=torch.float64)]
    scalars = {"keys": torch.tensor([1]), "coefficients": torch.ones(1, 1), "decay": torch.zeros(1, 1)}
    with use_backend("triton"), pytest.raises(TypeError, match=r"^dense_perturb_: got torch\.float64; .*float16"):
        TABLE.dense_perturb_(w, **scalars, stages=[1], tensor_ids=[1])
    assert (w[0] == 0).all()


@pytest.mark.parametrize("rank", [0, 4, 513])
def test_ranks_that_are_refused(rank):
    w = torch.zeros(600, 600) if rank > 512 else torch.zeros(5, 3)
    with pytest.raises(ValueError, match=rf"^rank: got {rank}; accepted: 1 to {512 if rank > 512 else 3}"):
        ops.lowrank_perturb_([w], 1, 2, rank=rank, coefficient=1.0, tensor_ids=[1], backend="triton")
    assert (w == 0).all()
