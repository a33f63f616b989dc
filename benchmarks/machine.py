"""What a figure depends on beside the code: processor, memory, threads, versions, and the command that was given."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from pgap_kernels import __version__, cpu


def facts() -> dict:
    """Of this machine and process; None for what the system does not tell."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_gb": _memory_gb(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa()[0],
        "pgap_kernels": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": " ".join(sys.orig_argv[1:]),
    }


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _processor() -> str:
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
