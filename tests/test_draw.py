"""The noise itself: the reference against the scalar definition, the CPU kernels against the reference."""

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import isa_digests
from support.helpers import assert_same_bits, ops, poison

from pgap_kernels import cpu, noise, reference

TESTS = Path(__file__).parent
VECTORS = json.loads((TESTS / "data" / "noise_v1.json").read_text(encoding="utf-8"))
KEY = noise.derive(20, 3, noise.Role.DENSE, 1)
IDENT = noise.tensor_id("model.layers.0.mlp.up_proj.weight")
DISTRIBUTIONS = ("normal", "rademacher")
SHAPES = [
    (),
    (0,),
    (0, 3),
    (1,),
    (31,),
    (1023,),
    (1024,),
    (1025,),
    (4095,),
    (4096,),
    (4097,),
    (7919,),
    (70001,),
    (67, 129),
    (3, 1024),
    (5, 7, 11),
]
EDGE_KEYS = (0, KEY, 2**64 - 1)
OFFSETS = [0, 5, 1000, 4090, 2**31 - 7, 2**33 + 17, 2**62 + 3]


def scalar_words(index: int, ident: int, key: int) -> tuple[tuple[int, int, int, int], int]:
    """The four words of an element's counter, and the lane that picks one of them."""
    counter, lane = noise.element_counter(index, ident)
    return noise.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32), noise.ROUNDS), lane


def scalar_normal(index: int, ident: int, key: int) -> float:
    """The contract's definition of one element, in float64."""
    words, lane = scalar_words(index, ident, key)
    x_even, x_odd = words[lane & 2], words[lane | 1]  # a pair of lanes makes two normals of a pair of words
    radius = math.sqrt(-2 * math.log((x_even >> 9) * 2.0**-23 + 2.0**-24))
    angle = 2 * math.pi * (x_odd >> 8) * 2.0**-24
    return radius * (math.sin(angle) if lane & 1 else math.cos(angle))


def scalar_sign(index: int, ident: int, key: int) -> float:
    """The contract's definition of one element: a bit of a word, as a word serves 32 elements."""
    words, lane = scalar_words(index >> 5, ident, key)
    return 1.0 if words[lane] >> (index & 31) & 1 else -1.0


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "key"), [*zip([*OFFSETS, 2**63 - 9000], itertools.cycle(EDGE_KEYS), strict=False)])
@pytest.mark.parametrize("ident", [0, IDENT, 2**32 - 1])
def test_reference_is_the_scalar_definition(offset, ident, key):
    count = 8999
    normal = ops.draw(count, key, ident, offset=offset, backend="reference").tolist()
    signs = ops.draw(count, key, ident, offset=offset, distribution="rademacher", backend="reference").tolist()
    # Around the ends of sign words, lanes and groups at offset 0, and of the first lane at offset 5.
    for i in (0, 1, 30, 31, 32, 1018, 1019, 1023, 1024, 2047, 3071, 3072, 4095, 4096, 5000, 8191, 8192, 8998):
        want = scalar_normal(offset + i, ident, key)
        assert abs(normal[i] - want) <= 2e-6 * max(abs(want), 1), i
        assert signs[i] == scalar_sign(offset + i, ident, key), i


def test_stored_transform_vectors():
    words = torch.tensor([[int(x, 16) for x in vector] for vector in VECTORS["transform"]], dtype=torch.int64)
    a, b, even, odd = words.T
    got = reference.box_muller(a, b)
    assert torch.equal(got[0].view(torch.int32).long() & 0xFFFFFFFF, even)
    assert torch.equal(got[1].view(torch.int32).long() & 0xFFFFFFFF, odd)
    cpu_even, cpu_odd = poison([torch.empty(len(a)), torch.empty(len(a))])
    torch.ops.pgap_kernels_cpu.box_muller(a.int(), b.int(), cpu_even, cpu_odd)
    assert_same_bits(cpu_even, got[0])
    assert_same_bits(cpu_odd, got[1])


