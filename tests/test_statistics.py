"""Statistics of the stream. Bounds: five standard errors of the statistic under the null, from n and exact moments.

Draws have fixed keys, so a check passes or fails for good; five standard errors are p = 6e-7, and the Kolmogorov bound
is taken at p = 1e-6. Box-Muller's lattice (2**24 angles, 2**23 radii) is finer than both.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pgap_kernels import noise, ops

N = 10_000_000
M = 1 << 20
KEY = noise.derive(123, 0, noise.Role.DENSE)
IDENT = noise.tensor_id("statistics")


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return ops.draw(N, KEY, IDENT)


@pytest.fixture(scope="module")
def signs() -> Tensor:
    return ops.draw(N, KEY, IDENT, distribution="rademacher")


@pytest.mark.parametrize(
    ("power", "mean", "variance"),
    [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)],
)
def test_moments(normal, power, mean, variance):
    """E z^p = (p-1)!! for even p, else 0; Var z^p = E z^2p - (E z^p)^2; the mean of n has variance Var / n."""
    assert abs(normal.double().pow(power).mean().item() - mean) <= 5 * math.sqrt(variance / N)


def test_skewness_and_kurtosis(normal):
    """Standardised by the sample's own moments: variances 6 / n and 24 / n."""
    z = normal.double()
    z = (z - z.mean()) / z.std(correction=0)
    assert abs(z.pow(3).mean().item()) <= 5 * math.sqrt(6 / N)
    assert abs(z.pow(4).mean().item() - 3) <= 5 * math.sqrt(24 / N)


@pytest.mark.parametrize("lane", range(4))
def test_kolmogorov(normal, lane):
    """sup |F_n - F| <= c / sqrt(n), c the root of 2 exp(-2 c^2) = 1e-6; every lane by itself."""
    z = normal[: N // 4096 * 4096].view(-1, 4, 1024)[:, lane].flatten().sort().values
    below = torch.special.ndtr(z.double())
    n = len(z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((below - steps[:-1]).max().item(), (steps[1:] - below).max().item())
    assert distance * math.sqrt(n) <= math.sqrt(math.log(2e6) / 2)


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0, 4.5])
def test_tails(normal, bound):
    """Counts beyond +-bound are binomial."""
    p = math.erfc(bound / math.sqrt(2)) / 2
    for count in ((normal > bound).sum().item(), (normal < -bound).sum().item()):
        assert abs(count - N * p) <= 5 * math.sqrt(N * p * (1 - p))


def test_range(normal):
    """The lattice ends at sqrt(-2 ln 2**-24); the largest of 1e7 normals is beyond 4.5 but for p = 3e-30."""
    assert 4.5 < normal.abs().max().item() < 5.7682


def correlation_bound(n: int) -> float:
    """The mean of n products of independent standardised numbers has variance 1 / n."""
    return 5 / math.sqrt(n)


