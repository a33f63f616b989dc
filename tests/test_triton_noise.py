"""The Triton side of the noise contract, under Triton's interpreter, and compiled for real targets."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# TRITON_INTERPRET is read when a kernel is decorated, so the interpreted half runs in a process of its own.
INTERPRETED = """
import torch, triton, triton.language as tl
from pgap_kernels import draw, noise
from pgap_kernels.triton.noise import box_muller, philox7

@triton.jit
def group(z_ptr, x_ptr, c1, tensor_id, k0, k1, c0_base):
    r = tl.arange(0, 1024)
    c0 = (c0_base + r).to(tl.uint32)
    x0, x1, x2, x3 = philox7(c0, tl.cast(c1, tl.uint32), tl.cast(tensor_id, tl.uint32), tl.cast(k0, tl.uint32),
                             tl.cast(k1, tl.uint32))
    z0, z1 = box_muller(x0, x1)
    z2, z3 = box_muller(x2, x3)
    tl.store(z_ptr + r, z0)
    tl.store(z_ptr + 1024 + r, z1)
    tl.store(z_ptr + 2048 + r, z2)
    tl.store(z_ptr + 3072 + r, z3)
    tl.store(x_ptr + r, x0)

CASES = (0, 0, 0), (5, 0x9E3779B9, 0xFEDCBA9876543210), ((1 << 22) + 3, 7, 1 << 63), (2**50 + 1, 1, 2)
for number, tid, key in CASES:
    z = torch.full((4096,), float("nan"))
    x = torch.zeros(1024, dtype=torch.int32)
    block = number << 10
    group[(1,)](z, x, block >> 32, tid, key & 0xFFFFFFFF, key >> 32, block & 0xFFFFFFFF)
    assert torch.equal(z, draw(4096, key, tid, offset=number * 4096, backend="reference")), number
    for r in (0, 1, 1023):
        counter, lane = noise.element_counter(number * 4096 + r, tid)
        assert lane == 0
        word = noise.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32), 7)[0]
        assert x[r].item() & 0xFFFFFFFF == word, (number, r)
print("equal")
"""


def test_interpreted_bits_are_those_of_the_reference(tmp_path):
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


def test_dense_pass_compiles_within_the_slot_budget():
    """At most 42 issue slots per bf16 weight on sm_90 for a dense exact pass; no spills anywhere."""
    from benchmarks.noise_v1 import slots

    rows = {(row["target"], row["dtype"]): row for row in slots()}
    assert set(rows) == {(t, d) for t in ("sm_80", "sm_90", "gfx942") for d in ("bf16", "fp32")}
    assert all(row["spills"] == 0 for row in rows.values())
    assert rows["sm_90", "bf16"]["slots_per_weight"] <= 42
    assert rows["sm_90", "bf16"]["wide"] == rows["sm_80", "bf16"]["wide"] == "LDG.E.128 STG.E.128"
