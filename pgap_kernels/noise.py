"""The noise contract, version 1: keys, tensor ids, and which counter an element has. No tensors here.

``docs/noise_v1.md`` is the text of the contract; ``reference/noise.py``, ``csrc/noise.h`` and ``triton/noise.py``
implement it.
"""

from __future__ import annotations

from enum import IntEnum

CONTRACT_VERSION = 1
ROUNDS = 7  # element noise
KEY_ROUNDS = 10  # key derivation

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_DERIVE_TAG = 0x50474150

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Role(IntEnum):
    """What a key's stream is used for; part of the contract."""

    DENSE = 0
    LEFT = 1
    RIGHT = 2
    CORE = 3
    SIGN = 4
    MASK = 5
    PROBE = 6
    ROUNDING = 7
    DATA = 8
    RANGE_FINDER = 9
    DIAGONAL_CORE = 10


def check_uint(name: str, value: int, bits: int) -> int:
    """Return ``value`` if it is an integer in [0, 2**bits), else raise TypeError or ValueError naming ``name``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); accepted: an integer in [0, 2**{bits})")
    value = value.__index__()
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: got {value}; accepted: an integer in [0, 2**{bits})")
    return value


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int) -> tuple[int, int, int, int]:
    """Philox4x32 (Salmon et al., SC 2011) of one counter.

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.
        rounds: number of rounds, at least 1.

    Returns:
        Four 32-bit words.

    Raises:
        ValueError: a word is not in [0, 2**32), or the lengths or the number of rounds are wrong.
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(f"counter, key: got {len(counter)} and {len(key)} words; accepted: 4 and 2")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}; accepted: 1 or more")
    x0, x1, x2, x3 = (check_uint("counter", word, 32) for word in counter)
    k0, k1 = (check_uint("key", word, 32) for word in key)
    for _ in range(rounds):
        p0, p1 = MULTIPLIERS[0] * x0, MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & MASK32, (p0 >> 32) ^ x3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return x0, x1, x2, x3


def derive(seed: int, step: int, role: int, probe: int = 0) -> int:
    """The 64-bit key of a draw.

    Philox-10 with key = seed and counter = (step lo, step hi, role | probe << 8, 0x50474150); the key is
    x0 | x1 << 32.

    Args:
        seed: in [0, 2**64); 0 is as good as any other.
        step: in [0, 2**64).
        role: a ``Role``, in [0, 256).
        probe: in [0, 2**24).

    Raises:
        TypeError, ValueError: an argument is not an integer in its range; the message names it.
    """
    seed, step = check_uint("seed", seed, 64), check_uint("step", step, 64)
    role, probe = check_uint("role", role, 8), check_uint("probe", probe, 24)
    counter = (step & MASK32, step >> 32, role | probe << 8, _DERIVE_TAG)
    x0, x1, _, _ = philox4x32(counter, (seed & MASK32, seed >> 32), KEY_ROUNDS)
    return x0 | x1 << 32


def canonical_name(name: str) -> str:
    """A parameter's qualified name without the segments that wrappers (compile, FSDP, DDP, checkpointing) add."""
    segments = [segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS]
    if len(segments) > 1 and segments[0] == "module":
        segments = segments[1:]
    return ".".join(segments)


def tensor_id(name: str) -> int:
    """The 32-bit id of a parameter: FNV-1a of its canonical name in UTF-8.

    It depends on the name alone, so training a subset, another order or sharding never changes a weight's noise.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}; accepted: the qualified name of a parameter")
    value = 0x811C9DC5
    for byte in canonical_name(name).encode():
        value = ((value ^ byte) * 0x01000193) & MASK32
    return value


def element_counter(index: int, tensor_id: int) -> tuple[tuple[int, int, int, int], int]:
    """Counter and output lane of the element with logical row-major index ``index`` in the unsharded tensor."""
    block = (index >> 12) << 10 | (index & 1023)
    return (block & MASK32, block >> 32, tensor_id, 0), index >> 10 & 3
