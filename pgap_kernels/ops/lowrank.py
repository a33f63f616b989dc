"""Low-rank directions A C B^T added to weight matrices, and P-GAP's aligned core."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .. import backends, checks
from ..arguments import LowRankArguments
from ._library import call_pass, define, define_pass, placed, torch_ops, traceable
from ._packing import Key, Scalar, Slices, outputs, rounding_keys

MAX_RANK = 512


def _aligned_core(singular_values, *, keys, tensor_ids, sign_ids, delta):
    serving = backends.select("aligned_core", singular_values[0].device, torch.float32)
    return serving.aligned_core(singular_values, keys, tensor_ids, sign_ids, delta)


def _fake_aligned_core(singular_values, **arguments):
    return [s.new_empty(len(s), len(s), dtype=torch.float32) for s in singular_values]


define_pass("lowrank_perturb_", LowRankArguments)
define(
    "aligned_core(Tensor[] singular_values, *, Tensor keys, int[] tensor_ids, int[] sign_ids, float delta) -> Tensor[]",
    _aligned_core,
    _fake_aligned_core,
)


Factor = Sequence[Tensor] | Key


def _refuse_one_tensor(name: str, value: Factor) -> None:
    if isinstance(value, Tensor) and value.is_floating_point():
        raise TypeError(f"{name}: got one tensor; accepted: a list of tensors, one per weight, or a key")


def _factor(name: str, value: Factor, weights: list[Tensor], dim: int) -> tuple[list[Tensor], int | Tensor, int | None]:
    """A stored or regenerated factor as (tensors, key bits, rank if stored)."""
    _refuse_one_tensor(name, value)
    if isinstance(value, (int, Integral, Tensor)):  # a type checker does not know that an int is Integral
        return [], checks.key_bits(name, value), None
    factors = checks.tensors(name, value, tuple({torch.float32, weights[0].dtype}))
    if len(factors) != len(weights) or factors[0].device != weights[0].device:
        raise ValueError(
            f"{name}: got {len(factors)} tensors on {factors[0].device}; accepted: one per weight "
            f"({len(weights)}) on {weights[0].device}"
        )
    rank = factors[0].shape[-1] if factors[0].dim() == 2 else 0
    for i, (f, w) in enumerate(zip(factors, weights, strict=True)):
        if f.dim() != 2 or f.shape[0] != w.shape[dim] or f.shape[1] != rank:
            raise ValueError(
                f"{name}[{i}]: got shape {tuple(f.shape)}; accepted: ({w.shape[dim]}, rank), with the rank of the "
                f"list's first ({rank})"
            )
        if f.numel() and not f.is_contiguous():
            raise ValueError(f"{name}[{i}]: got strides {f.stride()}; accepted: a contiguous tensor")
    return factors, 0, rank


@traceable
def lowrank_perturb_(
    weights: Sequence[Tensor],
    left: Factor,
    right: Factor,
    *,
    coefficient: Scalar,
    core: Factor | None = None,
    below: Sequence[Tensor] | None = None,
    e: Scalar | None = None,
    rank: int | None = None,
    decay: Scalar = 0.0,
    tensor_ids: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
) -> None:
    """Add a low-rank product to weight matrices, in place, in one pass:  W <- round((1 - d) W + a A C B^T).

    P-GAP and SubZero (U Z V^T), TeZO (diagonal core) and LOZO (no core) are this op. Products accumulate in float32.
    For 16-bit W, P = A C and B are rounded once to W's dtype; for float32 W the products are IEEE (on Hopper GPUs three
    TF32 products each, for ranks 16 to 64). Results do not depend on threads, list or instruction set.

    With ``below`` what is added is a quotient, element by element, as in TeZO-Adam's update (2501.19057):
    a (A diag(c) B^T) / sqrt((A A) diag(v) (B B)^T + e), where c is ``core``, v is ``below``, and A A and B B are the
    squares of the elements, in float32.

    Args:
        weights: matrices (m, n) as in ``dense_perturb_``.
        left: A, either tensors (m, rank), float32 or W's dtype, contiguous, or a key (integer in [0, 2**64) or int64
            tensor) that regenerates them: element (row, k) is normal number row * rank + k under the weight's id.
        right: B, tensors (n, rank) or a key, likewise.
        coefficient: a, as in ``dense_perturb_``.
        core: C: None (the identity), tensors (rank,) for a diagonal, tensors (rank, rank), or a key to draw the latter.
        below: v of a quotient, tensors (rank,) as those of a diagonal core, which it needs; >= 0.
        e: of the quotient, > 0: one value, or one per tensor.
        rank: needed if neither factor is stored; 1 <= rank <= min(m, n) of the unsharded weight, and <= 512.
        decay, out, rounding, rounding_key, slices: as in ``dense_perturb_``.
        tensor_ids: needed if anything is drawn or rounded stochastically.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    for i, w in enumerate(weights):
        if w.dim() != 2:
            raise ValueError(f"weights[{i}]: got shape {tuple(w.shape)}; accepted: a matrix")
    left_factors, left_key, left_rank = _factor("left", left, weights, 0)
    right_factors, right_key, right_rank = _factor("right", right, weights, 1)
    given = [r for r in (left_rank, right_rank, rank) if r is not None]
    if not given:
        raise ValueError("rank: got None with both factors regenerated; accepted: the rank of the factors")
    if len(set(given)) > 1:
        raise ValueError(f"rank: got left {left_rank}, right {right_rank}, rank {rank}; accepted: one rank for all")
    if isinstance(given[0], bool) or not isinstance(given[0], int):
        raise TypeError(f"rank: got {given[0]!r}; accepted: an integer")
    spans = checks.slices("slices", slices, weights)
    # Of a shard's unsharded weight only the row length is known; it limits the rank, too.
    sides = [min(w.shape) if slices is None else spans[2 * i + 1] for i, w in enumerate(weights) if w.numel()]
    limit = min([*sides, MAX_RANK])
    if not 1 <= given[0] <= limit:
        why = "the most the kernels take" if limit == MAX_RANK else "the shortest side among the weights"
        raise ValueError(f"rank: got {given[0]}; accepted: 1 to {limit}, {why}")
    cores, core_key, core_kind = _core("core", core, weights, given[0])
    divisors, divisor_e = _below(below, e, core_kind, weights, given[0])
    keys_rounding = rounding_keys(rounding, rounding_key)
    if tensor_ids is None:
        drawn = not left_factors or not right_factors or core_kind == "regenerated"
        if drawn or keys_rounding is not None:
            raise ValueError("tensor_ids: got None; accepted: one per tensor when something is drawn from a key")
        tensor_ids = [0] * len(weights)
    for i, (base, row_stride) in enumerate(zip(spans[::2], spans[1::2], strict=True)):
        if (sum(divmod(base, row_stride)) + sum(weights[i].shape)) * given[0] >= 1 << 63:
            raise ValueError(
                f"slices[{i}]: got {(base, row_stride)}; accepted: factor elements with indices below 2**63"
            )
    arguments = LowRankArguments(
        left=left_factors,
        right=right_factors,
        core=cores,
        keys=checks.pack_keys([left_key, right_key, core_key]),
        coefficient=checks.scalar_row("coefficient", coefficient, len(weights)),
        decay=checks.scalar_row("decay", decay, len(weights)),
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(weights)),
        rank=given[0],
        core_kind=core_kind,
        rounding_key=keys_rounding,
        slices=spans,
        below=divisors,
        e=divisor_e,
    )
    targets = outputs(out, weights)
    read = {"left": left_factors, "right": right_factors, "core": cores, "below": divisors}
    checks.apart("weights" if targets is None else "out", targets or weights, read)
    call_pass(torch_ops.lowrank_perturb_, weights, arguments, targets)


