"""The C++ CPU backend: forwards to the extension."""

from __future__ import annotations

import torch

from . import extension, reference

name = "cpu"


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend does not serve the op there, or None."""
    if device.type != "cpu":
        return f"serves CPU tensors, not {device.type}"
    return extension.unavailable


def isa() -> tuple[str, str]:
    """(instruction set in use, best one this CPU has); PGAP_ISA lowers the first."""
    used, best, *_ = torch.ops.pgap_kernels_cpu.isa().split(",")
    return used, best


def isas() -> list[str]:
    """Instruction sets that this CPU has a build for, best first."""
    return torch.ops.pgap_kernels_cpu.isa().split(",")[1:]


def use_isa(name: str) -> None:
    """Switch to another build, as PGAP_ISA does at the start. For comparisons; not while an op runs."""
    torch.ops.pgap_kernels_cpu.use_isa(name)


def _keywords(arguments):
    """A record as keywords of its family's C++ op, without the tier: both are served exactly."""
    keywords = arguments._asdict()
    keywords.pop("tier", None)
    return keywords


def dense_perturb_(weights, out, arguments):
    in_place = weights is out
    read = [] if in_place else weights
    torch.ops.pgap_kernels_cpu.dense.default(read, out, in_place, **_keywords(arguments))


def assemble_gradient_(gradients, arguments):
    torch.ops.pgap_kernels_cpu.dense.default(
        [],
        gradients,
        False,
        **_keywords(arguments),
        decay=torch.zeros(1, 1, dtype=torch.float32, device="cpu"),
        rounding_keys=None,
        stages=[len(arguments.keys)],
    )


def masked_perturb_(weights, out, arguments):
    torch.ops.pgap_kernels_cpu.masked.default(weights, out, **_keywords(arguments))


def preconditioned_(weights, out, state0, state1, arguments):
    torch.ops.pgap_kernels_cpu.preconditioned.default(weights, out, state0, state1, **_keywords(arguments))


def anchor_affine_(weights, out, arguments):
    in_place = weights is out
    torch.ops.pgap_kernels_cpu.anchor.default([] if in_place else weights, out, in_place, **_keywords(arguments))


def reduce(tensors, arguments):
    totals = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    torch.ops.pgap_kernels_cpu.reduction.default(tensors, **_keywords(arguments), totals=totals)
    return totals


def aligned_core(singular_values, keys, tensor_ids, sign_ids, delta):
    return reference.aligned_core(singular_values, keys, tensor_ids, sign_ids, delta, assemble_gradient_)


def lowrank_perturb_(weights, out, arguments):
    torch.ops.pgap_kernels_cpu.lowrank.default(weights, out, **_keywords(arguments))


def lowrank_forward_(outputs, inputs, arguments):
    if inputs.stride(-1) != 1:
        inputs = inputs.contiguous()
    torch.ops.pgap_kernels_cpu.forward.default(outputs, inputs, **arguments._asdict())
