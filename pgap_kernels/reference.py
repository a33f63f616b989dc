"""Plain-PyTorch implementation of every op: the definition that the other backends are tested against.

Runs on any device with float64. The exact tier of ``normal`` is bit-identical to the C++ and Triton kernels, so
fused multiply-adds are emulated exactly and square roots go through float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .noise import KEY_INCREMENTS, MASK32, MULTIPLIERS, ROUNDS

name = "reference"

_CHUNK = 1 << 18  # elements drawn at a time: small enough for the temporaries to stay in cache

# Coefficients of docs/noise_v1.md, highest power first; every one is a float32.
_LOG = (
    0.018356049433350563,
    -0.035056427121162415,
    0.05750589445233345,
    -0.10655020922422409,
    0.2118314653635025,
    -0.47113385796546936,
)
_LOG_SCALE = -1.6525916635146132e-07
_SIN = (0.5577369928359985, -2.543327808380127, 5.16733455657959, -3.1415886878967285)
_COS = (0.21807317435741425, -1.331023931503296, 4.058268070220947, -4.934784889221191, 0.9999998807907104)


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend does not serve the op there, or None."""
    if device.type == "mps":
        return "needs float64, which MPS has not"
    return None


# ---- noise --------------------------------------------------------------------------------------------------------


def fma(a: Tensor | float, b: Tensor, c: Tensor | float) -> Tensor:
    """Correctly rounded a * b + c in float32: exact product in float64, the sum rounded to odd, then to float32."""
    product = b.double() * a if isinstance(a, float) else b.double() * a.double()
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    odd = bits + torch.where(inexact, torch.where(away, 1, -1), 0)
    return odd.view(torch.float64).float()


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = fma(coefficients[0], x, coefficients[1])
    for coefficient in coefficients[2:]:
        value = fma(value, x, coefficient)
    return value


def _float_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of 32-bit words (held in int64) -> the two normals of each pair, float32."""
    u = _float_bits((a >> 9) | 0x3F800000) - 0.999999940395355224609375
    bits = u.view(torch.int32)
    i = (bits - 0x3F800000).float()
    s = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32) - 1.5
    square = fma(_LOG_SCALE, i, fma(-s, s, 0.25) * _horner(s, _LOG))
    radius = square.double().sqrt().float()  # torch's float32 sqrt is not correctly rounded
    radius = torch.where(b >= 1 << 31, -radius, radius)
    y = _float_bits(((b >> 8) & 0x007FFFFF) | 0x3F800000) - 1.5
    w = y * y
    return radius * (y * _horner(w, _SIN)), radius * _horner(w, _COS)


def philox(c0: Tensor, c1: Tensor, tensor_id: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 of counters (c0, c1, tensor_id, 0); words are held in int64."""
    x0, x1 = c0, c1
    x2, x3 = torch.full_like(c0, tensor_id), torch.zeros_like(c0)
    k0, k1 = key & MASK32, key >> 32 & MASK32
    for _ in range(ROUNDS):
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]  # wraps modulo 2**64: both words stay right
        x0, x1, x2, x3 = (p1 >> 32 & MASK32) ^ x1 ^ k0, p1 & MASK32, (p0 >> 32 & MASK32) ^ x3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return x0, x1, x2, x3


def _group_words(begin: int, count: int, tensor_id: int, key: int, device: torch.device) -> tuple[tuple, int]:
    """Words of the whole groups that hold elements begin .. begin+count, as four (groups, 1024) lanes, and the skip."""
    first, last = begin >> 12, (begin + count - 1) >> 12
    group = torch.arange(first, last + 1, device=device, dtype=torch.int64)[:, None]
    r = torch.arange(1024, device=device, dtype=torch.int64)[None, :]
    c0, c1 = (group << 10 & MASK32) | r, (group >> 22).expand(-1, 1024)
    return philox(c0, c1, tensor_id, key), begin - (first << 12)


def words(begin: int, count: int, tensor_id: int, key: int, device: torch.device) -> Tensor:
    """The 32-bit word of each element begin .. begin+count, in int64."""
    lanes, skip = _group_words(begin, count, tensor_id, key, device)
    return torch.stack(lanes, dim=1).flatten()[skip : skip + count]


def noise(begin: int, count: int, tensor_id: int, key: int, distribution: str, device: torch.device) -> Tensor:
    """z of the logical elements begin .. begin+count, float32."""
    if distribution == "rademacher":
        first = begin >> 5
        packed = words(first, ((begin + count - 1) >> 5) - first + 1, tensor_id, key, device)
        bits = packed[:, None] >> torch.arange(32, device=device) & 1
        return (2.0 * bits - 1.0).float().flatten()[begin & 31 : (begin & 31) + count]
    (x0, x1, x2, x3), skip = _group_words(begin, count, tensor_id, key, device)
    lanes = (*box_muller(x0, x1), *box_muller(x2, x3))
    return torch.stack(lanes, dim=1).flatten()[skip : skip + count]


# ---- rounding -----------------------------------------------------------------------------------------------------