def _below(
    below: Sequence[Tensor] | None, e: Scalar | None, core_kind: str, weights: list[Tensor], rank: int
) -> tuple[list[Tensor], Tensor | None]:
    if (below is None) != (e is None):
        raise ValueError(f"below, e: got {'e' if below is None else 'below'} alone; accepted: both, or neither")
    if below is None:
        return [], None
    if core_kind != "diagonal":
        raise ValueError("below: got tensors without a diagonal core; accepted: core= with tensors (rank,)")
    divisors, _, kind = _core("below", below, weights, rank)
    if kind != "diagonal":
        raise ValueError(f"below: got {'a key' if kind == 'regenerated' else 'matrices'}; accepted: tensors (rank,)")
    row = checks.scalar_row("e", e, len(weights))
    if row.device.type == "cpu" and not torch.compiler.is_compiling() and not (row > 0).all():
        raise ValueError(f"e: got {e}; accepted: numbers > 0")
    return divisors, row


def _core(name: str, core: Factor | None, weights: list[Tensor], rank: int) -> tuple[list, int | Tensor, str]:
    if core is None:
        return [], 0, "none"
    _refuse_one_tensor(name, core)
    if isinstance(core, (int, Integral, Tensor)):
        return [], checks.key_bits(name, core), "regenerated"
    cores = checks.tensors(name, core, tuple({torch.float32, weights[0].dtype}))
    kind = "diagonal" if cores[0].dim() == 1 else "full"
    shape = (rank,) if kind == "diagonal" else (rank, rank)
    if len(cores) != len(weights) or cores[0].device != weights[0].device:
        raise ValueError(
            f"{name}: got {len(cores)} tensors on {cores[0].device}; accepted: one per weight, on its device"
        )
    for i, c in enumerate(cores):
        if c.shape != shape or not c.is_contiguous():
            raise ValueError(
                f"{name}[{i}]: got shape {tuple(c.shape)} with strides {c.stride()}; accepted: contiguous {shape}"
            )
    return cores, 0, kind


