"""Randomised SVD and the basis that a refresh assembles from its probes."""

from __future__ import annotations

import pytest
import torch

from pgap_kernels import draw, noise
from pgap_kernels.subspace import OVERSAMPLING, gradient_basis, randomized_svd

EPS = torch.finfo(torch.float32).eps
SHAPES = [(40, 24), (24, 40), (17, 1), (1, 17), (5, 5)]


def normal(*shape, key=1):
    return draw(shape, key, 0)


def omega_for(m, n, rank, key=2):
    return normal(n, min(rank + OVERSAMPLING, m, n), key=key)


def tolerance(m, n):
    """Householder QR and products of orthonormal factors: sums of at most max(m, n) terms, one eps each."""
    return max(m, n) * EPS


def assert_orthonormal(columns, m, n):
    """U and V are each a product of a QR's and an inner SVD's factor: three errors, each twice in the Gram matrix."""
    bound = 6 * tolerance(m, n)
    gram = columns.double().T @ columns.double()
    assert (gram - torch.eye(len(gram))).abs().max() <= bound


def truncation(basis):
    u, s, v = (t.double() for t in basis)
    return u * s @ v.T


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_factors_are_orthonormal_and_sorted(m, n, rank):
    rank = min(rank, m, n)
    basis = randomized_svd(normal(m, n), rank, omega_for(m, n, rank))
    assert [tuple(t.shape) for t in basis] == [(m, rank), (rank,), (n, rank)]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in basis)
    assert_orthonormal(basis.left, m, n)
    assert_orthonormal(basis.right, m, n)
    s = basis.singular_values
    assert (s >= 0).all() and (s[:-1] >= s[1:]).all()


@pytest.mark.parametrize("m, n", [(60, 30), (30, 60)])
@pytest.mark.parametrize("true_rank", [1, 4])
def test_captures_an_exactly_low_rank_matrix(m, n, true_rank):
    g = normal(m, true_rank) @ normal(n, true_rank, key=3).T
    basis = randomized_svd(g, 4, omega_for(m, n, 4))
    assert (truncation(basis) - g).norm() <= tolerance(m, n) * g.norm()
    assert (basis.singular_values[true_rank:] <= tolerance(m, n) * basis.singular_values[0]).all()


@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_leading_values_agree_on_decaying_spectra(decay):
    m, n, rank = 64, 48, 6
    u, v = torch.linalg.qr(normal(m, n)).Q, torch.linalg.qr(normal(n, n, key=3)).Q
    g = u * decay ** torch.arange(n) @ v.T
    exact = torch.linalg.svdvals(g)
    got = randomized_svd(g, rank, omega_for(m, n, rank)).singular_values
    # Halko et al., corollary 10.10: expected residual norm e of the range finder with q = 1 power iteration; the values
    # s of Q Q^T G then satisfy  s_j <= sigma_j  and  sigma_j^2 <= s_j^2 + e^2.
    p, tail = OVERSAMPLING, exact[rank:]
    growth = (1 + (rank / (p - 1)) ** 0.5) * tail[0] ** 3
    residual = (growth + torch.e * (rank + p) ** 0.5 / p * (tail**6).sum().sqrt()) ** (1 / 3)
    slack = tolerance(m, n) * exact[0]
    assert (got <= exact[:rank] + slack).all()
    assert (exact[:rank] ** 2 <= (got + slack) ** 2 + residual**2).all()
    assert residual < 2 * exact[rank]  # the bound itself says something


@pytest.mark.parametrize("m, n, rank", [(256, 192, 32), (512, 128, 16), (128, 128, 64)])
def test_keeps_most_of_the_energy_of_pure_noise(m, n, rank):
    """A refresh's G is nearly pure noise. About 80 % of what an exact truncation keeps is usual."""
    g = normal(m, n)
    kept = (randomized_svd(g, rank, omega_for(m, n, rank)).singular_values ** 2).sum()
    best = (torch.linalg.svdvals(g)[:rank] ** 2).sum()
    assert 0.75 * best <= kept <= (1 + tolerance(m, n)) * best


def test_power_iterations_help():
    g, omega = normal(128, 96), omega_for(128, 96, 8)
    kept = [(randomized_svd(g, 8, omega, q).singular_values ** 2).sum() for q in (0, 1, 3)]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("m, n", [(40, 24), (24, 40), (9, 9), (1, 7)])
def test_full_rank_is_the_svd(m, n):
    g, rank = normal(m, n), min(m, n)
    basis = randomized_svd(g, rank, omega_for(m, n, rank))
    assert (truncation(basis) - g).norm() <= tolerance(m, n) * g.norm()
    error = (basis.singular_values - torch.linalg.svdvals(g)).abs().max()
    assert error <= tolerance(m, n) * basis.singular_values[0]


@pytest.mark.parametrize("m, n", SHAPES)
def test_zero_matrix_gives_orthonormal_factors(m, n):
    basis = randomized_svd(torch.zeros(m, n), 1, omega_for(m, n, 1))
    assert_orthonormal(basis.left, m, n)
    assert_orthonormal(basis.right, m, n)
    assert (basis.singular_values == 0).all()


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=r"^rank: got -?\d; accepted: 1 to 4"):
        randomized_svd(normal(4, 6), rank, normal(6, 4))


@pytest.mark.parametrize("shape", [(5, 3), (6, 2), (6, 5)])
def test_bad_test_matrix(shape):
    with pytest.raises(ValueError, match=r"^test_matrix: got shape"):
        randomized_svd(normal(4, 6), 3, normal(*shape))


@pytest.mark.parametrize("shape, rank", [((12, 20), 12), ((20, 12), 3), ((8, 64), 8), ((1, 5), 1)])
def test_gradient_basis_is_the_svd_of_the_explicit_sum(shape, rank):
    m, n = shape
    tid, range_key = noise.tensor_id("layer.weight"), noise.derive(5, 7, noise.Role.RANGE_FINDER)
    draws = [(noise.derive(5, 7, noise.Role.PROBE, j), c) for j, c in enumerate([0.5, -2.0, 0.125])]
    explicit = sum(c * draw(shape, key, tid).double() for key, c in draws)
    scratch = torch.full((m * n + 3,), torch.nan)
    basis = gradient_basis(torch.Size(shape), draws, rank, tensor_id=tid, range_key=range_key, scratch=scratch)
    assert scratch[m * n :].isnan().all()
    g = scratch[: m * n].view(m, n)
    magnitude = sum(abs(c) * draw(shape, key, tid).double().abs() for key, c in draws)
    assert ((g - explicit).abs() <= len(draws) * EPS / 2 * magnitude).all()  # one rounding per draw
    bound = (tolerance(m, n) + len(draws) * EPS) * explicit.norm()
    if rank == min(shape):
        assert (truncation(basis) - explicit).norm() <= bound
    u, s, v = (t.double() for t in basis)
    assert (u.T @ explicit @ v - s.diag()).norm() <= bound
    omega = draw((n, min(rank + OVERSAMPLING, m, n)), range_key, tid)
    for got, expected in zip(basis, randomized_svd(g, rank, omega), strict=True):
        assert torch.equal(got, expected)


def test_gradient_basis_keeps_no_more_than_it_declares():
    scratch = torch.empty(20 * 30)
    basis = gradient_basis(torch.Size((20, 30)), [(1, 1.0)], 4, tensor_id=0, range_key=2, scratch=scratch)  # fmt: skip
    assert [t.untyped_storage().nbytes() for t in basis] == [4 * 20 * 4, 4 * 4, 4 * 30 * 4]
