"""Dense seeded noise: added to weights, masked, assembled into a gradient estimate, or drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks
from ..arguments import AssembleArguments, DenseArguments, MaskedArguments, schema
from ..noise import check_uint
from ._library import bump_versions, call_pass, define, define_pass, placed, torch_ops, traceable
from ._packing import Draw, Key, Scalar, Slices, noise_options, outputs, pack_draws, rounding_keys, scalar


def _assemble(gradients, **arguments):
    serving = backends.select("assemble_gradient_", gradients[0].device, torch.float32)
    serving.assemble_gradient_(gradients, AssembleArguments(**arguments))
    bump_versions(gradients)


define_pass("dense_perturb_", DenseArguments)
define_pass("masked_perturb_", MaskedArguments)
define(f"assemble_gradient_(Tensor(a!)[] gradients, *, {schema(AssembleArguments)}) -> ()", _assemble)


@traceable
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
    slices: Slices | None = None,
) -> None:
    """Add seeded dense noise to weights, in place, in one pass: perturbing, restoring and updating are all this op.

        delta = a_1 z_1,  then  delta = fma(a_j, z_j, delta)  in list order,  then  delta = fma(-d, W, delta)  if d != 0
        W <- round(W + delta)                                                                      (MeZO, 2305.17333)

    The exact tier gives the same bits on every backend, whatever the tiling, threads, sharding or order of the list.

    Args:
        weights: float32, bfloat16 or float16 tensors of any shape, one dtype and device, with contiguous rows
            (``tensor[i]``); no two may share an element. Empty tensors are fine.
        draws: (key, coefficient) pairs. A key is an integer in [0, 2**64) from ``noise.derive`` or an int64 tensor
            with its bit pattern; a coefficient is a float, a float per tensor, or a tensor of either. Tensors may be on
            any device. On a GPU scalars are not read on the host: with one that is not finite the pass writes nothing,
            and ``raise_if_skipped`` says so.
        tensor_ids: one 32-bit id per tensor, from ``noise.tensor_id``. Tensors with the same id get the same noise, so
            only shards of one tensor, with ``slices``, may share it.
        decay: d, as a coefficient; with d = lr * weight_decay this is decoupled weight decay.
        out: tensors to write instead of the weights (same shapes, dtype, device, sharing nothing with them).
        distribution: "normal" or "rademacher".
        tier: "exact", or "fast" to allow device-native approximations (|dz| <= 1e-3; CPU serves it exactly).
        rounding: "nearest", or "stochastic" for 16-bit weights, which then needs ``rounding_key`` (role 7).
        slices: (base, row_stride) per tensor that is a shard: its element (row, col) has the index
            base + row * row_stride + col in the unsharded tensor.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    noise_options(distribution, tier)
    keys, coefficients = pack_draws(draws, len(weights))
    arguments = DenseArguments(
        keys=keys,
        coefficients=coefficients,
        decay=scalar("decay", decay, len(weights)),
        stages=[len(draws)],
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(weights), may_repeat=slices is not None),
        rounding_keys=rounding_keys(rounding, rounding_key),
        slices=checks.slices("slices", slices, weights),
        distribution=distribution,
        tier=tier,
    )
    call_pass(torch_ops.dense_perturb_, weights, arguments, outputs(out, weights))


