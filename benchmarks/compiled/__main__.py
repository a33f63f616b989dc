"""Static facts of every Triton kernel, compiled ahead of time: no GPU is used, nothing here is a timing.

    python -m benchmarks.compiled                                        every kernel, for sm_80, sm_90 and gfx942
    python -m benchmarks.compiled --kernel dense --target sm_90 --dtype bf16
    python -m benchmarks.compiled --json rows.json --listing out/         rows as JSON, the counted paths as text

slots   issue slots per weight: instructions of the common path (see common_path.py) over the weights of one thread.
        Kernels that loop over draws are counted at one draw; loops over tiles at the tiles of a 4096 x 4096 matrix.
regs    registers of a thread
spill   instructions on its local memory: spills, or arrays in the slow paths of others' kernels
shared  bytes of shared memory
ld, st  bits of the narrowest access that is needed to read or write a tile; 0: it is not read or written
mma     tensor-core instructions on the path
B/w     bytes of weights (and of state of their size) moved per weight

ms per GPU is a model of a pass over 1e9 weights, the larger of two times; m and i say which, memory or issue:

    memory  bytes / (0.9 x peak bandwidth)               A100-80G 2.039 TB/s, H100 SXM 3.35 TB/s, H200 4.8 TB/s
    issue   slots / (0.8 x 128 lanes x SMs x clock)      A100 108 SMs at 1.41 GHz, H100 and H200 132 at 1.755 GHz

Beside our kernels: "copy" (W += a), passes with Triton's generators ("tl.randn", "tl.randn4x"), and what torch.compile
makes of MeZO's perturbation (inductor.py).
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.compiled import disassembly
from benchmarks.compiled.cases import BYTES, SIDE, Case, all_cases
from benchmarks.compiled.common_path import Work, common_path
from benchmarks.compiled.launches import compile_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ARCHITECTURES = {"sm_80": "nvidia", "sm_90": "hopper", "gfx942": "cdna"}
# Name, target, bytes/s, SMs, Hz.
GPUS = (
    ("A100", "sm_80", 2.039e12, 108, 1.41e9),
    ("H100", "sm_90", 3.35e12, 132, 1.755e9),
    ("H200", "sm_90", 4.8e12, 132, 1.755e9),
)

# ---- compiling ------------------------------------------------------------------------------------------------------


def resources(compiled, code: disassembly.Code) -> tuple[int, int]:
    """Registers and spills. AMD's scalar registers spill into lanes of vector registers: that costs no memory."""
    local = sum(x.local for x in code.instructions)
    if "cubin" in compiled.asm:
        usage = disassembly.nvidia_tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
        return _number(r"\bREG:(\d+)", usage), local
    text = compiled.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.vgpr_spill_count:\s*(\d+)", text) + local


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} is not in the compiler's output")
    return int(found[1])


def calls(kernel: triton.JITFunction, functions: tuple[str, ...]) -> set[str]:
    """The lines of a kernel and its helpers that call one of the functions, as debug information names them."""
    pattern = re.compile(rf"(?<!def )\b({'|'.join(functions)})\(")
    found = set()
    for function in kernel.fn.__globals__.values():
        if isinstance(function, triton.JITFunction):
            file = Path(inspect.getfile(function.fn)).name
            lines = enumerate(function.raw_src, function.starting_line_number)
            found |= {f"{file}:{i}" for i, line in lines if pattern.search(line)}
    return found


def measure(case: Case, target_name: str, listing: Path | None = None) -> dict:
    """The row of a case on a target."""
    target = TARGETS[target_name]
    nvidia = target.backend == "cuda"
    launch = case.launch(ARCHITECTURES[target_name])
    compiled = compile_for(launch, target)
    parse = disassembly.parse_sass if nvidia else disassembly.parse_amdgcn
    text = disassembly.sass(compiled.asm["cubin"]) if nvidia else compiled.asm["amdgcn"]
    code = parse(text, compiled.metadata.name)
    if case.readers:
        code = disassembly.reading(code, calls(launch.kernel, case.readers))
    threads = compiled.metadata.num_warps * target.warp_size
    tile, total = case.tile(launch.arguments), case.numbers / launch.programs
    work = Work(
        tile / threads,
        round(8 * case.read * total / threads),
        round(8 * case.written * total / threads),
        case.loops(launch.arguments, round(total / tile)),
        case.fixed,
    )
    path = common_path(code, work)
    stored = path.stored(path.store_bits)
    # A tile of few matrix products may be held by several waves of an AMD GPU, of which one writes it.
    if path.store_bits and (stored != work.written if nvidia else stored % work.written):
        raise ValueError(
            f"the path writes {stored} bits in accesses of {path.store_bits} or more, a thread has {work.written} to "
            "write: whole and masked stores of one width are on it"
        )
    registers, spills = resources(compiled, code)
    row: dict = {
        "kernel": case.kernel,
        "config": case.config,
        "dtype": case.dtype,
        "rank": case.rank,
        "target": target_name,
        "slots_per_weight": round(path.slots * launch.programs * threads / SIDE**2, 2),
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "load_bits": path.load_bits,
        "store_bits": path.store_bits,
        "mma": path.mma,
        "bytes_per_weight": case.read + case.written,
    }
    if listing:
        name = f"{case.name} {target_name}".replace(" ", "_")
        (listing / f"{name}.txt").write_text(path.listing() + "\n")
    return row | model(target_name, row["slots_per_weight"], row["bytes_per_weight"])


