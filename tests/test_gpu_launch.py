"""On a GPU: device guard, CUDA graphs, no waiting, scalars that are not finite, versions, compile, optimizers."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from support import gpu, gpu_calls
from support.gpu import moved
from support.gpu_calls import IDS, WRITING, Call
from support.helpers import assert_same_bits, clones, weights
from support.methods import SMALL_PGAP
from support.models import INPUTS, LABELS, classifier
from torch.func import functional_call

from pgap_kernels import backends, ops
from pgap_kernels.optim import PGAP, MeZO

pytestmark = gpu.marks

TABLE = torch.ops.pgap_kernels


def assert_all_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g.cpu(), w.cpu())


def restore(call: Call, start) -> None:
    for t, s in zip(call.written, start, strict=True):
        t.copy_(s)


def changed(call: Call, start) -> bool:
    return any(not torch.equal(t, s) for t, s in zip(call.written, start, strict=True))


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITING)
def test_launches_go_to_the_tensors_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    other = torch.device("cuda", 1)
    with torch.cuda.device(gpu.DEVICE):
        here, there = WRITING[name](gpu.DEVICE), WRITING[name](other)
        there.make()
        assert torch.cuda.current_device() == gpu.DEVICE.index
        here.make()
    assert_all_same(there.written, here.written)


def test_lists_on_two_devices_are_refused():
    w = weights([(5, 7), (9,)])
    devices = [torch.device("cpu")] + [torch.device("cuda", 1)] * (torch.cuda.device_count() > 1)
    for other in devices:
        mixed = [w[0].to(gpu.DEVICE), w[1].to(other)]
        before = clones(mixed)
        for call in (ops.dense_perturb_, ops.masked_perturb_):
            options = {} if call is ops.dense_perturb_ else {"threshold": 1.0}
            with pytest.raises(
                ValueError, match=rf"^weights\[1\]: got torch.float32 on {other}; accepted: .* on cuda:0"
            ):
                call(mixed, [(1, 0.1)], tensor_ids=IDS[:2], **options)
        with pytest.raises(ValueError, match=r"^anchors: got"):
            ops.anchor_affine_(mixed[:1], [w[0]], 0.5)
        with pytest.raises(ValueError, match=r"^left: got"):
            ops.lowrank_perturb_(mixed[:1], [torch.ones(5, 1)], 2, coefficient=1.0, tensor_ids=IDS[:1])
        assert_all_same(mixed, before)


# ---- no waiting ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_waiting_would_be_seen():
    x = torch.ones(1, device=gpu.DEVICE)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()


@pytest.mark.parametrize("name", WRITING)
def test_a_call_does_not_wait_for_the_device(name):
    call = WRITING[name](gpu.DEVICE)
    start = clones(call.written)
    call.make()  # compiles, and copies its table to the device
    want = clones(call.written)
    restore(call, start)
    with waiting_is_an_error():
        call.make()
    assert_all_same(call.written, want)


def test_sums_do_not_wait_for_the_device():
    values, (key,) = moved(weights([(37, 129), (5000,)])), moved([torch.tensor([5])])

    def sums():
        return ops.seeded_dot(values, key, tensor_ids=IDS[:2]), ops.squared_norms(values)

    want = sums()
    with waiting_is_an_error():
        got = sums()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ---- graphs ----------------------------------------------------------------------------------------------------------


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of the call, after one call on the same stream: what a stream's launches share is that stream's."""
    stream = torch.cuda.Stream(gpu.DEVICE)
    stream.wait_stream(torch.cuda.current_stream(gpu.DEVICE))
    with torch.cuda.stream(stream):
        call.make()
    torch.cuda.synchronize(gpu.DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.make()
    return graph


@pytest.mark.parametrize("name", WRITING)
def test_replay_reads_scalars_and_keys_anew(name):
    call = WRITING[name](gpu.DEVICE)
    start = clones(call.written)
    graph = captured(call)
    results = []
    for _ in range(3):
        restore(call, start)
        graph.replay()
        results.append(clones(call.written))
        restore(call, start)
        call.make()
        assert_all_same(results[-1], call.written)
        for scalar in call.scalars:
            scalar.mul_(0.75)
        for key in call.keys:
            key.add_(1)
    for one, other in ((0, 1), (1, 2)):
        assert any(not torch.equal(a, b) for a, b in zip(results[one], results[other], strict=True))


def test_replay_skips_what_is_not_finite():
    call = gpu_calls.dense(gpu.DEVICE)
    graph = captured(call)
    start = clones(call.written)
    call.scalars[0].fill_(math.nan)
    graph.replay()
    assert_all_same(call.written, start)
    with pytest.raises(FloatingPointError):
        ops.raise_if_skipped(gpu.DEVICE)
    call.scalars[0].fill_(0.5)
    graph.replay()
    assert changed(call, start)
    ops.raise_if_skipped(gpu.DEVICE)


def test_a_new_list_is_refused_while_capturing():
    w = moved(weights([(37, 129), (5000,)]))
    before = clones(w)
    (key,), (a,) = moved([torch.tensor([5])]), moved([torch.tensor([0.3])])
    ids = [0xC0FFEE, 0xBEEF]  # of no other test: memory is used again, and a table goes by addresses and ids
    torch.cuda.synchronize(gpu.DEVICE)
    message = r"pgap_kernels: .* new to a graph capture"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.dense_perturb_(w, [(key, a)], tensor_ids=ids)
    assert_all_same(w, before)
    ops.dense_perturb_(w, [(key, a)], tensor_ids=ids)
    assert not torch.equal(w[0], before[0])


# ---- scalars that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITING)
def test_a_scalar_that_is_not_finite_writes_nothing_and_is_reported_once(name):
    call = WRITING[name](gpu.DEVICE)
    start = clones(call.written)
    ops.raise_if_skipped(gpu.DEVICE)
    for scalar, bad in zip(call.scalars, itertools.cycle([math.nan, math.inf, -math.inf]), strict=False):
        good = scalar.clone()
        scalar[-1] = bad
        call.make()
        assert_all_same(call.written, start)
        with pytest.raises(FloatingPointError, match="wrote nothing"):
            ops.raise_if_skipped(gpu.DEVICE)
        ops.raise_if_skipped(gpu.DEVICE)
        scalar.copy_(good)
    call.make()
    assert changed(call, start)
    ops.raise_if_skipped(gpu.DEVICE)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITING)