@traceable
def masked_perturb_(
    weights: Sequence[Tensor],
    draws: Sequence[Draw],
    *,
    tensor_ids: Sequence[int],
    threshold: Scalar | None = None,
    share: tuple[Key, float] | None = None,
    bits: Sequence[Tensor] | None = None,
    decay: Scalar = 0.0,
    out: Sequence[Tensor] | None = None,
    distribution: str = "normal",
    tier: str = "exact",
    rounding: str = "nearest",
    rounding_key: Key | None = None,
    slices: Slices | None = None,
) -> None:
    """``dense_perturb_`` on the weights that a mask keeps; decay still reaches all of them.

        delta = sum_j a_j z_j where kept, -0 elsewhere;  delta = fma(-d, W, delta) if d != 0;  W <- round(W + delta)

    Exactly one mask is given (Sparse-MeZO, 2402.15751).

    Args:
        threshold: keep where |W| <= threshold, of W as this pass reads it; a float, one per tensor, or a tensor. A
            mask of the unperturbed weights cannot be read back from perturbed ones: use ``out``, or ``bits``.
        share: (key of role 5, p): keep each element with probability p, by its word under the key.
        bits: one contiguous int32 tensor per weight, bit e & 31 of number e >> 5 for its element e (row-major, of the
            tensor given, not of an unsharded one), as ``threshold_bits`` makes them.
        weights, draws, tensor_ids, decay, out, distribution, tier, rounding, rounding_key, slices: as in
            ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    weights = checks.matrices("weights", weights)
    noise_options(distribution, tier)
    keys, coefficients = pack_draws(draws, len(weights))
    mask, mask_key, mask_level, mask_bits = mask_arguments(weights, threshold, share, bits)
    arguments = MaskedArguments(
        keys=keys,
        coefficients=coefficients,
        decay=scalar("decay", decay, len(weights)),
        mask=mask,
        mask_key=mask_key,
        mask_level=mask_level,
        mask_bits=mask_bits,
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(weights), may_repeat=slices is not None),
        rounding_key=rounding_keys(rounding, rounding_key),
        slices=checks.slices("slices", slices, weights),
        distribution=distribution,
        tier=tier,
    )
    call_pass(torch_ops.masked_perturb_, weights, arguments, outputs(out, weights))


def mask_arguments(weights, threshold, share, bits) -> tuple[str, Tensor, Tensor, list[Tensor]]:
    """(kind, key, level, bits) as the op takes them; level holds float32 thresholds, or an int64 limit of words."""
    key = torch.zeros(1, dtype=torch.int64, device="cpu")
    level = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    given = [name for name, value in (("threshold", threshold), ("share", share), ("bits", bits)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"threshold, share, bits: got {', '.join(given) or 'none'}; accepted: exactly one of them")
    if threshold is not None:
        return "threshold", key, scalar("threshold", threshold, len(weights)), []
    if share is not None:
        if not isinstance(share, (list, tuple)) or len(share) != 2:
            raise TypeError(f"share: got {share!r}; accepted: (key, probability)")
        probability = checks.number("share probability", share[1])
        if not 0 <= probability <= 1:
            raise ValueError(f"share probability: got {probability!r}; accepted: a float from 0 to 1")
        limit = torch.full((1, 1), int(probability * 2**32), dtype=torch.int64, device="cpu")
        return "share", checks.key_tensor("share key", [share[0]]), limit, []
    given_bits = checks.tensors("bits", bits, (torch.int32,))
    if len(given_bits) != len(weights) or given_bits[0].device != weights[0].device:
        raise ValueError(
            f"bits: got {len(given_bits)} tensors on {given_bits[0].device}; accepted: {len(weights)} on "
            f"{weights[0].device}"
        )
    for i, (b, w) in enumerate(zip(given_bits, weights, strict=True)):
        if b.shape != (-(-w.numel() // 32),) or not b.is_contiguous():
            raise ValueError(
                f"bits[{i}]: got shape {tuple(b.shape)} with strides {b.stride()}; accepted: contiguous "
                f"({-(-w.numel() // 32)},), 32 elements of weights[{i}] in each"
            )
    return "bits", key, level, given_bits


def threshold_bits(weights: Sequence[Tensor], threshold: Scalar) -> list[Tensor]:
    """Masks of the weights that are at most a threshold in magnitude, one bit each, for ``masked_perturb_(bits=...)``.

    Args:
        weights: as in ``dense_perturb_``, unperturbed.
        threshold: a float, one per tensor, or a tensor of either; |W| <= threshold is kept, compared in float32.

    Returns:
        One int32 tensor of ceil(numel / 32) per weight.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weights = checks.tensors("weights", weights)
    levels = checks.scalar_row("threshold", threshold, len(weights)).to(weights[0].device).expand(len(weights))
    return [_bits_of(w.detach().reshape(-1), level) for w, level in zip(weights, levels, strict=True)]


