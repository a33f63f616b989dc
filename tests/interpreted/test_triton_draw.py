"""The noise functions of the Triton kernels: known answers, stored vectors, the scalar definition, the reference."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.cases import DISTRIBUTIONS
from support.helpers import assert_same_bits, ops, poison

from pgap_kernels import noise, reference
from pgap_kernels.triton.noise import box_muller, element_normal, element_word, philox7

DATA = Path(__file__).parents[1] / "data"
VECTORS = json.loads((DATA / "noise_v1.json").read_text(encoding="utf-8"))
KEY = noise.derive(20, 3, noise.Role.DENSE, 1)
IDENT = noise.tensor_id("model.layers.0.mlp.up_proj.weight")
# Within a group, across groups, in a far one; where the low word of the counter overflows (2**34); 32 and 44 bits.
OFFSETS = [0, 5, 4090, 2**31 - 7, 2**33 + 17, 2**34 - 3, 2**44 + 1021, 2**62 + 3]


def signed(word: int, bits: int = 32) -> int:
    return word - (word >> (bits - 1) << bits)


def int32(words) -> torch.Tensor:
    return torch.tensor([signed(w) for w in words], dtype=torch.int32)


def unsigned(words: torch.Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in words.tolist()]


# ---- words ---------------------------------------------------------------------------------------------------------


@triton.jit
def philox_kernel(out_ptr, c0_ptr, c1_ptr, c2_ptr, k0_ptr, k1_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1 = tl.load(c0_ptr + i).to(tl.uint32), tl.load(c1_ptr + i).to(tl.uint32)
    c2 = tl.load(c2_ptr + i).to(tl.uint32)
    x0, x1, x2, x3 = philox7(c0, c1, c2, tl.load(k0_ptr + i).to(tl.uint32), tl.load(k1_ptr + i).to(tl.uint32))
    tl.store(out_ptr + i, x0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + N + i, x1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * N + i, x2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * N + i, x3.to(tl.int32, bitcast=True))


def test_philox():
    """The known answer whose last counter word is 0, as the contract has it; others by the scalar form, which
    test_noise holds to all known answers."""
    answers = [line.split() for line in (DATA / "philox4x32_kat.txt").read_text().splitlines() if line[0] == "7"]
    (known,) = [[int(word, 16) for word in words] for _, *words in answers if int(words[3], 16) == 0]
    extremes, generator = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF), random.Random(3)
    inputs = [(*known[:3], *known[4:6])]
    inputs += [tuple(generator.choice(extremes) for _ in range(5)) for _ in range(127)]
    inputs += [tuple(generator.getrandbits(32) for _ in range(5)) for _ in range(128)]
    out = torch.zeros(4, len(inputs), dtype=torch.int32)
    philox_kernel[(1,)](out, *(int32(column) for column in zip(*inputs, strict=True)), N=len(inputs))
    got = list(zip(*map(unsigned, out), strict=True))
    assert got[0] == tuple(known[6:])
    assert got == [noise.philox4x32((*words[:3], 0), words[3:], noise.ROUNDS) for words in inputs]


@triton.jit
def element_kernel(z_ptr, word_ptr, e_ptr, key_ptr, ID: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    e, key = tl.load(e_ptr + i), tl.load(key_ptr)
    tensor_id = tl.full((), ID, tl.uint32)
    tl.store(z_ptr + i, element_normal(e, tensor_id, key))
    tl.store(word_ptr + i, element_word(e, tensor_id, key).to(tl.int32, bitcast=True))


@pytest.mark.parametrize(("key", "ident"), [(KEY, IDENT), (2**64 - 1, 2**32 - 1), (1 << 63, 0)])
def test_single_elements(key, ident):
    """Words by the scalar form of the contract, normals by the reference, lanes and groups and 63 bits through."""
    generator = random.Random(7)
    elements = [generator.getrandbits(generator.randrange(1, 64)) for _ in range(246)]
    elements += [0, 1023, 1024, 2048, 3072, 4095, 4096, 2**34 - 1, 2**34, 2**63 - 1]
    z, words = torch.full((256,), float("nan")), torch.zeros(256, dtype=torch.int32)
    e, keys = torch.tensor(elements), torch.tensor([signed(key, 64)])
    element_kernel[(1,)](z, words, e, keys, ID=ident, N=256)
    want_words, want = [], []
    for element in elements:
        counter, lane = noise.element_counter(element, ident)
        outputs = noise.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32), noise.ROUNDS)
        want_words.append(outputs[lane])
        pair = torch.tensor(outputs[lane & 2 : (lane & 2) + 2])[:, None]
        want.append(reference.box_muller(*pair)[lane & 1])
    assert unsigned(words) == want_words
    assert_same_bits(z, torch.cat(want))


# ---- normals -------------------------------------------------------------------------------------------------------


@triton.jit
def transform_kernel(even_ptr, odd_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    even, odd = box_muller(tl.load(a_ptr + i).to(tl.uint32), tl.load(b_ptr + i).to(tl.uint32))
    tl.store(even_ptr + i, even)
    tl.store(odd_ptr + i, odd)


def test_stored_transform_vectors():
    words = [[int(x, 16) for x in vector] for vector in VECTORS["transform"]]
    size = 1 << (len(words) - 1).bit_length()
    a, b, even, odd = (int32(column) for column in zip(*(words + words[: size - len(words)]), strict=True))
    got = poison([torch.empty(size), torch.empty(size)])
    transform_kernel[(1,)](*got, a, b, N=size)
    assert_same_bits(got[0], even.view(torch.float32))
    assert_same_bits(got[1], odd.view(torch.float32))


def test_random_transforms():
    """2**16 word pairs, with the smallest and largest radii and angles."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(2**32, (1 << 16,), generator=generator) for _ in range(2))
    a[:2048] = torch.cat([torch.arange(1024), 2**32 - 1024 + torch.arange(1024)]) << 9 & 0xFFFFFFFF
    b[1024:3072] = torch.cat([torch.arange(1024), 2**32 - 1024 + torch.arange(1024)])
    got = poison([torch.empty(1 << 16), torch.empty(1 << 16)])
    transform_kernel[(1,)](*got, a.int(), b.int(), N=1 << 16)
    for z, want in zip(got, reference.box_muller(a, b), strict=True):
        assert_same_bits(z, want)