def model(target: str, slots: float, moved: float) -> dict:
    """Milliseconds per 1e9 weights, by GPU, and what bounds them."""
    times: dict[str, float] = {}
    bounds: dict[str, str] = {}
    for name, built_for, bandwidth, processors, clock in GPUS:
        if built_for == target:
            memory = 1e12 * moved / (0.9 * bandwidth)
            issue = 1e12 * slots / (0.8 * 128 * processors * clock)
            times[name] = round(max(memory, issue), 3)
            bounds[name] = "memory" if memory >= issue else "issue"
    return {"model_ms": times or None, "bound": bounds or None}


# ---- command line ---------------------------------------------------------------------------------------------------


def _job(case: int, target: str, listing: Path | None) -> dict:
    """A row, or what went wrong: in a process of its own, which knows a case by its number."""
    chosen = all_cases()[case]
    try:
        return {"error": None} | measure(chosen, target, listing)
    except Exception as error:  # any failure of the compiler belongs in the table
        names = {"kernel": chosen.kernel, "config": chosen.config, "dtype": chosen.dtype, "rank": chosen.rank}
        return names | {"target": target, "error": f"{type(error).__name__}: {error}"}


def rows(jobs: list[tuple[int, str]], processes: int, listing: Path | None = None) -> Iterator[dict]:
    """One row per (number of a case, target), as they are ready."""
    if processes == 1:
        yield from (_job(*job, listing) for job in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from (future.result() for future in [pool.submit(_job, *job, listing) for job in jobs])


def line(row: dict) -> str:
    """A row of the printed table."""
    name = f"{row['kernel']:15}{row['config']:17}{row['rank'] or '':>4} {row['dtype']:6}{row['target']:8}"
    if row["error"]:
        return name + row["error"].strip().splitlines()[-1]
    numbers = (
        f"{row['slots_per_weight']:7.1f}{row['registers']:6}{row['spills']:6}"
        f"{row['shared_bytes']:8}{row['load_bits']:5}{row['store_bits']:5}{row['mma']:5}{row['bytes_per_weight']:5}"
    )
    times = [f"{gpu} {ms:.2f}{row['bound'][gpu][0]}" for gpu, ms in (row["model_ms"] or {}).items()]
    return name + numbers + "  " + "  ".join(times)


HEADER = (
    f"{'kernel':15}{'config':17}{'rank':>4} {'dtype':6}{'target':8}"
    f"{'slots':>7}{'regs':>6}{'spill':>6}{'shared':>8}{'ld':>5}{'st':>5}{'mma':>5}{'B/w':>5}"
    "  ms per 1e9 weights"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = all_cases()
    kernels = list(dict.fromkeys(case.kernel for case in cases))
    parser.add_argument("--target", default=",".join(TARGETS), help="separated by commas; default %(default)s")
    parser.add_argument(
        "--kernel", nargs="+", choices=kernels, default=kernels, metavar="NAME", help=", ".join(kernels)
    )
    parser.add_argument("--config", nargs="+", metavar="TEXT", help='only these configurations, e.g. "J=1" fast')
    parser.add_argument("--dtype", nargs="+", choices=BYTES, default=list(BYTES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--listing", type=Path, metavar="FOLDER", help="write the path of every row to a file there")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled; unset it")
    targets = args.target.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"--target {unknown[0]}: not one of {', '.join(TARGETS)}")
    jobs = [
        (i, target)
        for i, case in enumerate(cases)
        for target in targets
        if case.kernel in args.kernel
        and case.dtype in args.dtype
        and case.config in (args.config or [case.config])
        and target.startswith(case.only)
    ]
    if args.listing:
        args.listing.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    found = []
    for row in rows(jobs, args.jobs, args.listing):
        found.append(row)
        print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if any(row["error"] for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
