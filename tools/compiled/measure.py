"""Compiles cases for a target and counts what comes of it: one row each, in processes of their own."""

from __future__ import annotations

import inspect
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from tools.compiled import disassembly
from tools.compiled.cases import SIDE, Case, all_cases
from tools.compiled.common_path import Work, common_path
from tools.compiled.launches import compile_for

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
