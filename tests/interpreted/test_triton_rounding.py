"""Rounding on the Triton side: the conversions of the interpreter, to nearest, and stochastically."""

import pytest
import torch
import triton
import triton.language as tl
from support.helpers import assert_same_bits

from pgap_kernels import reference
from pgap_kernels.triton.rounding import TYPES, round_to, stochastic

HALF_DTYPES = (torch.bfloat16, torch.float16)
N = 1 << 19


@triton.jit
def convert_kernel(out_ptr, x_ptr, TYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(TYPE))


@triton.jit
def round_kernel(out_ptr, x_ptr, TYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, round_to(tl.load(x_ptr + i), TYPE))


@triton.jit
def stochastic_kernel(out_ptr, x_ptr, word_ptr, TYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = stochastic(tl.load(x_ptr + i), tl.load(word_ptr + i).to(tl.uint32), TYPE)
    tl.store(out_ptr + i, value)


def patterns(dtype) -> torch.Tensor:
    """Every number of a 16-bit type."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def around(dtype) -> torch.Tensor:
    """float32 on, and at both neighbours of, every number of a 16-bit type, every tie, every quarter; beyond the
    largest number, infinities, NaN and the smallest float32; of either sign."""
    numbers = patterns(dtype)[: 1 << 15].double()
    numbers = numbers[numbers.isfinite()]
    middle = (numbers[1:] + numbers[:-1]) / 2
    quarters = torch.cat([(middle + numbers[1:]) / 2, (middle + numbers[:-1]) / 2])
    exact = torch.cat([numbers, middle, quarters]).float()
    infinity = torch.tensor(torch.inf)
    edges = [torch.finfo(dtype).max * x for x in (1 + 2.0**-12, 1 + 2.0**-9, 1 + 2.0**-8, 1.01)]
    edges = torch.tensor([*edges, torch.inf, torch.nan, 2.0**-149, 1e-40, 3e38], dtype=torch.float64).float()
    x = torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity), edges])
    signs = 1 - 2 * torch.randint(2, (N,), generator=torch.Generator().manual_seed(1))
    return torch.cat([x, edges.repeat(N)])[:N] * signs


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_the_interpreter_converts_as_torch(dtype):
    """Not ours, but what everything here stands on."""
    wide, half = torch.full((1 << 16,), 7.0), torch.full((N,), 7.0, dtype=dtype)
    convert_kernel[(1,)](wide, patterns(dtype), TYPE=tl.float32, N=1 << 16)
    assert_same_bits(wide, patterns(dtype).float())
    convert_kernel[(1,)](half, around(dtype), TYPE=TYPES[dtype], N=N)
    assert_same_bits(half, around(dtype).to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, *HALF_DTYPES))
def test_nearest(dtype):
    x = around(torch.bfloat16 if dtype == torch.float32 else dtype)
    out = torch.full((N,), 7.0, dtype=dtype)
    round_kernel[(1,)](out, x, TYPE=TYPES[dtype], N=N)
    assert_same_bits(out, x.to(dtype))


# s 2**-16 below, on and above a quarter, a half and three quarters, and the ends.
TURNS = [0, 1 << 16, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xBFFFFFFF, 0xC0000000, 0xFFFEFFFF, 0xFFFFFFFF]


@pytest.mark.parametrize("dtype", (torch.float32, *HALF_DTYPES))
def test_stochastic(dtype):
    """The reference's rounding is held to its definition in test_dense."""
    x = around(torch.bfloat16 if dtype == torch.float32 else dtype)
    generator = torch.Generator().manual_seed(3)
    words = torch.tensor(TURNS)[torch.randint(len(TURNS), (N,), generator=generator)]
    words[::3] = torch.randint(2**32, words[::3].shape, generator=generator)
    out = torch.full((N,), 7.0)
    stochastic_kernel[(1,)](out, x, words.int(), TYPE=TYPES[dtype], N=N)
    want = reference.stochastic_round(x, words, dtype)
    assert_same_bits(out, want.float())
    assert_same_bits(out.to(dtype), want)