@traceable
def aligned_core(
    singular_values: Sequence[Tensor],
    key: Key,
    *,
    tensor_ids: Sequence[int],
    delta: float,
    sign_key: Key | None = None,
    sign_ids: Sequence[int] | None = None,
) -> list[Tensor]:
    """P-GAP's core Z: regenerated normals, shifted along S = diag(s) so that <S, Z> = xi sqrt(delta) |S|.

        alpha = (<S, Z_init> - xi sqrt(delta) |S|) / |S|^2,   Z = Z_init - alpha S            (2510.18228, Algorithm 1)

    Only the diagonal changes. If |S| = 0 nothing is aligned and Z = Z_init.

    Args:
        singular_values: float32 vectors (r,), one per weight.
        key: of role 3; element (i, j) of Z_init is normal number i * r + j under the weight's id.
        tensor_ids: the weights' ids.
        delta: alignment strength, finite and >= 0.
        sign_key: of role 4, for a random xi in {-1, +1}; None means xi = +1.
        sign_ids: ids under which xi is drawn; the default is the weights' own (one sign each), equal ids share a sign.

    Returns:
        float32 tensors (r, r).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    values = checks.tensors("singular_values", singular_values, (torch.float32,))
    for i, s in enumerate(values):
        if s.dim() != 1 or not len(s):
            raise ValueError(f"singular_values[{i}]: got shape {tuple(s.shape)}; accepted: (rank,) with rank >= 1")
    strength = checks.number("delta", delta)
    if strength < 0:
        raise ValueError(f"delta: got {strength}; accepted: 0 or more")
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(values))
    keys = [checks.key_bits("key", key)]
    if sign_key is not None:
        keys.append(checks.key_bits("sign_key", sign_key))
        sign_ids = ids if sign_ids is None else checks.tensor_ids("sign_ids", sign_ids, len(values))
    elif sign_ids is not None:
        raise ValueError("sign_ids: got ids without a sign_key; accepted: both, or neither for xi = +1")
    arguments = {"tensor_ids": ids, "sign_ids": sign_ids or [], "delta": strength}
    with torch.no_grad():
        return torch_ops.aligned_core(values, keys=placed(checks.pack_keys(keys), values[0].device), **arguments)
