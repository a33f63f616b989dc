"""The C++ extension, loaded once, at first use. If it is absent, ``unavailable`` says why."""

from __future__ import annotations

from pathlib import Path

import torch


def _load() -> str | None:
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        return (
            "the C++ extension was not built; with torch and a C++20 compiler installed run "
            "`PGAP_FORCE_BUILD=1 pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the C++ extension did not load: {error}"
    torch.ops.pgap_kernels_cpu.isa()  # an unknown PGAP_ISA is an error now, not at the first op
    return None


unavailable = _load()
