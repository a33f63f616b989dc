"""Low-rank directions A C B^T added to weight matrices, and P-GAP's aligned core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends, checks
from ._arguments import Key, Scalar, Slices, rounding_keys
from ._library import define, define_with_out, table, written

MAX_RANK = 512

_LOWRANK = (
    "Tensor[] left, Tensor[] right, Tensor[] core, Tensor keys, Tensor coefficient, Tensor decay, "
    "Tensor? rounding_key, int[] tensor_ids, int[] slices, int rank, str core_kind, Tensor delta, int[] sign_ids, "
    "str? backend"
)


def _lowrank_impl(weights, *args, out=None):
    out = weights if out is None else out
    backend = backends.select("lowrank_perturb_", weights[0].device, weights[0].dtype, args[-1])
    backend.lowrank_perturb_(weights, out, *args[:-1])
    written(out)


def _aligned_core_impl(singular_values, *args):
    backend = backends.select("aligned_core", singular_values[0].device, torch.float32, args[-1])
    return backend.aligned_core(singular_values, *args[:-1])


def _fake_aligned_core(singular_values, *args):
    return [s.new_empty(len(s), len(s), dtype=torch.float32) for s in singular_values]


define_with_out("lowrank_perturb_", _LOWRANK, _lowrank_impl)
define(
    "aligned_core(Tensor[] singular_values, Tensor keys, int[] tensor_ids, int[] sign_ids, float delta, "
    "str? backend) -> Tensor[]",
    _aligned_core_impl,
    _fake_aligned_core,
)


@dataclass(frozen=True)
class AlignedCore:
    """P-GAP's core Z, regenerated and aligned inside the pass that uses it: nothing is stored between passes.

        alpha = (<S, Z_init> - xi sqrt(delta) |S|) / |S|^2,   Z = Z_init - alpha S            (2510.18228, Algorithm 1)

    Args:
        key: of role 3, for Z_init under each weight's id.
        singular_values: float32 vectors (rank,), one per weight.
        delta: alignment strength >= 0, a float or a one-element tensor.
        sign_key, sign_ids: of xi, as in ``aligned_core``; without a key xi = +1.
    """

    key: Key
    singular_values: Sequence[Tensor]
    delta: float | Tensor
    sign_key: Key | None = None
    sign_ids: Sequence[int] | None = None

    def where_best(self, weight: Tensor, tensor_ids: Sequence[int]) -> AlignedCore | list[Tensor]:
        """Itself if the backend of such weights makes it inside each pass, else the cores, made once for all passes."""
        backend = backends.select("lowrank_perturb_", weight.device, weight.dtype)
        return self if backend is backends.triton else self.materialised(tensor_ids)

    def materialised(self, tensor_ids: Sequence[int]) -> list[Tensor]:
        """The cores themselves, float32 (rank, rank)."""
        options = {"delta": float(self.delta), "sign_key": self.sign_key, "sign_ids": self.sign_ids}
        return aligned_core(self.singular_values, self.key, tensor_ids=tensor_ids, **options)


Factor = Sequence[Tensor] | Key


def _factor(name: str, value: Factor, weights: list[Tensor], dim: int) -> tuple[list[Tensor], int | Tensor, int | None]:
    """A stored or regenerated factor as (tensors, key bits, rank if stored)."""
    if isinstance(value, (int, Tensor)):
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


@torch.compiler.disable
def lowrank_perturb_(
    weights: Sequence[Tensor],
    left: Factor,
    right: Factor,
    *,
    coefficient: Scalar,
    core: Factor | AlignedCore | None = None,
    rank: int | None = None,
    decay: Scalar = 0.0,
    tensor_ids: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
    backend: str | None = None,
) -> None:
    """Add a low-rank product to weight matrices, in place, in one pass:  W <- round((1 - d) W + a A C B^T).

    P-GAP and SubZero (U Z V^T), TeZO (diagonal core) and LOZO (no core) are this op (K2 of the kernel algebra).
    Products accumulate in float32. For 16-bit W, P = A C and B are rounded once to W's dtype; for float32 W the
    products are IEEE. Results do not depend on threads, list or instruction set.

    Args:
        weights: matrices (m, n) as in ``dense_perturb_``.
        left: A, either tensors (m, rank), float32 or W's dtype, contiguous, or a key (integer in [0, 2**64) or int64
            tensor) that regenerates them: element (row, k) is normal number row * rank + k under the weight's id.
        right: B, tensors (n, rank) or a key, likewise.
        coefficient: a, as in ``dense_perturb_``.
        core: C: None, tensors (rank,) for a diagonal, tensors (rank, rank), a key that regenerates the latter, or an
            ``AlignedCore`` that also aligns it with S.
        rank: needed if neither factor is stored; 1 <= rank <= min(m, n) of the unsharded weight, and <= 512.
        decay, out, rounding, rounding_key, slices, backend: as in ``dense_perturb_``.
        tensor_ids: needed when something is regenerated or rounded stochastically.

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
    # Of a shard only the unsharded row is known: it bounds the rank too.
    sides = [min(w.shape) if slices is None else spans[2 * i + 1] for i, w in enumerate(weights) if w.numel()]
    limit = min([*sides, MAX_RANK])
    if not 1 <= given[0] <= limit:
        why = "the most the kernels take" if limit == MAX_RANK else "the shortest side among the weights"
        raise ValueError(f"rank: got {given[0]}; accepted: 1 to {limit}, {why}")
    cores, core_key, core_kind = _core(core, weights, given[0])
    keys = [left_key, right_key, core_key]
    delta, sign_ids = torch.ones(1), list[int]()
    if isinstance(core, AlignedCore):
        delta = checks.scalar_row("core.delta", core.delta, 1)
        _check_delta("core.delta", delta)
        sign_key, sign_ids = sign_of("core.", core.sign_key, core.sign_ids, tensor_ids, len(weights))
        keys += sign_key
    packed_keys = checks.pack_keys(keys)
    keys_rounding = rounding_keys(rounding, rounding_key)
    if tensor_ids is None:
        if (
            not left_factors
            or not right_factors
            or core_kind in ("regenerated", "aligned")
            or keys_rounding is not None
        ):
            raise ValueError("tensor_ids: got None; accepted: one per tensor when something is drawn from a key")
        tensor_ids = [0] * len(weights)
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(weights))
    a = checks.scalar_row("coefficient", coefficient, len(weights))
    d = checks.scalar_row("decay", decay, len(weights))
    for i, (base, row_stride) in enumerate(zip(spans[::2], spans[1::2], strict=True)):
        if (sum(divmod(base, row_stride)) + sum(weights[i].shape)) * given[0] >= 1 << 63:
            raise ValueError(
                f"slices[{i}]: got {(base, row_stride)}; accepted: factor elements with indices below 2**63"
            )
    factors = (left_factors, right_factors, cores, packed_keys)
    args = (*factors, a, d, keys_rounding, ids, spans, given[0], core_kind, delta, sign_ids, backend)
    with torch.no_grad():
        if out is None:
            table.lowrank_perturb_(weights, *args)
        else:
            table.lowrank_perturb_.out(weights, *args, out=checks.companions("out", out, weights, (weights[0].dtype,)))