def test_stored_transform_vectors_against_float64():
    for a, b, even, odd in VECTORS["transform"]:
        radius = math.sqrt(-2 * math.log((int(a, 16) >> 9) * 2.0**-23 + 2.0**-24))
        angle = 2 * math.pi * (int(b, 16) >> 8) * 2.0**-24
        got = np.array([int(even, 16), int(odd, 16)], dtype=np.uint32).view(np.float32).tolist()
        for z, want in zip(got, (radius * math.cos(angle), radius * math.sin(angle)), strict=True):
            assert abs(z - want) <= 2e-6 * max(abs(want), 1), (a, b)


@pytest.mark.parametrize("seed", range(4))
def test_transform_error_sweep(seed):
    """|z - float64| <= 2e-6 max(|z|, 1), over 2^19 consecutive ones of the 2^23 radii, and as many random ones."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(2**32, (1 << 20,), generator=generator)
    b = torch.randint(2**32, (1 << 20,), generator=generator)
    a[: 1 << 19] = (torch.arange(1 << 19) + (seed << 21 if seed < 3 else (1 << 23) - (1 << 19))) << 9
    even, odd = poison([torch.empty(len(a)), torch.empty(len(a))])
    torch.ops.pgap_kernels_cpu.box_muller(a.int(), b.int(), even, odd)
    radius = (-2 * ((a >> 9).double() * 2.0**-23 + 2.0**-24).log()).sqrt()
    angle = 2 * math.pi * (b >> 8).double() * 2.0**-24
    for z, want in ((even, radius * angle.cos()), (odd, radius * angle.sin())):
        assert ((z.double() - want).abs() / want.abs().clamp(min=1)).max() <= 2e-6
        assert z.abs().max() < 5.7682  # the largest radius, sqrt(-2 log 2^-24)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("vector", VECTORS["tensors"], ids=lambda v: v["distribution"])
def test_stored_tensors(vector, backend):
    drawn = ops.draw(
        vector["shape"],
        int(vector["key"], 16),
        vector["tensor_id"],
        distribution=vector["distribution"],
        offset=vector["offset"],
        backend=backend,
    )
    values = drawn.numpy().astype("<f4")
    assert [f"{x:08x}" for x in values.reshape(-1)[:16].view(np.uint32).tolist()] == vector["first"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == vector["sha256"]


# ---- cpu = reference -----------------------------------------------------------------------------------------------


@functools.cache
def reference_draw(distribution, offset):
    """Draws start with the same elements whatever their length, so one long draw serves all shapes."""
    return ops.draw(70001, KEY, IDENT, distribution=distribution, offset=offset, backend="reference")


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cpu_draws_the_reference(distribution, offset):
    for shape in SHAPES:
        drawn = ops.draw(shape, KEY, IDENT, distribution=distribution, offset=offset, backend="cpu")
        assert drawn.shape == shape and drawn.is_contiguous() and drawn.dtype == torch.float32
        assert_same_bits(drawn.flatten(), reference_draw(distribution, offset)[: drawn.numel()])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_reference_shapes(distribution):
    for shape in SHAPES:
        drawn = ops.draw(shape, KEY, IDENT, distribution=distribution, offset=5, backend="reference")
        assert drawn.shape == shape
        assert_same_bits(drawn.flatten(), reference_draw(distribution, 5)[: drawn.numel()])


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_last_indices(distribution, count, backend):
    """offset + numel may be 2**63 - 1 at most; one more is refused."""
    start = 2**63 - 1 - count
    drawn = ops.draw(count, KEY, IDENT, distribution=distribution, offset=start, backend=backend)
    scalar = scalar_sign if distribution == "rademacher" else scalar_normal
    for i in (0, count // 2, count - 1):
        want = scalar(start + i, IDENT, KEY)
        assert abs(drawn[i].item() - want) <= 2e-6 * max(abs(want), 1)
    with pytest.raises(ValueError, match=r"^offset"):
        ops.draw(count, KEY, IDENT, distribution=distribution, offset=start + 1, backend=backend)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    offset=st.one_of(st.integers(0, 10_000), st.integers(0, 2**63 - 70_000)),
    key=st.integers(0, 2**64 - 1),
    ident=st.integers(0, 2**32 - 1),
    distribution=st.sampled_from(DISTRIBUTIONS),
)
def test_cpu_draws_the_reference_anywhere(shape, offset, key, ident, distribution):
    got, want = (
        ops.draw(shape, key, ident, distribution=distribution, offset=offset, backend=b) for b in ("cpu", "reference")
    )
    assert_same_bits(got, want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tensor_keys_are_bit_patterns(backend):
    """A key in an int64 tensor is the unsigned key with the same bits."""
    for key in (0, 5, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        pattern = torch.tensor(key - (1 << 64) if key >> 63 else key)
        assert_same_bits(ops.draw(99, pattern, IDENT, backend=backend), ops.draw(99, key, IDENT, backend=backend))
        assert_same_bits(ops.draw(99, pattern.view(1), 1, backend=backend), ops.draw(99, key, 1, backend=backend))


def test_keys_and_ids_move_the_stream():
    streams = [ops.draw(64, key, ident) for key in (0, 1, 1 << 32, 1 << 63) for ident in (0, 1, 1 << 31)]
    assert len({tuple(s.tolist()) for s in streams}) == len(streams)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(deadline=None, max_examples=25)
@given(start=st.sampled_from(OFFSETS), cuts=st.lists(st.integers(0, 9000), max_size=5))
def test_pieces_concatenate_to_the_whole(distribution, backend, start, cuts):
    edges = sorted({0, 9000, *cuts})
    pieces = [
        ops.draw(end - begin, KEY, IDENT, distribution=distribution, offset=start + begin, backend=backend)
        for begin, end in itertools.pairwise(edges)
    ]
    assert_same_bits(torch.cat(pieces), reference_draw(distribution, start)[:9000])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"offset": -1}, ValueError, "offset"),
        ({"offset": 1 << 63}, ValueError, "offset"),
        ({"offset": 1.0}, TypeError, "offset"),
        ({"offset": 2**63 - 9}, ValueError, "offset"),
        ({"key": -1}, ValueError, "key"),
        ({"key": 1 << 64}, ValueError, "key"),
        ({"key": 1.5}, TypeError, "key"),
        ({"key": torch.tensor(1, dtype=torch.int32)}, TypeError, "key"),
        ({"tensor_id": -1}, ValueError, "tensor_id"),
        ({"tensor_id": 1 << 32}, ValueError, "tensor_id"),
        ({"distribution": "uniform"}, ValueError, "distribution.*'normal', 'rademacher'"),
        ({"shape": "2"}, TypeError, "^shape: got '2'"),
        ({"shape": (-2, 2)}, ValueError, r"^shape\[0\]: got -2"),
        ({"device": "gpu"}, ValueError, "^device: got 'gpu'"),
    ],
)
def test_draw_refuses(change, error, match):
    arguments = {"shape": 10, "key": 1, "tensor_id": 2, **change}
    with pytest.raises(error, match=match):
        ops.draw(**arguments)


# ---- instruction sets ----------------------------------------------------------------------------------------------

ARM = platform.machine().lower() in ("aarch64", "arm64")
X86 = ("generic", "avx2", "avx512", "avx512_bf16")  # each includes those before it
ISAS = ("generic", "neon") if ARM else X86


@functools.cache
def run_isa(isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PGAP_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.isa_digests"]
    return subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=300)


def isa_result(isa: str) -> dict:
    done = run_isa(isa)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.pop("isa") == isa
    return result


# By default only the best one of this CPU; the older ones are marked slow.
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[] if isa == cpu.isa()[1] else pytest.mark.slow) for isa in ISAS[1:]]
)
def test_instruction_sets_agree(isa):
    best = cpu.isa()[1]
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this CPU runs {best} at best")
    assert isa_result(isa) == isa_result("generic")


def test_instruction_sets_give_the_reference():
    result = isa_result("generic")
    want = {**isa_digests.draw_digests("reference"), **isa_digests.dense_digests("reference")}
    assert len(want) == 6 + 27  # draws, dense passes: none was left out
    assert {name: result[name] for name in want} == want


def test_unknown_isa_is_an_error():
    environment = {**os.environ, "PGAP_ISA": "sse9"}
    command = [sys.executable, "-c", "import pgap_kernels.ops"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"PGAP_ISA: got 'sse9'; accepted: {', '.join(reversed(ISAS))}" in done.stderr