# ---- draw ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["tensors"], ids=lambda v: v["distribution"])
def test_stored_tensors(vector):
    options = {name: vector[name] for name in ("distribution", "offset")}
    drawn = ops.draw(vector["shape"], int(vector["key"], 16), vector["tensor_id"], backend="triton", **options)
    values = drawn.numpy().astype("<f4")
    assert [f"{x:08x}" for x in values.reshape(-1)[:16].view(np.uint32).tolist()] == vector["first"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_are_the_references(distribution, offset):
    """From a group to the one after the next, wherever in a group it begins."""
    got, want = (
        ops.draw((1, 4099), KEY, IDENT, distribution=distribution, offset=offset, backend=b)
        for b in ("triton", "reference")
    )
    assert_same_bits(got, want)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1023,), (5, 7, 11), (3, 1024)], ids=str)
def test_shapes(shape):
    got, want = (ops.draw(shape, KEY, IDENT, offset=1000, backend=b) for b in ("triton", "reference"))
    assert got.shape == shape and got.dtype == torch.float32
    assert_same_bits(got, want)


@pytest.mark.parametrize("count", [1, 8191])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_last_indices(distribution, count):
    """Up to the element before the last, 2**63 - 1: with 8191 the group is aligned, and one short of whole."""
    start, backing = 2**63 - 1 - count, torch.full((count + 9,), float("nan"))
    options = {"tensor_ids": [IDENT], "distribution": distribution, "slices": [(start, 2**63 - 1)]}
    ops.assemble_gradient_([backing[:count]], [(KEY, 1.0)], backend="triton", **options)
    want = ops.draw(count, KEY, IDENT, distribution=distribution, offset=start, backend="reference")
    assert_same_bits(backing[:count], want)
    assert backing[count:].isnan().all()


def test_keys_are_bit_patterns():
    for key in (0, 2**63 - 1, 2**63, 2**64 - 1):
        drawn = ops.draw(99, torch.tensor(signed(key, 64)), IDENT, backend="triton")
        assert_same_bits(drawn, ops.draw(99, key, IDENT, backend="reference"))
