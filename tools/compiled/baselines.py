"""Kernels that others' code comes down to, compiled next to ours by tools.compiled. No masks, one tensor."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(w_ptr, a_ptr, BLOCK: tl.constexpr):
    """W <- W + a: what a pass costs without noise."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i)
    tl.store(w_ptr + i, (w.to(tl.float32) + tl.load(a_ptr)).to(w.dtype))


@triton.jit
def randn_kernel(w_ptr, a_ptr, seed, BLOCK: tl.constexpr):
    """W <- W + a z, one counter of Triton's generator per weight."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i)
    z = tl.randn(seed, i.to(tl.uint32))
    tl.store(w_ptr + i, (w.to(tl.float32) + tl.load(a_ptr) * z).to(w.dtype))


@triton.jit
def randn4x_kernel(w_ptr, a_ptr, seed, BLOCK: tl.constexpr):
    """The same with all four numbers of a counter used."""
    pid = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK)
    z0, z1, z2, z3 = tl.randn4x(seed, (pid * BLOCK + r).to(tl.uint32))
    here = w_ptr + pid * (4 * BLOCK) + r
    a = tl.load(a_ptr)
    w0, w1 = tl.load(here), tl.load(here + BLOCK)
    w2, w3 = tl.load(here + 2 * BLOCK), tl.load(here + 3 * BLOCK)
    tl.store(here, (w0.to(tl.float32) + a * z0).to(w0.dtype))
    tl.store(here + BLOCK, (w1.to(tl.float32) + a * z1).to(w0.dtype))
    tl.store(here + 2 * BLOCK, (w2.to(tl.float32) + a * z2).to(w0.dtype))
    tl.store(here + 3 * BLOCK, (w3.to(tl.float32) + a * z3).to(w0.dtype))
