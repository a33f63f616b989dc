"""What a figure depends on beside the code: processor, memory, threads, versions, and the command that was given."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pgap_kernels import __version__, backends, cpu, extension

#: What seconds depend on beside the code: those of different ones do not go together.
SPEED = ("device", "processor", "threads")


def facts(device: torch.device | None = None) -> dict:
    """Of this machine and process, and of a GPU if that is the device; None for what the system does not tell."""
    on_gpu = gpu(device) if device is not None and device.type == "cuda" else {}
    return on_gpu | {
        "processor": processor(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_gb": _memory_gb(),
        "threads": torch.get_num_threads(),
        "isa": None if extension.unavailable else cpu.isa()[0],
        "pgap_kernels": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "compiler": _first_line(os.environ.get("CXX", "c++"), "--version"),
        "system": platform.platform(),
        "command": _command(),
    }


def refusal(device: str, op: str) -> str | None:
    """Why an op cannot be timed on a device here, or None."""
    if device == "cpu":
        return extension.unavailable
    if not torch.cuda.is_available():
        return "--device: got cuda, but PyTorch finds no CUDA or ROCm device here; accepted here: cpu"
    reason = backends.triton.refusal(op, torch.device("cuda"), torch.float32)
    return reason and f"--device: got cuda, but the Triton backend does not run here: {reason}"


def write(file: Path, found: dict, rows: Sequence[dict]) -> None:
    """A report of a command: the facts, and a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f'{{"facts": {json.dumps(found)},\n"rows": [\n{lines}\n]}}\n')


def line(found: dict) -> str:
    """The facts, to be read."""
    return ", ".join(f"{name} {text(value)}" for name, value in found.items())


def text(value: object) -> str:
    """A fact to read."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "unknown"
    return "unknown" if value is None else str(value)


def gpu(device: torch.device) -> dict[str, str | None]:
    """What a GPU figure depends on."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "architecture": properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}",
        "torch": torch.__version__,
        "triton": _triton(),
    }


def processor() -> str:
    """Model name of the CPU."""
    names = [x.split(":", 1)[1].strip() for x in _read("/proc/cpuinfo").splitlines() if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Size of each cache that the first core uses, as "L1 Data", "L2 Unified", ..."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    parts = [[_read(folder / name).strip() for name in ("level", "type", "size")] for folder in folders]
    return {f"L{level} {kind}": size for level, kind, size in parts}


def _memory_gb() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _command() -> str:
    """To be repeated anywhere: of files outside the folder it was given in only the name."""
    given = [Path(x).name if Path(x).is_absolute() else x for x in sys.orig_argv[1:]]
    return shlex.join(["python", *given])


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:  # ROCm's is distributed under another name
        import triton

        return triton.__version__


def _read(path: str | Path) -> str:
    """Content of a file that only some systems have."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _first_line(*command: str) -> str | None:
    """First line that a tool prints, or None where it does not answer."""
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None