def stochastic_round(value: Tensor, word: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to ``dtype``: up in magnitude iff word's top 16 bits * 2**-16 < (|v| - lo) / (hi - lo)."""
    nearest = value.to(dtype)
    if dtype == torch.float32:
        return nearest
    magnitude = value.abs().double()
    low = value.abs().to(dtype)
    low = torch.where(low.double() > magnitude, (low.view(torch.int16) - 1).view(dtype), low)
    high = (low.view(torch.int16) + 1).view(dtype)
    fraction = (magnitude - low.double()) / (high.double() - low.double())
    up = (word >> 16).double() * 2.0**-16 < fraction
    rounded = torch.where(up, high, low).copysign(value.to(dtype))
    return torch.where(magnitude <= torch.finfo(dtype).max, rounded, nearest)


# ---- ops ----------------------------------------------------------------------------------------------------------


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor as (rows, columns) in its own storage: first dimension by the rest, vectors as one row."""
    if tensor.dim() < 2:
        return tensor.as_strided((1, tensor.numel()), (tensor.numel(), 1))
    columns = tensor.numel() // tensor.shape[0]
    return tensor.as_strided((tensor.shape[0], columns), (tensor.stride(0), 1))


def _runs(matrix: Tensor, base: int, row_stride: int) -> Iterator[tuple[slice | int, slice, int, int]]:
    """Runs of at most _CHUNK elements with consecutive indices: (row, columns, first logical index, length)."""
    for row in range(matrix.shape[0]):
        for begin in range(0, matrix.shape[1], _CHUNK):
            end = min(begin + _CHUNK, matrix.shape[1])
            yield row, slice(begin, end), base + row * row_stride + begin, end - begin


def _flat(source: Tensor, out: Tensor, row_stride: int) -> tuple[Tensor, Tensor, int]:
    """Both tensors as matrices, as one row where rows follow each other in memory and in the logical index."""
    source, out = _matrix(source), _matrix(out)
    rows, columns = out.shape
    if source.is_contiguous() and out.is_contiguous() and row_stride == columns:
        return source.view(1, -1), out.view(1, -1), rows * columns
    return source, out, row_stride


def _dense(sources, outs, read, keys, coefficients, decay, rounding_keys, stages, tensor_ids, slices, distribution):
    for t, (source, out) in enumerate(zip(sources, outs, strict=True)):
        if out.numel() == 0:
            continue
        base, row_stride = slices[2 * t : 2 * t + 2]
        source, out, row_stride = _flat(source, out, row_stride)
        column = t if coefficients.shape[1] > 1 else 0
        decay_column = t if decay.shape[1] > 1 else 0
        for row, columns, begin, count in _runs(out, base, row_stride):
            value, j = source[row, columns], 0
            for stage, draws in enumerate(stages):
                delta = torch.zeros(count, dtype=torch.float32, device=out.device)
                for first in range(draws):
                    z = noise(begin, count, tensor_ids[t], keys[j], distribution, out.device)
                    a = coefficients[j, column]
                    delta = fma(a, z, delta) if first else a * z
                    j += 1
                if read:
                    weight, d = value.float(), decay[stage, decay_column]
                    if d != 0:
                        delta = fma(-d, weight, delta)
                    delta = weight + delta
                if rounding_keys is None:
                    value = delta.to(out.dtype)
                else:
                    word = words(begin, count, tensor_ids[t], rounding_keys[stage], out.device)
                    value = stochastic_round(delta, word, out.dtype)
            out[row, columns] = value


def _ints(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


def dense_perturb_(
    weights, out, keys, coefficients, decay, rounding_keys, stages, tensor_ids, slices, distribution, tier
):
    """W <- W - d W + sum_j a_j z(key_j), stage by stage; formula and order in ``ops.dense_perturb_``."""
    _dense(
        weights,
        out,
        True,
        keys.tolist(),
        coefficients.to(weights[0].device),
        decay.to(weights[0].device),
        _ints(rounding_keys),
        stages,
        tensor_ids,
        slices,
        distribution,
    )


def assemble_gradient_(gradients, keys, coefficients, tensor_ids, slices, distribution, tier):
    """G <- sum_j c_j z(key_j), float32."""
    device = gradients[0].device
    none = torch.zeros(1, 1, dtype=torch.float32, device=device)
    draws = [len(keys)]
    _dense(
        gradients,
        gradients,
        False,
        keys.tolist(),
        coefficients.to(device),
        none,
        None,
        draws,
        tensor_ids,
        slices,
        distribution,
    )


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
):
    """W <- W - d W + a A C B^T; formula and rounding in ``ops.lowrank_perturb_``."""
    left_key, right_key, core_key = keys.tolist()
    for t, (source, target) in enumerate(zip(weights, out, strict=True)):
        if target.numel() == 0:
            continue
        base, row_stride = slices[2 * t : 2 * t + 2]
        (m, n), device, dtype = source.shape, source.device, source.dtype

        def regenerate(rows, first, key, tensor_id=tensor_ids[t], device=device):
            return noise(first * rank, rows * rank, tensor_id, key, "normal", device).view(rows, rank)

        a = left[t].float() if left else regenerate(m, base // row_stride, left_key)
        b = right[t].float() if right else regenerate(n, base % row_stride, right_key)
        if core_kind == "diagonal":
            a = a * core[t].float()
        elif core_kind == "full":
            a = a @ core[t].float()
        elif core_kind == "regenerated":
            a = a @ regenerate(rank, 0, core_key)
        a, b = a.to(dtype).float(), b.to(dtype).float()
        scale = coefficient[t if len(coefficient) > 1 else 0].to(device)
        d = decay[t if len(decay) > 1 else 0].to(device)
        weight = source.float()
        value = scale * (a @ b.T)
        if d != 0:
            value = value - d * weight
        value = weight + value
        if rounding_key is None:
            target.copy_(value)
            continue
        key = rounding_key.item()
        for row in range(m):
            word = words(base + row * row_stride, n, tensor_ids[t], key, device)
            target[row] = stochastic_round(value[row], word, dtype)
