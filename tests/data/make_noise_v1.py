"""Writes noise_v1.json: stored vectors of noise contract 1, from the plain-PyTorch reference.

Run once per contract version, `python tests/data/make_noise_v1.py`; a changed file means a changed contract.
"""

import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import torch

from pgap_kernels import noise, ops, reference

SEEDS = (0, 1, 42, 0xFFFFFFFF, 1 << 32, 0x0123456789ABCDEF, 2**64 - 1)
STEPS = (0, 1, 2**32 - 1, 2**32, 2**64 - 1)
PROBES = (0, 1, 255, 256, 2**24 - 1)
NAMES = (
    "",
    "weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "module.model.layers.0.self_attn.q_proj.weight",
    "_orig_mod.module._fsdp_wrapped_module.model.layers.11.mlp._checkpoint_wrapped_module.down_proj.weight",
    "módulo.вес.重み",
)


def derive_vectors() -> list[list]:
    vectors = []
    for i, (seed, step) in enumerate((seed, step) for seed in SEEDS for step in STEPS):
        for j, role in enumerate(noise.Role):
            probe = PROBES[(i + j) % len(PROBES)]
            counter = (step & 0xFFFFFFFF, step >> 32, role | probe << 8, 0x50474150)
            x0, x1, _, _ = noise.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32), 10)
            key = noise.derive(seed, step, role, probe)
            assert key == x0 | x1 << 32
            vectors.append([hex(seed), hex(step), int(role), probe, hex(key)])
    return vectors


def word_pairs() -> list[tuple[int, int]]:
    radii = [0, 1, 0x1FF, 0x200, 0x7FFFFFFF, 0x80000000, 0xB504F3FF, 0xB5050000, 0xFFFFFDFF, 0xFFFFFE00, 0xFFFFFFFF]
    radii += [(1 << k) + d for k in range(9, 32, 4) for d in (-1, 0)]  # where u crosses a power of two
    octants = [k << 29 for k in range(8)]
    angles = sorted({(o + d) & 0xFFFFFFFF for o in octants for d in (-256, -1, 0, 1, 255, 256)})
    pairs = [(r, angles[i * 7 % len(angles)]) for i, r in enumerate(radii)]
    pairs += [(radii[i * 5 % len(radii)], angle) for i, angle in enumerate(angles)]
    generator = random.Random(20251118)
    return pairs + [(generator.getrandbits(32), generator.getrandbits(32)) for _ in range(200)]


def transform_vectors() -> list[list[str]]:
    pairs = word_pairs()
    a, b = torch.tensor(pairs, dtype=torch.int64).T
    even, odd = reference.box_muller(a, b)
    for (x, y), *z in zip(pairs, even.tolist(), odd.tolist(), strict=True):
        radius = math.sqrt(-2 * math.log((x >> 9) * 2.0**-23 + 2.0**-24))
        angle = 2 * math.pi * (y >> 8) * 2.0**-24
        for got, want in zip(z, (radius * math.cos(angle), radius * math.sin(angle)), strict=True):
            assert abs(got - want) <= 2e-6 * max(abs(want), 1), (hex(x), hex(y), got, want)
    return [
        [f"{x:08x}", f"{y:08x}", f"{e & 0xFFFFFFFF:08x}", f"{o & 0xFFFFFFFF:08x}"]
        for (x, y), e, o in zip(pairs, even.view(torch.int32).tolist(), odd.view(torch.int32).tolist(), strict=True)
    ]


def tensor_vector(distribution: str) -> dict:
    shape, offset, key, ident = (67, 129), 1000, noise.derive(7, 3, noise.Role.DENSE, 5), noise.tensor_id("vectors")
    drawn = ops.draw(shape, key, ident, distribution=distribution, offset=offset, backend="reference")
    values = drawn.numpy().astype("<f4")
    check_words(drawn.flatten(), offset, key, ident, distribution)
    return {
        "distribution": distribution,
        "shape": shape,
        "offset": offset,
        "key": hex(key),
        "tensor_id": ident,
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "first": [f"{bits:08x}" for bits in values.reshape(-1)[:16].view(np.uint32).tolist()],
    }


def check_words(drawn: torch.Tensor, offset: int, key: int, ident: int, distribution: str) -> None:
    """The integers under the tensor, again by the scalar Philox."""
    count, halves = len(drawn), (key & 0xFFFFFFFF, key >> 32)
    if distribution == "normal":
        expected = []
        for e in range(offset, offset + count):
            counter, lane = noise.element_counter(e, ident)
            expected.append(noise.philox4x32(counter, halves, 7)[lane])
        assert reference.words(offset, count, ident, key, drawn.device).tolist() == expected
    else:
        for i in range(count):
            counter, lane = noise.element_counter((offset + i) >> 5, ident)
            bit = noise.philox4x32(counter, halves, 7)[lane] >> ((offset + i) & 31) & 1
            assert drawn[i] == 2 * bit - 1


if __name__ == "__main__":
    vectors = {
        "contract": noise.CONTRACT_VERSION,
        "derive": derive_vectors(),
        "tensor_id": [[name, noise.tensor_id(name)] for name in NAMES],
        "transform": transform_vectors(),
        "tensors": [tensor_vector("normal"), tensor_vector("rademacher")],
    }
    lists = {k: "[\n" + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in vectors.items() if isinstance(v, list)}
    body = ",\n".join(f'"{k}": {lists.get(k, json.dumps(v))}' for k, v in vectors.items())
    Path(__file__).with_name("noise_v1.json").write_text(f"{{\n{body}\n}}\n", encoding="utf-8")
