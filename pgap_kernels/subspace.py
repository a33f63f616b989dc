"""P-GAP's subspace: a matrix's gradient, assembled from probe losses, and the truncated SVD of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

OVERSAMPLING = 8


class Basis(NamedTuple):
    """U (m, r), S (r,), V (n, r) of a matrix; float32, columns of U and V orthonormal."""

    left: Tensor
    singular_values: Tensor
    right: Tensor


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition in which R's diagonal is >= 0: with independent columns there is only one."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)  # numbers alone have the default dtype
    return (q * signs).contiguous()


def randomized_svd(matrix: Tensor, rank: int, test_matrix: Tensor, power_iterations: int = 1) -> Basis:
    """Truncated SVD by a randomised range finder (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1).

    Args:
        matrix: G (m, n), float32.
        rank: 1 <= rank <= min(m, n).
        test_matrix: random Omega (n, p) with rank <= p <= min(m, n); p = rank + ``OVERSAMPLING`` is usual.
        power_iterations: k; the range is that of G (G^T G)^k Omega, in which leading singular values stand out more.

    Returns:
        The ``rank`` leading singular triplets, as far as that range contains them.

    Raises:
        ValueError: rank or test_matrix does not fit the matrix.
    """
    m, n = matrix.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: got {rank}; accepted: 1 to {min(m, n)} for a matrix of {m} x {n}")
    if test_matrix.shape[0] != n or not rank <= test_matrix.shape[1] <= min(m, n):
        raise ValueError(
            f"test_matrix: got shape {tuple(test_matrix.shape)}; accepted: ({n}, p) with {rank} <= p <= {min(m, n)}"
        )
    q = torch.linalg.qr(matrix @ test_matrix).Q
    for _ in range(power_iterations):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    # The SVD of Q^T G (p, n) through the QR of its transpose, so that the dense SVD is only p x p.
    v, r = torch.linalg.qr(matrix.T @ q)
    inner_u, s, inner_vh = torch.linalg.svd(r.T)
    return _signed(q @ inner_u[:, :rank], s[:rank].clone(), v @ inner_vh.T[:, :rank])


def product_basis(left: Tensor, right: Tensor, rank: int) -> Basis:
    """Truncated SVD of L R^T from its factors, (m, p) and (n, p) with p >= rank: the dense SVD is only p x p.

    Raises:
        ValueError: rank is below 1 or above p, m or n.
    """
    limit = min(*left.shape, *right.shape)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank: got {rank}; accepted: 1 to {limit} for factors {tuple(left.shape)}, {tuple(right.shape)}"
        )
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    inner_u, s, inner_vh = torch.linalg.svd(r_left @ r_right.T)
    return _signed(q_left @ inner_u[:, :rank], s[:rank].clone(), q_right @ inner_vh.T[:, :rank])


def _signed(left: Tensor, singular_values: Tensor, right: Tensor) -> Basis:
    """The basis with fixed signs: u_i and v_i may be negated together, and rounding would decide whether they are.

    The element of u_i with the largest magnitude becomes positive.
    """
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return Basis((left * sign).contiguous(), singular_values, (right * sign).contiguous())


def gradient_basis(
    shape: torch.Size, draws: list, rank: int, *, tensor_id: int, range_key: int, scratch: Tensor
) -> Basis:
    """The basis of one matrix from its h probes:  G = sum_j (rho_j / h) Q_j,  then the randomised SVD.

    Args:
        shape: (m, n) of the matrix.
        draws: for each probe, (key of Q_j, rho_j / h).
        rank: of the basis, <= min(m, n).
        tensor_id: of the matrix.
        range_key: key of the test matrix, of ``Role.RANGE_FINDER``.
        scratch: memory for G: float32, at least m * n elements on the matrix's device; overwritten.
    """
    m, n = shape
    gradient = scratch[: m * n].view(m, n)
    ops.assemble_gradient_([gradient], draws, tensor_ids=[tensor_id])
    columns = min(rank + OVERSAMPLING, m, n)
    return randomized_svd(gradient, rank, ops.draw((n, columns), range_key, tensor_id, device=scratch.device))
