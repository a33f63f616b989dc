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
    """Runs another build from now on, as PGAP_ISA would from the start; for comparisons, between calls of ops."""
    torch.ops.pgap_kernels_cpu.use_isa(name)


def dense_perturb_(
    weights, out, keys, coefficients, decay, rounding_keys, stages, tensor_ids, slices, distribution, tier
):
    in_place = weights is out
    read = [] if in_place else weights
    torch.ops.pgap_kernels_cpu.dense(
        read, out, in_place, keys, coefficients, decay, rounding_keys, stages, tensor_ids, slices, distribution
    )


def assemble_gradient_(gradients, keys, coefficients, tensor_ids, slices, distribution, tier):
    decay = torch.zeros(1, 1, dtype=torch.float32)
    torch.ops.pgap_kernels_cpu.dense(
        [], gradients, False, keys, coefficients, decay, None, [len(keys)], tensor_ids, slices, distribution
    )


def masked_perturb_(*args):
    torch.ops.pgap_kernels_cpu.masked(*args[:-1])  # the same arguments in the same order, but for the tier


def preconditioned_(*args):
    torch.ops.pgap_kernels_cpu.preconditioned(*args[:-1])  # likewise


def anchor_affine_(weights, *args):
    torch.ops.pgap_kernels_cpu.anchor([], weights, True, *args)


def reduce(tensors, anchors, keys, tensor_ids, slices, distribution, tier):
    totals = torch.empty(len(tensors), dtype=torch.float64)
    torch.ops.pgap_kernels_cpu.reduction(tensors, anchors, keys, tensor_ids, slices, distribution, totals)
    return totals


def aligned_core(singular_values, keys, tensor_ids, sign_ids, delta):
    return reference.aligned_core(singular_values, keys, tensor_ids, sign_ids, delta, assemble_gradient_)


def lowrank_perturb_(
    weights,
    out,
    left,
    right,
    core,
    keys,
    coefficient,
    decay,
    rounding_key,
    tensor_ids,
    slices,
    rank,
    core_kind,
    delta,
    sign_ids,
):
    if core_kind == "aligned":  # small matrices: made first, then stored ones like any other
        core, core_kind = aligned_core(core, keys[2:], tensor_ids, sign_ids, delta.item()), "full"
    args = (left, right, core, keys[:3], coefficient, decay, rounding_key, tensor_ids, slices, rank, core_kind)
    torch.ops.pgap_kernels_cpu.lowrank(weights, out, *args)


def lowrank_forward_(outputs, inputs, left, right, cores, transposed):
    if inputs.stride(-1) != 1:
        inputs = inputs.contiguous()
    torch.ops.pgap_kernels_cpu.forward(outputs, inputs, left, right, cores, transposed)