def test_version_counters(name):
    call = WRITING[name](gpu.DEVICE)
    others = [*call.scalars, *call.keys]
    before, before_others = [t._version for t in call.written], [t._version for t in others]
    call.make()
    assert all(t._version > b for t, b in zip(call.written, before, strict=True))
    assert [t._version for t in others] == before_others


def test_autograd_sees_the_write():
    w = torch.nn.Parameter(torch.ones(4, device=gpu.DEVICE))
    x = torch.ones(4, device=gpu.DEVICE, requires_grad=True)
    y = (x * w).sum()
    ops.dense_perturb_([w], [(1, 0.1)], tensor_ids=IDS[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_ops_are_the_eager_ones(dtype, compiler):
    w = moved(weights([(5, 7), (9,)], dtype))
    left = moved(weights([(5, 2)], seed=1))
    keys = torch.tensor([3, -4])
    rounding = torch.tensor([5]) if dtype != torch.float32 else None
    dense = {
        "keys": keys,
        "coefficients": torch.tensor([[0.5], [-0.25]]),
        "decay": torch.tensor([[0.1]]),
        "rounding_keys": rounding,
        "stages": [2],
        "tensor_ids": [1, 2],
        "slices": [0, 7, 0, 9],
    }
    row = torch.tensor([0.5])
    lowrank = {
        **{"left": left, "right": [], "core": [], "core_kind": "regenerated", "below": [], "rank": 2},
        **{"keys": torch.tensor([0, 5, 6]), "coefficient": row, "decay": row, "tensor_ids": [1], "slices": [0, 7]},
    }

    def step(w):
        TABLE.dense_perturb_(w, **dense)
        TABLE.lowrank_perturb_(w[:1], **lowrank)
        return w[0].float() * 2

    want, got = clones(w), clones(w)
    expected = step(want)
    result = torch.compile(step, backend=compiler, fullgraph=True)(got)
    assert torch.equal(result, expected)
    assert_all_same(got, want)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def trained(method, device: torch.device, dtype, steps: int, **options):
    """Losses and weights of a run whose losses are computed in float64 on the CPU, whatever the device."""
    model, skeleton = classifier().to(device, dtype), classifier().double()
    # In place: the closure reads the weights, and never calls the model.
    optimizer = method(model, **{"lr": 0.05, "eps": 1e-2, "seed": 11, "mode": "inplace", **options})

    def loss():
        state = {name: p.detach().cpu().double() for name, p in model.named_parameters()}
        return torch.nn.functional.cross_entropy(functional_call(skeleton, state, (INPUTS.double(),)), LABELS)

    losses = [optimizer.step(loss) for _ in range(steps)]
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mezo_on_the_gpu_is_mezo_on_the_cpu(dtype):
    """Kernels have the same bits and losses are the same function, so whole runs are the same."""
    options = {"probes": 2, "weight_decay": 0.01}
    losses, there = trained(MeZO, gpu.DEVICE, dtype, 5, **options)
    want, here = trained(MeZO, torch.device("cpu"), dtype, 5, **options)
    assert losses == want and all(map(math.isfinite, losses))
    assert_all_same(there, here)
    assert any(not torch.equal(a, b.detach().to(dtype)) for a, b in zip(there, classifier().parameters(), strict=True))


def test_pgap_learns():
    """Subspaces come from another library's SVD there, so runs differ in their bits but not in what they do."""
    for device in (gpu.DEVICE, torch.device("cpu")):
        losses, there = trained(PGAP, device, torch.float32, 60, **SMALL_PGAP)
        assert all(map(math.isfinite, losses)) and all(t.isfinite().all() for t in there)
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("method", [MeZO, PGAP])
def test_an_exception_in_the_closure_restores_the_weights(method):
    model = classifier().to(gpu.DEVICE)
    options = SMALL_PGAP if method is PGAP else {}
    optimizer = method(model, lr=0.05, eps=1e-3, seed=11, **options)
    calls = []

    def loss():
        calls.append(None)
        if len(calls) == 8:
            raise KeyError("deliberate")
        return torch.nn.functional.cross_entropy(model(INPUTS.to(gpu.DEVICE)), LABELS.to(gpu.DEVICE))

    before = []
    with pytest.raises(KeyError, match="deliberate"):
        for _ in range(8):
            before = clones([p.detach() for p in model.parameters()])
            optimizer.step(loss)
    for p, b in zip(model.parameters(), before, strict=True):
        # A step of eps = 1e-3 along noise would move them by some 1e-3; roundings by some 1e-6.
        assert (p.detach() - b).abs().max() <= 1e-5


@pytest.mark.parametrize("op", backends.OPS)
def test_no_backend_has_to_be_named(op, monkeypatch):
    monkeypatch.delenv("PGAP_BACKEND", raising=False)
    assert backends.select(op, gpu.DEVICE, torch.float32).name == "triton"
