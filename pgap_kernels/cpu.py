"""The C++ CPU backend: loads the extension and forwards to it. Absent, it has a reason instead of an error."""

from __future__ import annotations

from pathlib import Path

import torch

name = "cpu"


def _load() -> str | None:
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        return (
            "the C++ extension was not built; with torch and a C++17 compiler installed run "
            "`PGAP_FORCE_BUILD=1 pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the C++ extension did not load: {error}"
    torch.ops.pgap_kernels_cpu.isa()  # an unknown PGAP_ISA is an error now, not at the first op
    return None


unavailable = _load()


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend does not serve the op there, or None."""
    if device.type != "cpu":
        return f"serves CPU tensors, not {device.type}"
    return unavailable


def isa() -> tuple[str, str]:
    """(instruction set in use, best one this CPU has); PGAP_ISA lowers the first."""
    used, best = torch.ops.pgap_kernels_cpu.isa().split(",")
    return used, best


def dense_perturb_(
    weights, out, keys, coefficients, decay, rounding_keys, stages, tensor_ids, slices, distribution, tier
):
    torch.ops.pgap_kernels_cpu.dense(
        weights, out, keys, coefficients, decay, rounding_keys, stages, tensor_ids, slices, distribution
    )


def assemble_gradient_(gradients, keys, coefficients, tensor_ids, slices, distribution, tier):
    decay = torch.zeros(1, 1, dtype=torch.float32)
    torch.ops.pgap_kernels_cpu.dense(
        [], gradients, keys, coefficients, decay, None, [len(keys)], tensor_ids, slices, distribution
    )


def lowrank_perturb_(*args):
    torch.ops.pgap_kernels_cpu.low_rank(*args)  # the same arguments in the same order