def _bits_of(elements: Tensor, level: Tensor) -> Tensor:
    """A piece at a time, as packing takes 17 bytes an element."""
    return torch.cat([_packed(piece.float().abs() <= level) for piece in elements.split(_PIECE)])


def _packed(keep: Tensor) -> Tensor:
    words = torch.nn.functional.pad(keep, (0, -len(keep) % 32)).view(-1, 32).long()
    packed = (words << torch.arange(32, device=keep.device)).sum(1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


_PIECE = 1 << 18  # elements; a multiple of 32


@traceable
def assemble_gradient_(
    gradients: Sequence[Tensor],
    draws: Sequence[Draw],
    *,
    tensor_ids: Sequence[int],
    distribution: str = "normal",
    tier: str = "exact",
    slices: Slices | None = None,
) -> None:
    """Overwrite G with the weighted sum of seeded noises:  G <- sum_j c_j z(key_j)  in float32, fma in list order.

    With c_j = rho_j / h this is the gradient estimate of P-GAP's refresh (2510.18228), for one scratch at a time.

    Args:
        gradients: float32 tensors, laid out as the weights of ``dense_perturb_``; their content is not read.
        draws, tensor_ids, distribution, tier, slices: as in ``dense_perturb_``.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    gradients = checks.matrices("gradients", gradients, (torch.float32,))
    noise_options(distribution, tier)
    keys, coefficients = pack_draws(draws, len(gradients))
    arguments = AssembleArguments(
        keys=keys,
        coefficients=coefficients,
        tensor_ids=checks.tensor_ids("tensor_ids", tensor_ids, len(gradients)),
        slices=checks.slices("slices", slices, gradients),
        distribution=distribution,
        tier=tier,
    )
    arguments = placed(arguments, gradients[0].device)
    with torch.no_grad():
        torch_ops.assemble_gradient_(gradients, **arguments._asdict())


@traceable
def draw(
    shape: Sequence[int] | int,
    key: Key,
    tensor_id: int,
    *,
    distribution: str = "normal",
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The noise itself, materialised; every other op regenerates it in the kernel.

    Args:
        shape: of the tensor to return.
        key: integer in [0, 2**64) from ``noise.derive``, or an int64 tensor with its bit pattern.
        tensor_id: 32-bit id of the tensor the noise belongs to.
        distribution: "normal" (exact tier) or "rademacher".
        offset: logical index of the first element, offset + numel < 2**63.
        device: where it is drawn.

    Returns:
        float32 tensor of ``shape`` with z(offset), z(offset + 1), ... in row-major order.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    sizes = [shape] if isinstance(shape, int) else shape
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"shape: got {shape!r}; accepted: an integer or a list of them")
    sizes = [check_uint(f"shape[{i}]", size, 63) for i, size in enumerate(sizes)]
    out = torch.empty(sizes, dtype=torch.float32, device=checks.device("device", device))
    offset, tensor_id = check_uint("offset", offset, 63), check_uint("tensor_id", tensor_id, 32)
    checks.key_bits("key", key)
    if offset + out.numel() >= 1 << 63:
        raise ValueError(f"offset: got {offset} for {out.numel()} elements; accepted: offset + numel below 2**63")
    span = [(offset, min(offset + max(out.numel(), 1), (1 << 63) - 1))]  # one unsharded row, up to the last element
    flat = out.view(-1)
    assemble_gradient_([flat], [(key, 1.0)], tensor_ids=[tensor_id], distribution=distribution, slices=span)
    return out
