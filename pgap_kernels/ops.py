"""Every op: schema, fake, checks, docstring, public function. The one door to the backends.

An op takes lists of tensors, checks everything before anything is written, and passes scalars and keys in small
tensors. Formulas are those of docs/kernels.md; rounding happens once, when a weight is written.

Under ``torch.compile`` the public functions run as they are, between graphs: their checks read addresses. The ops
themselves, ``torch.ops.pgap_kernels.*``, can be traced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks
from .noise import check_uint

Scalar = float | Sequence[float] | Tensor
Key = int | Tensor
Draw = tuple[Key, Scalar]

_library = torch.library.Library("pgap_kernels", "DEF")

# One dense pass may hold several stages: draws are grouped by `stages`, and each stage has its row of `decay` and its
# rounding key and rounds as a pass of its own would.
_DENSE = (
    "Tensor keys, Tensor coefficients, Tensor decay, Tensor? rounding_keys, int[] stages, int[] tensor_ids, "
    "int[] slices, str distribution, str tier, str? backend"
)
_LOWRANK = (
    "Tensor[] left, Tensor[] right, Tensor[] core, Tensor keys, Tensor coefficient, Tensor decay, "
    "Tensor? rounding_key, int[] tensor_ids, int[] slices, int rank, str core_kind, str? backend"
)
_library.define(f"dense_perturb_(Tensor(a!)[] weights, {_DENSE}) -> ()")
_library.define(f"dense_perturb_.out(Tensor[] weights, {_DENSE}, *, Tensor(a!)[] out) -> ()")
_library.define(f"lowrank_perturb_(Tensor(a!)[] weights, {_LOWRANK}) -> ()")
_library.define(f"lowrank_perturb_.out(Tensor[] weights, {_LOWRANK}, *, Tensor(a!)[] out) -> ()")
_library.define(
    "assemble_gradient_(Tensor(a!)[] gradients, Tensor keys, Tensor coefficients, int[] tensor_ids, int[] slices, "
    "str distribution, str tier, str? backend) -> ()"
)
_library.define(
    "aligned_core(Tensor[] singular_values, Tensor keys, int[] tensor_ids, int[] sign_ids, float delta, "
    "str? backend) -> Tensor[]"
)
_ops = torch.ops.pgap_kernels


def _written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors changed; library ops do not do it themselves."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _dense_impl(weights, *args, out=None):
    out = weights if out is None else out
    backend = backends.select("dense_perturb_", weights[0].device, weights[0].dtype, args[-1])
    backend.dense_perturb_(weights, out, *args[:-1])
    _written(out)


def _lowrank_impl(weights, *args, out=None):
    out = weights if out is None else out
    backend = backends.select("lowrank_perturb_", weights[0].device, weights[0].dtype, args[-1])
    backend.lowrank_perturb_(weights, out, *args[:-1])
    _written(out)


def _assemble_impl(gradients, *args):
    backend = backends.select("assemble_gradient_", gradients[0].device, torch.float32, args[-1])
    backend.assemble_gradient_(gradients, *args[:-1])
    _written(gradients)


def _aligned_core_impl(singular_values, keys, tensor_ids, sign_ids, delta, backend):
    # Noise from the backend, r numbers per matrix of float64 arithmetic here: the same bits from every backend.
    device = singular_values[0].device
    one = torch.ones(1, 1, dtype=torch.float32)
    cores = [torch.empty(len(s), len(s), device=device, dtype=torch.float32) for s in singular_values]
    signs = [torch.ones(1, device=device, dtype=torch.float32) for _ in singular_values]

    def regenerate(tensors, key, ids, distribution):
        layouts = [x for t in tensors for x in (0, t.shape[-1])]
        _assemble_impl(tensors, key, one, ids, layouts, distribution, "exact", backend)

    regenerate(cores, keys[:1], tensor_ids, "normal")
    if len(keys) > 1:
        regenerate(signs, keys[1:], sign_ids, "rademacher")
    for core, s, sign in zip(cores, singular_values, signs, strict=True):
        s = s.double()
        norm = s.norm()
        if not norm.isfinite():
            raise ValueError("singular_values: got NaN or infinity; accepted: finite values")
        if norm > 0:
            diagonal = core.diagonal()
            alpha = (s @ diagonal.double() - sign.double() * delta**0.5 * norm) / norm**2
            diagonal.copy_(diagonal.double() - alpha * s)
    return cores


def _fake_nothing(*args, **kwargs):
    return None


def _fake_aligned_core(singular_values, *args):
    return [s.new_empty(len(s), len(s), dtype=torch.float32) for s in singular_values]


for _name, _impl, _fake in (
    ("dense_perturb_", _dense_impl, _fake_nothing),
    ("dense_perturb_.out", _dense_impl, _fake_nothing),
    ("lowrank_perturb_", _lowrank_impl, _fake_nothing),
    ("lowrank_perturb_.out", _lowrank_impl, _fake_nothing),
    ("assemble_gradient_", _assemble_impl, _fake_nothing),
    ("aligned_core", _aligned_core_impl, _fake_aligned_core),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pgap_kernels::{_name}", _fake, lib=_library)


_DISTRIBUTIONS = ("normal", "rademacher")
_TIERS = ("exact", "fast")
_ROUNDINGS = ("nearest", "stochastic")


def _noise_options(distribution: str, tier: str) -> None:
    checks.choice("distribution", distribution, _DISTRIBUTIONS)
    checks.choice("tier", tier, _TIERS)


def _rounding_keys(rounding: str, rounding_key: Key | None) -> Tensor | None:
    checks.choice("rounding", rounding, _ROUNDINGS)
    if rounding == "nearest":
        return None
    if rounding_key is None:
        raise ValueError("rounding_key: got None; accepted: a key of role 7 (noise.Role.ROUNDING) with 'stochastic'")
    return checks.key_tensor("rounding_key", [rounding_key])


def _draws(draws: Sequence[Draw], count: int) -> tuple[Tensor, Tensor]:
    if not isinstance(draws, (list, tuple)) or not draws:
        raise ValueError(f"draws: got {draws!r}; accepted: at least one (key, coefficient)")
    for i, draw in enumerate(draws):
        if not isinstance(draw, (list, tuple)) or len(draw) != 2:
            raise TypeError(f"draws[{i}]: got {draw!r}; accepted: (key, coefficient)")
    keys = checks.key_tensor("draws key", [key for key, _ in draws])
    rows = [checks.scalar_row(f"draws[{i}] coefficient", a, count) for i, (_, a) in enumerate(draws)]
    return keys, checks.scalar_table("draws coefficient", rows)


@torch.compiler.disable
def dense_perturb_(
    weights: Sequence[Tensor],
    draws: Sequence[Draw],
    *,
    tensor_ids: Sequence[int],
    decay: Scalar = 0.0,
    out: Sequence[Tensor] | None = None,
    distribution: str = "normal",
    tier: str = "exact",
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> None:
    """Add seeded dense noise to weights, in place, in one pass: perturb, restore, update and replay are all this.

        delta = a_1 z_1,  then  delta = fma(a_j, z_j, delta)  in list order,  then  delta = fma(-d, W, delta)  if d != 0
        W <- round(W + delta)                                            (K1 of the kernel algebra; MeZO, 2305.17333)

    The exact tier gives the same bits on every backend, whatever the tiling, threads, sharding or order of the list.

    Args:
        weights: float32, bfloat16 or float16 tensors of any shape, one dtype and device, with contiguous rows
            (``tensor[i]``); no two may share an element. Empty tensors are fine.
        draws: (key, coefficient) pairs. A key is an integer in [0, 2**64) from ``noise.derive`` or an int64 tensor
            with its bit pattern; a coefficient is a float, a float per tensor, or a tensor of either.
        tensor_ids: one 32-bit id per tensor, from ``noise.tensor_id``.
        decay: d, as a coefficient; with d = lr * weight_decay this is decoupled weight decay.
        out: tensors to write instead of the weights (same shapes, dtype, device, sharing nothing with them).
        distribution: "normal" or "rademacher".
        tier: "exact", or "fast" to allow device-native approximations (|dz| <= 1e-3; CPU serves it exactly).
        rounding: "nearest", or "stochastic" for 16-bit weights, which then needs ``rounding_key`` (role 7).
        slices: (base, row_stride) per tensor that is a shard: its element (row, col) has the index
            base + row * row_stride + col in the unsharded tensor.
        backend: name of the backend to force; None chooses.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; nothing has been written.
    """
    weights = checks.tensors("weights", weights)
    layouts = [checks.matrix_layout(f"weights[{i}]", w) for i, w in enumerate(weights)]
    checks.disjoint("weights", weights, layouts)
    _noise_options(distribution, tier)
    keys, coefficients = _draws(draws, len(weights))
    decays = checks.scalar_table("decay", [checks.scalar_row("decay", decay, len(weights))])
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(weights))
    spans = checks.slices("slices", slices, layouts)
    keys_rounding = _rounding_keys(rounding, rounding_key)
    args = (keys, coefficients, decays, keys_rounding, [len(draws)], ids, spans, distribution, tier, backend)
    with torch.no_grad():
        if out is None:
            _ops.dense_perturb_(weights, *args)
        else:
            _ops.dense_perturb_.out(weights, *args, out=checks.outputs(out, weights))


@torch.compiler.disable
def assemble_gradient_(
    gradients: Sequence[Tensor],
    draws: Sequence[Draw],
    *,
    tensor_ids: Sequence[int],
    distribution: str = "normal",
    tier: str = "exact",
    slices: Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> None:
    """Overwrite G with the weighted sum of seeded noises:  G <- sum_j c_j z(key_j)  in float32, fma in list order.

    With c_j = rho_j / h this is the gradient estimate of P-GAP's refresh (2510.18228), for one scratch at a time.

    Args:
        gradients: float32 tensors, laid out as the weights of ``dense_perturb_``; their content is not read.
        draws, tensor_ids, distribution, tier, slices, backend: as in ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    gradients = checks.tensors("gradients", gradients, (torch.float32,))
    layouts = [checks.matrix_layout(f"gradients[{i}]", g) for i, g in enumerate(gradients)]
    checks.disjoint("gradients", gradients, layouts)
    _noise_options(distribution, tier)
    keys, coefficients = _draws(draws, len(gradients))
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(gradients))
    spans = checks.slices("slices", slices, layouts)
    with torch.no_grad():
        _ops.assemble_gradient_(gradients, keys, coefficients, ids, spans, distribution, tier, backend)