def _check_delta(name: str, delta: Tensor) -> None:
    if delta.device.type == "cpu" and delta.item() < 0:
        raise ValueError(f"{name}: got {delta.item()}; accepted: 0 or more")


def sign_of(
    prefix: str, key: Key | None, ids: Sequence[int] | None, tensor_ids: Sequence[int] | None, count: int
) -> tuple[list[int | Tensor], list[int]]:
    """Key bits (none or one) and ids of xi."""
    if ids is not None and key is None:
        raise ValueError(f"{prefix}sign_ids: got ids without a sign_key; accepted: both, or neither for xi = +1")
    if key is None:
        return [], []
    own = tensor_ids if ids is None else ids
    name = "tensor_ids" if ids is None else f"{prefix}sign_ids"
    return [checks.key_bits(f"{prefix}sign_key", key)], checks.tensor_ids(name, own or [], count)


def _core(core: Factor | AlignedCore | None, weights: list[Tensor], rank: int) -> tuple[list, int | Tensor, str]:
    if core is None:
        return [], 0, "none"
    if isinstance(core, (int, Tensor)):
        return [], checks.key_bits("core", core), "regenerated"
    if isinstance(core, AlignedCore):
        values = checks.tensors("core.singular_values", core.singular_values, (torch.float32,))
        if len(values) != len(weights) or values[0].device != weights[0].device:
            raise ValueError(
                f"core.singular_values: got {len(values)} tensors on {values[0].device}; accepted: one per weight, "
                "on its device"
            )
        for i, s in enumerate(values):
            if s.shape != (rank,) or not s.is_contiguous():
                raise ValueError(
                    f"core.singular_values[{i}]: got shape {tuple(s.shape)}; accepted: contiguous ({rank},)"
                )
        return values, checks.key_bits("core.key", core.key), "aligned"
    cores = checks.tensors("core", core, tuple({torch.float32, weights[0].dtype}))
    kind = "diagonal" if cores[0].dim() == 1 else "full"
    shape = (rank,) if kind == "diagonal" else (rank, rank)
    if len(cores) != len(weights) or cores[0].device != weights[0].device:
        raise ValueError(
            f"core: got {len(cores)} tensors on {cores[0].device}; accepted: one per weight, on its device"
        )
    for i, c in enumerate(cores):
        if c.shape != shape or not c.is_contiguous():
            raise ValueError(
                f"core[{i}]: got shape {tuple(c.shape)} with strides {c.stride()}; accepted: contiguous {shape}"
            )
    return cores, 0, kind


@torch.compiler.disable
def aligned_core(
    singular_values: Sequence[Tensor],
    key: Key,
    *,
    tensor_ids: Sequence[int],
    delta: float,
    sign_key: Key | None = None,
    sign_ids: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """P-GAP's core Z: regenerated normals, shifted along S = diag(s) so that <S, Z> = xi sqrt(delta) |S|.

        alpha = (<S, Z_init> - xi sqrt(delta) |S|) / |S|^2,   Z = Z_init - alpha S            (2510.18228, Algorithm 1)

    Only the diagonal moves. Where |S| = 0 nothing is aligned and Z = Z_init.

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
    strength = checks.scalar_row("delta", delta, 1)
    _check_delta("delta", strength)
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(values))
    sign_bits, ids_sign = sign_of("", sign_key, sign_ids, ids, len(values))
    keys = checks.pack_keys([checks.key_bits("key", key), *sign_bits])
    with torch.no_grad():
        return table.aligned_core(values, keys, ids, ids_sign, strength.item(), backend)
