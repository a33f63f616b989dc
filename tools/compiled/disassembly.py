"""Compiled kernels as instructions: what common_path.py counts.

code = parse_sass(sass(cubin), "dense_kernel")        NVIDIA: the tools that come with Triton
code = parse_amdgcn(text, "dense_kernel")             AMD: the assembly that Triton keeps
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import triton

# ---- instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    text: str
    kind: str = "plain"  # or branch, exit, call, return
    always: bool = True  # of a branch or exit: not under a condition
    target: str = ""  # label of a branch or call
    load: int = 0  # bits of global memory that a thread reads
    store: int = 0
    local: bool = False  # accesses a thread's own memory: a spill
    mma: bool = False
    arithmetic: bool = False  # on floating point
    places: tuple[str, ...] = ()  # file:line it was compiled from, then of the call around it, and so on outwards


@dataclass(frozen=True)
class Code:
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> index of the next instruction
    entry: int = 0


SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
SASS_FLOAT = re.compile(r"(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2|MUFU)\b")
SASS_MMA = re.compile(r"\w*(HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA|OMMA|UTC\w*MMA)\b")
SASS_WIDTH = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8, "8": 8}

AMD_LINE = re.compile(r"\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
AMD_FLOAT = re.compile(r"v_(pk_)?(fma|fmac|mad|mac|add|sub|subrev|mul|sqrt|rsq|exp|log|sin|cos|rcp)_(f32|f16|bf16)")
AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
AMD_WIDTH = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}


def parse_sass(text: str, kernel: str) -> Code:
    """One kernel of nvdisasm's output, with the functions in its section (slow paths)."""
    section = re.search(rf"^\s*\.section\s+\.text\.{re.escape(kernel)},.*?(?=^\s*\.section\s|\Z)", text, re.M | re.S)
    if section is None:
        raise ValueError(f"no code of {kernel} in the disassembly")
    code = Code([], {})
    joins: dict[str, str] = {}  # convergence barrier -> where its threads meet, of the BSSY last seen
    chain: list[str] = []  # from the source outwards
    fresh = True
    for line in section[0].splitlines():
        if label := re.match(r"([.$\w]+):\s*$", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r'\s*//## File "(?:[^"]*/)?([^"]+)", line (\d+)', line):
            chain = [*([] if fresh else chain), f"{found[1]}:{found[2]}"]
            fresh = False
        elif found := SASS_LINE.match(line):
            code.instructions.append(replace(_sass(found[1], found[2], found[3], joins), places=tuple(chain)))
            fresh = True
    return _checked(code, kernel)


def _sass(guard: str | None, op: str, operands: str, joins: dict[str, str]) -> Instruction:
    text = f"{f'@{guard} ' if guard else ''}{op} {operands}".strip()
    name, label = op.split(".")[0], re.search(r"`\((.+?)\)", operands)
    always = guard in (None, "PT", "UPT")
    target = label[1] if label else ""
    if name in ("BRX", "BRXU", "JMP", "JMX", "JMXU"):
        raise ValueError(f"cannot follow {text!r}")
    if name == "BSSY":
        joins[operands.split(",")[0]] = target
    if name == "BSYNC":
        return Instruction(text, "branch", True, joins[operands.strip()])
    if name == "BRA":
        # "BRA.U !UP0, `(.L)" has its condition as an operand.
        return Instruction(text, "branch", always and operands.startswith("`"), target)
    if name == "CALL" and target.startswith(".L"):
        return Instruction(text, "branch", always, target)  # how ptxas leaves a loop on sm_80: it does not come back
    if name in ("EXIT", "CALL", "RET"):
        return Instruction(text, {"RET": "return"}.get(name, name.lower()), always, target)
    width = next((SASS_WIDTH[part] for part in op.split(".") if part in SASS_WIDTH), 32)
    never = guard in ("!PT", "!UPT")
    return Instruction(
        text,
        load=width if name in ("LDG", "LDGSTS") and not never else 0,
        store=width if name == "STG" and not never else 0,
        local=name in ("LDL", "STL"),
        mma=bool(SASS_MMA.match(name)),
        arithmetic=bool(SASS_FLOAT.match(name)),
    )


def parse_amdgcn(text: str, kernel: str) -> Code:
    """One kernel of the assembly that Triton keeps."""
    body = re.search(rf"^{re.escape(kernel)}:.*?(?=^\s*\.section\s|^\.Lfunc_end|\Z)", text, re.M | re.S)
    if body is None:
        raise ValueError(f"no code of {kernel} in the assembly")
    code = Code([], {})
    chain: list[str] = []
    for line in body[0].splitlines():
        if label := re.match(r"([.$\w]+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif re.match(r"\s*\.loc\s", line):
            chain = re.findall(r"(\S+?:\d+):\d+", line.partition(";")[2])
        elif found := AMD_LINE.match(line):
            code.instructions.append(replace(_amdgcn(found[1], found[2].strip()), places=tuple(chain)))
    return _checked(code, kernel)


def _checked(code: Code, kernel: str) -> Code:
    if not code.instructions:
        raise ValueError(f"no instruction of {kernel} was understood")
    return code


def _amdgcn(op: str, operands: str) -> Instruction:
    text = f"{op} {operands}".strip()
    if op.startswith(("s_setpc", "s_swappc", "s_call")):
        raise ValueError(f"cannot follow {text!r}")
    if op == "s_branch" or op.startswith("s_cbranch"):
        return Instruction(text, "branch", op == "s_branch", operands)
    if op.startswith("s_endpgm"):
        return Instruction(text, "exit")
    access = AMD_ACCESS.match(op)
    width = _amd_width(access[2]) if access else 0
    return Instruction(
        text,
        load=width if access and access[1] == "load" else 0,
        store=width if access and access[1] == "store" else 0,
        local=op.startswith("scratch_"),
        mma=op.startswith(("v_mfma", "v_smfmac", "v_wmma")),
        arithmetic=bool(AMD_FLOAT.match(op)),
    )


def _amd_width(name: str) -> int:
    """dwordx4, dword, ushort, short_d16_hi, lds_dwordx4, b128."""
    if counted := re.search(r"dwordx(\d)|b(\d+)", name):
        return 32 * int(counted[1]) if counted[1] else int(counted[2])
    return next(bits for word, bits in AMD_WIDTH.items() if word in name)


def reading(code: Code, calls: set[str]) -> Code:
    """The same code with only the loads of functions called on those lines taken for loads of weights."""
    instructions = [x if calls.intersection(x.places) else replace(x, load=0) for x in code.instructions]
    return replace(code, instructions=instructions)


# ---- tools ----------------------------------------------------------------------------------------------------------


def nvidia_tool(name: str, cubin: bytes, *options: str) -> str:
    """What a binary tool that comes with Triton prints about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([str(tool), *options, str(path)], capture_output=True, text=True, check=True).stdout


def sass(cubin: bytes) -> str:
    return nvidia_tool("nvdisasm", cubin, "-c", "-gi")
