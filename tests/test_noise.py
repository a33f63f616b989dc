"""The integers of the noise contract: Philox, keys, tensor ids, counters."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgap_kernels import noise

DATA = Path(__file__).parent / "data"
VECTORS = json.loads((DATA / "noise_v1.json").read_text(encoding="utf-8"))
KNOWN_ANSWERS = [
    line for line in (DATA / "philox4x32_kat.txt").read_text().splitlines() if line and not line.startswith("#")
]


def test_contract_version():
    assert noise.CONTRACT_VERSION == 1 == VECTORS["contract"]
    assert (noise.ROUNDS, noise.KEY_ROUNDS) == (7, 10)


def test_known_answers_hold_both_round_counts():
    assert [line.split()[0] for line in KNOWN_ANSWERS].count("7") == 3
    assert [line.split()[0] for line in KNOWN_ANSWERS].count("10") == 3


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_philox_known_answers(line):
    rounds, *words = line.split()
    words = [int(word, 16) for word in words]
    assert noise.philox4x32(tuple(words[:4]), tuple(words[4:6]), int(rounds)) == tuple(words[6:])


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "name"),
    [
        ((0, 0, 0), (0, 0), 7, "counter"),
        ((0, 0, 0, 0), (0,), 7, "key"),
        ((0, 0, 0, 0), (0, 0), 0, "rounds"),
        ((0, 0, 0, 1 << 32), (0, 0), 7, "counter"),
        ((0, -1, 0, 0), (0, 0), 7, "counter"),
        ((0, 0, 0, 0), (0, 1 << 32), 7, "key"),
    ],
)
def test_philox_refuses(counter, key, rounds, name):
    with pytest.raises(ValueError, match=name):
        noise.philox4x32(counter, key, rounds)


def test_roles():
    assert {role.name: int(role) for role in noise.Role} == {
        "DENSE": 0,
        "LEFT": 1,
        "RIGHT": 2,
        "CORE": 3,
        "SIGN": 4,
        "MASK": 5,
        "PROBE": 6,
        "ROUNDING": 7,
        "DATA": 8,
        "RANGE_FINDER": 9,
        "DIAGONAL_CORE": 10,
    }


def test_derive_vectors():
    covered = {int(role) for _, _, role, _, _ in VECTORS["derive"]}
    assert covered == set(noise.Role)
    for seed, step, role, probe, key in VECTORS["derive"]:
        assert noise.derive(int(seed, 16), int(step, 16), role, probe) == int(key, 16), (seed, step, role, probe)


def test_derived_keys_differ():
    arguments = itertools.product((0, 1, 1 << 32, 2**64 - 1), (0, 1, 1 << 32, 2**64 - 1), noise.Role, (0, 1, 2**24 - 1))
    keys = [noise.derive(*a) for a in arguments]
    assert len(set(keys)) == len(keys)
    assert noise.derive(5, 6, 7) == noise.derive(5, 6, 7, 0)
    assert noise.derive(*map(np.int32, (5, 6, 7, 2**23))) == noise.derive(5, 6, 7, 2**23)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("seed", -1, ValueError),
        ("seed", 1 << 64, ValueError),
        ("seed", 1.0, TypeError),
        ("seed", True, TypeError),
        ("seed", None, TypeError),
        ("step", -1, ValueError),
        ("step", 1 << 64, ValueError),
        ("step", 0.0, TypeError),
        ("step", False, TypeError),
        ("role", -1, ValueError),
        ("role", 256, ValueError),
        ("role", "0", TypeError),
        ("probe", -1, ValueError),
        ("probe", 1 << 24, ValueError),
        ("probe", 2.5, TypeError),
        ("probe", True, TypeError),
    ],
)
def test_derive_refuses(name, value, error):
    arguments = {"seed": 0, "step": 0, "role": 0, "probe": 0, name: value}
    with pytest.raises(error, match=f"^{name}: got .*accepted: an integer in"):
        noise.derive(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("", 0x811C9DC5), ("a", 0xE40C292C), ("b", 0xE70C2DE5), ("foobar", 0xBF9CF968)],
)
def test_tensor_id_is_fnv_1a(name, value):
    """Vectors of the FNV authors."""
    assert noise.tensor_id(name) == value


def test_tensor_id_vectors():
    for name, value in VECTORS["tensor_id"]:
        assert noise.tensor_id(name) == value, name
    ids = dict(VECTORS["tensor_id"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert ids[name] == ids["module." + name]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("module.layers.0.weight", "layers.0.weight"),
        ("module.module.weight", "module.weight"),
        ("layers.module.weight", "layers.module.weight"),
        ("_orig_mod.weight", "weight"),
        ("layers._orig_mod.0._orig_mod.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module.layers._fsdp_wrapped_module.weight", "layers.weight"),
        ("layers._checkpoint_wrapped_module.weight", "layers.weight"),
        ("_orig_mod.module._fsdp_wrapped_module.weight", "weight"),
        ("module._orig_mod.module.weight", "module.weight"),
        ("x_orig_mod.weight", "x_orig_mod.weight"),
        ("_orig_mod2.weight", "_orig_mod2.weight"),
        ("my_fsdp_wrapped_module.weight", "my_fsdp_wrapped_module.weight"),
        ("modules.weight", "modules.weight"),
        ("module", "module"),
        ("", ""),
    ],
)
def test_canonical_name(name, canonical):
    assert noise.canonical_name(name) == canonical


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1))
def test_element_counter_inverts(index, ident):
    """Counter and lane give the index back, so no two elements share a word."""
    (low, high, middle, top), lane = noise.element_counter(index, ident)
    block = high << 32 | low
    assert (middle, top) == (ident, 0)
    assert 0 <= lane < 4
    assert (block >> 10) << 12 | lane << 10 | block & 1023 == index


def test_element_counter_lanes():
    """1024 consecutive counters fill four runs of 1024 elements."""
    for lane in range(4):
        for r in (0, 1, 1023):
            assert noise.element_counter(3 * 4096 + lane * 1024 + r, 9) == ((3 * 1024 + r, 0, 9, 0), lane)
