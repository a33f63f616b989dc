"""W <- W - d W + a A C B^T, and P-GAP's aligned core; ``ops.lowrank``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..arguments import AssembleArguments, LowRankArguments
from .dense import assemble_gradient_
from .layout import column, rounded
from .noise import noise


def _sums(rows: Tensor) -> Tensor:
    """Sums of rows whose length is a power of two, by halves: appended zeros and the device do not change the bits."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def _padded(rows: list[Tensor]) -> Tensor:
    """Vectors as the rows of a matrix, zeros after the shorter ones."""
    if len({row.shape[0] for row in rows}) == 1:
        return torch.stack(rows)  # many times faster if it is made on the host
    return pad_sequence(rows, batch_first=True)


def aligned(diagonals: Tensor | list[Tensor], singular_values: list[Tensor], signs: list[Tensor], delta: float) -> None:
    """Shift the diagonals of regenerated cores so that <S, Z> = xi sqrt(delta) |S|; in place, in float64 inside."""
    s = _padded(singular_values).double()
    z = (_padded(diagonals) if isinstance(diagonals, list) else diagonals).double()
    rank = s.shape[1]
    s, z = (pad(rows, (0, (1 << (rank - 1).bit_length()) - rank)) for rows in (s, z))
    norm = _sums(s * s).sqrt()
    if norm.device.type == "cpu" and not norm.isfinite().all():  # on a GPU the question would wait for the device
        raise ValueError("singular_values: got NaN or infinity; accepted: finite values")
    alpha = (_sums(s * z) - torch.cat(signs).double() * delta**0.5 * norm) / norm**2
    shifted = z - torch.where(norm > 0, alpha, 0.0)[:, None] * s
    if isinstance(diagonals, Tensor):
        diagonals.copy_(shifted[:, :rank])
        return
    for diagonal, row in zip(diagonals, shifted, strict=True):
        diagonal.copy_(row[: diagonal.shape[0]])


def cores_and_signs(singular_values, keys, tensor_ids, sign_ids, assemble):
    """Z_init, its diagonal, and xi of each matrix, drawn by a backend's ``assemble_gradient_``."""
    device, one = singular_values[0].device, torch.ones(1, 1, dtype=torch.float32, device="cpu")
    ranks = [s.shape[0] for s in singular_values]
    cores: list[Tensor]
    diagonals: Tensor | list[Tensor]
    if len({*ranks}) == 1:  # in one piece: a few calls serve hundreds of matrices
        stack = torch.empty(len(ranks), ranks[0], ranks[0], device=device, dtype=torch.float32)
        cores, diagonals = list(stack.unbind()), stack.diagonal(dim1=1, dim2=2)
    else:
        cores = [torch.empty(r, r, device=device, dtype=torch.float32) for r in ranks]
        diagonals = [core.diagonal() for core in cores]
    signs = list(torch.ones(len(ranks), 1, device=device, dtype=torch.float32).unbind())
    assemble(cores, AssembleArguments(keys[:1], one, tensor_ids))
    if len(keys) > 1:
        assemble(signs, AssembleArguments(keys[1:], one, sign_ids, distribution="rademacher"))
    return cores, diagonals, signs


def aligned_core(singular_values, keys, tensor_ids, sign_ids, delta, assemble=assemble_gradient_):
    """Noise from the backend; the arithmetic, on r float64 numbers per matrix, is here: the same bits everywhere."""
    cores, diagonals, signs = cores_and_signs(singular_values, keys, tensor_ids, sign_ids, assemble)
    aligned(diagonals, singular_values, signs, delta)
    return cores


def lowrank_perturb_(weights, out, arguments: LowRankArguments):
    """Matrix products of float32; for 16-bit W, A C and B are rounded once to W's dtype."""
    left, right, core, core_kind = arguments.left, arguments.right, arguments.core, arguments.core_kind
    coefficient, decay, rank = arguments.coefficient, arguments.decay, arguments.rank
    tensor_ids, slices, rounding_key = arguments.tensor_ids, arguments.slices, arguments.rounding_key
    left_key, right_key, core_key = arguments.keys.tolist()
    for t, (source, target) in enumerate(zip(weights, out, strict=True)):
        if target.numel() == 0:
            continue
        (m, n), device, dtype = source.shape, source.device, source.dtype
        base, row_stride = slices[2 * t : 2 * t + 2] or (0, n)

        def regenerate(rows, first, key, tensor_id=tensor_ids[t], device=device):
            return noise(first * rank, rows * rank, tensor_id, key, "normal", device).view(rows, rank)

        a = left[t].float() if left else regenerate(m, base // row_stride, left_key)
        b = right[t].float() if right else regenerate(n, base % row_stride, right_key)
        d = decay[column(decay, t)].to(device)
        weight = source.float()
        with torch.autocast(device.type, enabled=False):  # a hook may run in the forward's
            if arguments.below:
                squares = a * a * arguments.below[t].float()
            if core_kind == "diagonal":
                a = a * core[t].float()
            elif core_kind == "full":
                a = a @ core[t].float()
            elif core_kind == "regenerated":
                a = a @ regenerate(rank, 0, core_key)
            a, b = a.to(dtype).float(), b.to(dtype).float()
            value = coefficient[column(coefficient, t)].to(device) * (a @ b.T)
            if arguments.e is not None:
                value = value / (squares @ (b * b).T + arguments.e[column(arguments.e, t)].to(device)).sqrt()
        if d != 0:
            value = value - d * weight
        value = weight + value
        key = None if rounding_key is None else int(rounding_key)
        if key is None:
            target.copy_(value)
            continue
        for row in range(m):
            target[row] = rounded(value[row], target, key, base + row * row_stride, tensor_ids[t])