def assert_uncorrelated(x: Tensor, y: Tensor) -> None:
    """x, y and their squares: Var(z^2) = 2, so (z^2 - 1)(z'^2 - 1) / 2 is standardised."""
    x, y = x.double().flatten(), y.double().flatten()
    bound = correlation_bound(len(x))
    assert abs((x * y).mean().item()) <= bound
    assert abs(((x * x - 1) * (y * y - 1)).mean().item() / 2) <= bound
    assert abs(((x * x - 1) * y).mean().item() / math.sqrt(2)) <= bound


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(range(4), 2)])
def test_lanes_are_uncorrelated(normal, first, second):
    """Lanes 0 and 1, 2 and 3 share a radius and an angle."""
    lanes = normal[: N // 4096 * 4096].view(-1, 4, 1024)
    assert_uncorrelated(lanes[:, first], lanes[:, second])


@pytest.mark.parametrize(
    "lag", [1, 1024, 4096, *(pytest.param(lag, marks=pytest.mark.slow) for lag in (2, 16, 31, 32, 1023, 4095, 4097))]
)
def test_neighbours_are_uncorrelated(normal, lag):
    assert_uncorrelated(normal[:-lag], normal[lag:])


@pytest.mark.parametrize(
    ("seed", "step", "role", "probe", "ident"),
    [
        (124, 0, 0, 0, IDENT),
        (123 + (1 << 32), 0, 0, 0, IDENT),
        (123, 1, 0, 0, IDENT),
        (123, 1 << 32, 0, 0, IDENT),
        (123, 0, 1, 0, IDENT),
        (123, 0, 6, 0, IDENT),
        (123, 0, 0, 1, IDENT),
        (123, 0, 0, 2**24 - 1, IDENT),
        (123, 0, 0, 0, IDENT + 1),
        (123, 0, 0, 0, IDENT ^ 1 << 31),
    ],
)
def test_other_streams_are_uncorrelated(normal, seed, step, role, probe, ident):
    assert_uncorrelated(normal[:M], ops.draw(M, noise.derive(seed, step, role, probe), ident))


def test_far_elements_are_uncorrelated(normal):
    for offset in (1 << 32, 1 << 34, 1 << 44, 1 << 62):
        assert_uncorrelated(normal[:M], ops.draw(M, KEY, IDENT, offset=offset))


def test_close_seeds_and_steps_sum_to_normals():
    """The sum over 256 keys derived from close seeds, and from close steps, has the variance of independent ones."""
    for keys in (
        [noise.derive(seed, 7, noise.Role.DENSE) for seed in range(256)],
        [noise.derive(7, step, noise.Role.PROBE) for step in range(256)],
        [noise.derive(7, 7, noise.Role.PROBE, probe) for probe in range(256)],
    ):
        total = torch.zeros(1 << 16)
        ops.assemble_gradient_([total], [(key, 1 / 16) for key in keys], tensor_ids=[IDENT])
        assert abs(total.double().mean().item()) <= 5 / math.sqrt(len(total))
        assert abs(total.double().square().mean().item() - 1) <= 5 * math.sqrt(2 / len(total))


def test_rademacher_balance(signs):
    assert signs.abs().eq(1).all()
    assert abs(signs.double().mean().item()) <= 5 / math.sqrt(N)
    by_bit = signs[: N // 32 * 32].view(-1, 32).double().mean(0)
    assert by_bit.abs().max().item() <= 5 / math.sqrt(N // 32)


@pytest.mark.parametrize("lag", [1, 2, 3, 31, 32, 33, 1024, 32768, 32769])
def test_rademacher_pairs(signs, lag):
    assert abs((signs[:-lag] * signs[lag:]).double().mean().item()) <= correlation_bound(N - lag)


def test_rademacher_bits_of_a_word(signs):
    """All 496 pairs of bits; the bound is Bonferroni's at p = 6e-7 for the whole matrix, 6.1 sigma."""
    words = signs[: N // 32 * 32].view(-1, 32)
    products = (words.T @ words).double() / len(words) - torch.eye(32, dtype=torch.float64)
    sigmas = -torch.special.ndtri(torch.tensor(6e-7 / 2 / 496, dtype=torch.float64)).item()
    assert products.abs().max().item() <= sigmas / math.sqrt(len(words))


def test_rademacher_runs_are_binomial(signs):
    """Bytes of eight signs take all 256 values equally often: chi-square with 255 degrees of freedom, 5 sigma."""
    weights = 2.0 ** torch.arange(8)
    values = ((signs[: N // 8 * 8].view(-1, 8) + 1) / 2 @ weights).long()
    counts = torch.bincount(values, minlength=256).double()
    expected = len(values) / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) <= 5 * math.sqrt(2 * 255)


def test_rademacher_streams_are_uncorrelated(signs):
    for key, ident in ((noise.derive(123, 1, 0), IDENT), (noise.derive(124, 0, 0), IDENT), (KEY, IDENT + 1)):
        other = ops.draw(M, key, ident, distribution="rademacher")
        assert abs((signs[:M] * other).double().mean().item()) <= correlation_bound(M)


def test_rounding_stream_is_its_own():
    """Roles 0 and 7 of one step share no words: a rounding never follows the noise that it rounds."""
    dense, rounding = (ops.draw(M, noise.derive(5, 5, role), IDENT) for role in (noise.Role.DENSE, noise.Role.ROUNDING))
    assert_uncorrelated(dense, rounding)