@torch.compiler.disable
def draw(
    shape: Sequence[int] | int,
    key: Key,
    tensor_id: int,
    *,
    distribution: str = "normal",
    offset: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """The noise itself, materialised: what every other op regenerates on the fly.

    Args:
        shape: of the tensor to return.
        key: integer in [0, 2**64) from ``noise.derive``, or an int64 tensor with its bit pattern.
        tensor_id: 32-bit id of the tensor the noise belongs to.
        distribution: "normal" (exact tier) or "rademacher".
        offset: logical index of the first element, offset + numel < 2**63.
        device, backend: where and by whom it is drawn.

    Returns:
        float32 tensor of ``shape`` with z(offset), z(offset + 1), ... in row-major order.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    out = torch.empty(shape, dtype=torch.float32, device=device)
    check_uint("offset", offset, 63)
    span = [(offset, min(offset + max(out.numel(), 1), (1 << 63) - 1))]  # one unsharded row, up to the last element
    flat = out.view(-1)
    assemble_gradient_(
        [flat], [(key, 1.0)], tensor_ids=[tensor_id], distribution=distribution, slices=span, backend=backend
    )
    return out


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
    core: Factor | None = None,
    rank: int | None = None,
    decay: Scalar = 0.0,
    tensor_ids: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
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
        core: C: None, tensors (rank,) for a diagonal, tensors (rank, rank), or a key that regenerates the latter.
        rank: needed if neither factor is stored; 1 <= rank <= min(m, n) of the unsharded weight.
        decay, out, rounding, rounding_key, slices, backend: as in ``dense_perturb_``.
        tensor_ids: needed when something is regenerated or rounded stochastically.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.tensors("weights", weights)
    for i, w in enumerate(weights):
        if w.dim() != 2:
            raise ValueError(f"weights[{i}]: got shape {tuple(w.shape)}; accepted: a matrix")
    layouts = [checks.matrix_layout(f"weights[{i}]", w) for i, w in enumerate(weights)]
    checks.disjoint("weights", weights, layouts)
    left_factors, left_key, left_rank = _factor("left", left, weights, 0)
    right_factors, right_key, right_rank = _factor("right", right, weights, 1)
    given = [r for r in (left_rank, right_rank, rank) if r is not None]
    if not given:
        raise ValueError("rank: got None with both factors regenerated; accepted: the rank of the factors")
    if len(set(given)) > 1:
        raise ValueError(f"rank: got left {left_rank}, right {right_rank}, rank {rank}; accepted: one rank for all")
    if isinstance(given[0], bool) or not isinstance(given[0], int):
        raise TypeError(f"rank: got {given[0]!r}; accepted: an integer")
    spans = checks.slices("slices", slices, layouts)
    # Of a shard only the unsharded row is known: it bounds the rank too.
    sides = [min(w.shape) if slices is None else spans[2 * i + 1] for i, w in enumerate(weights) if w.numel()]
    limit = min(sides, default=given[0])
    if not 1 <= given[0] <= limit:
        raise ValueError(f"rank: got {given[0]}; accepted: 1 to {limit}, the shortest side among the weights")
    cores, core_key, core_kind = _core(core, weights, given[0])
    keys = checks.pack_keys([left_key, right_key, core_key])
    keys_rounding = _rounding_keys(rounding, rounding_key)
    if tensor_ids is None:
        if not left_factors or not right_factors or core_kind == "regenerated" or keys_rounding is not None:
            raise ValueError("tensor_ids: got None; accepted: one per tensor when something is drawn from a key")
        tensor_ids = [0] * len(weights)
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(weights))
    a = checks.scalar_row("coefficient", coefficient, len(weights))
    d = checks.scalar_row("decay", decay, len(weights))
    for i, (rows, columns, _) in enumerate(layouts):
        row, column = divmod(spans[2 * i], spans[2 * i + 1])
        if slices is not None and (row + rows + column + columns) * given[0] >= 1 << 63:
            raise ValueError(f"slices[{i}]: got {slices[i]}; accepted: factor elements with indices below 2**63")
    args = (left_factors, right_factors, cores, keys, a, d, keys_rounding, ids, spans, given[0], core_kind, backend)
    with torch.no_grad():
        if out is None:
            _ops.lowrank_perturb_(weights, *args)
        else:
            _ops.lowrank_perturb_.out(weights, *args, out=checks.outputs(out, weights))


def _core(core: Factor | None, weights: list[Tensor], rank: int) -> tuple[list[Tensor], int | Tensor, str]:
    if core is None:
        return [], 0, "none"
    if isinstance(core, (int, Tensor)):
        return [], checks.key_bits("core", core), "regenerated"
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
    delta = float(checks.scalar_row("delta", delta, 1))
    if sign_ids is not None and sign_key is None:
        raise ValueError("sign_ids: got ids without a sign_key; accepted: both, or neither for xi = +1")
    if delta < 0:
        raise ValueError(f"delta: got {delta}; accepted: 0 or more")
    ids = checks.tensor_ids("tensor_ids", tensor_ids, len(values))
    ids_sign = ids if sign_ids is None else checks.tensor_ids("sign_ids", sign_ids, len(values))
    keys = checks.key_tensor("key, sign_key", [key] if sign_key is None else [key, sign_key])
    with torch.no_grad():
        return _ops.aligned_core(values, keys, ids, ids_sign, delta, backend)
