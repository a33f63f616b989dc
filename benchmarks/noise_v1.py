"""The evidence behind docs/noise_v1.md: error of the exact transform, compiled slots per weight.

    python -m benchmarks.noise_v1 error [--angles 1024]     every u with some angles, every angle with some u
    python -m benchmarks.noise_v1 slots                     a plain dense pass, compiled for sm_80, sm_90, gfx942

No GPU is used: slots are counted in compiled code. CPU time is measured by benchmarks.kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl

from pgap_kernels.triton.noise import box_muller, philox7

# ---- error ----------------------------------------------------------------------------------------------------------


def transform(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The extension's Box-Muller of int32 word tensors."""
    even, odd = torch.empty(len(a)), torch.empty(len(a))
    torch.ops.pgap_kernels_cpu.box_muller(a, b, even, odd)
    return even, odd


def error(angles: int) -> list[dict]:
    """Largest |z - z64| and |z - z64| / max(|z64|, 1): every u with some angles, every angle with a few u."""
    k, angle = torch.arange(1 << 23), torch.arange(1 << 24)
    radius = (-2 * torch.log((2 * k + 1).double() * 2.0**-24)).sqrt()
    # A step of an odd number of grid points meets every residue; the last ones are the ends of the quarters.
    some = [i * ((1 << 24) // angles | 1) % (1 << 24) for i in range(angles)]
    some += [0, 1, (1 << 22) - 1, 1 << 22, (1 << 23) - 1, 1 << 23, (3 << 22) - 1, 3 << 22, (1 << 24) - 1]
    rows = [_worst("every u", ((_int32(k << 9), _int32(torch.full_like(k, t << 8)), radius, t) for t in some))]
    few = [
        0,
        1,
        5,
        1 << 10,
        1 << 16,
        1 << 20,
        3 << 20,
        1 << 22,
        5 << 20,
        6 << 20,
        7 << 20,
        (1 << 23) - 2,
        (1 << 23) - 1,
    ]
    every = _int32(angle << 8)
    rows.append(_worst("every angle", ((_int32(torch.full_like(angle, u << 9)), every, radius[u], angle) for u in few)))
    return rows


def _int32(word: torch.Tensor) -> torch.Tensor:
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _worst(name: str, sweeps) -> dict:
    row: dict = {"sweep": name, "count": 0, "absolute": 0.0, "relative": 0.0, "max_abs_z": 0.0}
    for a, b, radius, angle in sweeps:
        theta = torch.as_tensor(angle).double() * (2 * math.pi * 2.0**-24)
        for got, factor in zip(transform(a, b), (theta.cos(), theta.sin()), strict=True):
            exact = radius * factor
            off = (got.double() - exact).abs_()
            row["absolute"] = max(row["absolute"], off.max().item())
            row["relative"] = max(row["relative"], (off / exact.abs().clamp_(min=1.0)).max().item())
            row["max_abs_z"] = max(row["max_abs_z"], got.abs().max().item())
        row["count"] += len(a)
    return row


# ---- compiled code --------------------------------------------------------------------------------------------------


@triton.jit
def dense_pass(w_ptr, coefficient_ptr, key_ptr, tensor_id, BLOCK: tl.constexpr):
    """W <- W + a z: BLOCK consecutive counters, four contiguous runs of weights."""
    pid = tl.program_id(0).to(tl.int64)
    a = tl.load(coefficient_ptr)
    key = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    group = pid // (1024 // BLOCK)
    r = (pid % (1024 // BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    c0 = (group << 10).to(tl.uint32) | r.to(tl.uint32)
    words = philox7(
        c0, (group >> 22).to(tl.uint32), tensor_id.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32)
    )
    z0, z1 = box_muller(words[0], words[1])
    z2, z3 = box_muller(words[2], words[3])
    here = w_ptr + group * 4096 + r
    w0, w1 = tl.load(here), tl.load(here + 1024)
    w2, w3 = tl.load(here + 2048), tl.load(here + 3072)
    tl.store(here, (w0.to(tl.float32) + a * z0).to(w0.dtype))
    tl.store(here + 1024, (w1.to(tl.float32) + a * z1).to(w0.dtype))
    tl.store(here + 2048, (w2.to(tl.float32) + a * z2).to(w0.dtype))
    tl.store(here + 3072, (w3.to(tl.float32) + a * z3).to(w0.dtype))


def compile_dense(dtype: str, target, block: int, warps: int):
    """The pass for one target, without a device."""
    source = triton.compiler.ASTSource(
        fn=dense_pass,
        signature={"w_ptr": f"*{dtype}", "coefficient_ptr": "*fp32", "key_ptr": "*i64", "tensor_id": "i32"}
        | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})


def sass(cubin: bytes) -> str:
    """Disassembly by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=True).stdout


def slots(block: int = 1024, warps: int = 4) -> list[dict]:
    """Instructions per weight up to the kernel's unconditional exit (slow paths included: an upper bound)."""
    rows = []
    for name, target in (("sm_80", ("cuda", 80, 32)), ("sm_90", ("cuda", 90, 32)), ("gfx942", ("hip", "gfx942", 64))):
        for dtype in ("bf16", "fp32"):
            compiled = compile_dense(dtype, triton.backends.compiler.GPUTarget(*target), block, warps)
            row: dict = {"target": name, "dtype": dtype}
            per_thread = 4 * block / (warps * target[2])
            if target[0] == "cuda":
                lines = [x for x in sass(compiled.asm["cubin"]).splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", x)]
                end = next(i for i, x in enumerate(lines) if "EXIT" in x and "@" not in x)
                wide = sorted(set(re.findall(r"(?:LDG|STG)\.E\.128", "\n".join(lines))))
                row |= {"slots_per_weight": (end + 1) / per_thread, "wide": " ".join(wide)}
                row["spills"] = sum("STL" in x or "LDL" in x for x in lines)
            else:
                code = compiled.asm["amdgcn"]
                body = code[: code.index("s_endpgm")]
                count = sum(bool(re.match(r"\s+[vs]_|\s+(global|buffer|ds)_", x)) for x in body.splitlines())
                row |= {
                    "slots_per_weight": count / per_thread,
                    "spills": int(re.search(r"vgpr_spill_count:\s*(\d+)", code)[1]),
                }
                row["wide"] = max(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx?\d?", code), default="")
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("error", "slots"))
    parser.add_argument("--angles", type=int, default=1024, help="angles of the error sweep")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    rows = error(args.angles) if args.what == "error" else slots()
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
