"""The small side of a low-rank direction: P = A C, with A and C stored or regenerated.

    A[i, k] = normal number (row i) r + k under its key;   C[k, j] = normal number k r + j

Either a program of a low-rank pass makes P of its rows, or `product_kernel` makes P of all matrices beforehand:
`config.py` says which, by rank and dtype, and docs/notebook.md has the model behind it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import PRODUCT
from .launch import architecture, blocks, is_nvidia, launch
from .noise import element_normal
from .rounding import TYPES, round_to
from .table import (
    CORE,
    EXTRA0,
    EXTRA1,
    FIELDS,
    FIRST_ROW,
    FIRST_TILE,
    OUT,
    ROWS,
    TENSOR_ID,
    build_table,
    cached_table,
)

# A and B: the address of a stored factor; of one made just before the pass, its first element in the workspace.
LEFT, RIGHT = EXTRA0, EXTRA1


class Factors(NamedTuple):
    """Constants of A, B and C: a factor without a type is drawn."""

    rank: int
    padded: int  # rank as a power of two
    kind: str  # of the core: none, diagonal, full or regenerated
    left: tl.dtype | None
    right: tl.dtype | None
    core: tl.dtype | None
    precision: str  # of tl.dot on float32: ieee, tf32x3 or tf32
    squared: bool  # A A diag(v) instead of A C, which product_kernel makes of a quotient
    aligned: bool  # every A and B starts at a multiple of 16 bytes


@triton.jit
def factor_pointer(entry, FIELD: tl.constexpr, workspace_ptr, TYPE: tl.constexpr):
    """The first element of a factor, in the workspace if there is one, else where it is stored."""
    address = tl.load(entry + FIELD)
    if workspace_ptr is not None:
        # An address: with offsets from a kernel argument, AMD's compiler does not unroll the loops over the rank.
        address = workspace_ptr.to(tl.int64) + address * (TYPE.primitive_bitwidth // 8)
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def left_tile(entry, a_ptr, key, i, k, FACTORS: tl.constexpr):
    """A[i, k] in float32 for rows i (BM, 1) of the shard and columns k (1, K); 0 outside."""
    inside = (i < tl.load(entry + ROWS)) & (k < FACTORS.rank)
    if FACTORS.left is None:
        e = (tl.load(entry + FIRST_ROW) + i) * FACTORS.rank + k
        a = element_normal(e, tl.load(entry + TENSOR_ID).to(tl.uint32), key)
        a = tl.where(inside, a, 0.0)
    else:
        a = tl.load(a_ptr + i * FACTORS.rank + k, mask=inside, other=0.0).to(tl.float32)
    return a


@triton.jit
def core_tile(entry, keys_ptr, k, j, FACTORS: tl.constexpr):
    """C[k, j] in float32 for rows k (K, 1) and columns j (1, J); 0 outside."""
    inside = (k < FACTORS.rank) & (j < FACTORS.rank)
    if FACTORS.kind == "full":
        pointer = tl.load(entry + CORE).to(tl.pointer_type(FACTORS.core))
        c = tl.load(pointer + k * FACTORS.rank + j, mask=inside, other=0.0).to(tl.float32)
    else:
        e = (k * FACTORS.rank + j).to(tl.int64)
        c = element_normal(e, tl.load(entry + TENSOR_ID).to(tl.uint32), tl.load(keys_ptr + 2))
        c = tl.where(inside, c, 0.0)
    return c


@triton.jit
def product_tile(entry, a_ptr, keys_ptr, i, j, FACTORS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr):
    """P[i, j] in float32, the sum over k in steps; A is drawn from key number KEY of A, B and C."""
    key = tl.load(keys_ptr + KEY)
    if FACTORS.kind == "none":
        p = left_tile(entry, a_ptr, key, i, j, FACTORS)
    elif FACTORS.kind == "diagonal":
        pointer = tl.load(entry + CORE).to(tl.pointer_type(FACTORS.core))
        c = tl.load(pointer + j, mask=j < FACTORS.rank, other=0.0).to(tl.float32)
        p = left_tile(entry, a_ptr, key, i, j, FACTORS)
        if FACTORS.squared:
            p *= p
        p *= c
    else:
        p = tl.zeros((i.shape[0], j.shape[1]), tl.float32)
        for first in range(0, FACTORS.rank, STEP):
            a = left_tile(entry, a_ptr, key, i, first + tl.arange(0, STEP)[None, :], FACTORS)
            c = core_tile(entry, keys_ptr, first + tl.arange(0, STEP)[:, None], j, FACTORS)
            p = tl.dot(a, c, acc=p, input_precision=FACTORS.precision)
    return p


@triton.jit
def product_kernel(
    table,
    keys_ptr,  # of A, B, C
    workspace_ptr,
    FACTORS: tl.constexpr,
    KEY: tl.constexpr,  # which key draws A: 0, or 1 to make B by this kernel
    TYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """P of some rows of one matrix, rounded to TYPE, at OUT of the workspace (rows x rank)."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table.entries + tl.load(table.owners + tile).to(tl.int64) * FIELDS
    i = (tile - tl.load(entry + FIRST_TILE)) * TILE.rows + tl.arange(0, TILE.rows)[:, None]
    a_ptr = None
    if FACTORS.left is not None:
        a_ptr = factor_pointer(entry, LEFT, None, FACTORS.left)
    pointer = factor_pointer(entry, OUT, workspace_ptr, TYPE)
    for first in range(0, FACTORS.rank, TILE.step):
        j = first + tl.arange(0, TILE.step)[None, :]
        p = product_tile(entry, a_ptr, keys_ptr, i, j, FACTORS, KEY, TILE.step)
        inside = (i < tl.load(entry + ROWS)) & (j < FACTORS.rank)
        tl.store(pointer + i * FACTORS.rank + j, round_to(p, TYPE), mask=inside)


def precision_on(device: torch.device, dtype: torch.dtype, rank: int) -> str:
    """How float32 products are made: IEEE, unless P is rounded to 16 bits anyway, for which tf32x3 is as good."""
    return "tf32x3" if is_nvidia(device) and dtype != torch.float32 and rank >= 16 else "ieee"


def pass_precision(device: torch.device, dtype: torch.dtype, rank: int, quotient: bool = False) -> str:
    """The same in a pass over W. There three TF32 products stand for one of float32, too, where they were timed: by fma
    a pass takes several times as long as a library's product. Tensor cores cut off where they sum: emulated, the
    error beyond rank 64 is more than twice that of IEEE products.

    What a quotient is divided by is a sum of float32 products of numbers >= 0. Beside 16-bit weights TF32 will do,
    which has the digits of float16 and the exponents of float32; beside float32 ones quotients were not timed.
    """
    if quotient:
        return "tf32" if is_nvidia(device) and dtype != torch.float32 and rank >= 16 else "ieee"
    three = architecture(device) == "hopper" and 16 <= rank <= 64
    return "tf32x3" if three else precision_on(device, dtype, rank)


class FactorList(NamedTuple):
    """A, or B, of all matrices of a pass."""

    places: list[int]  # addresses; first elements in the workspace; 0 where they are drawn in the pass
    dtype: torch.dtype | None = None  # None: drawn in the pass
    workspace: Tensor | None = None

    @property
    def aligned(self) -> bool:
        """Whether every one begins at a multiple of 16 bytes."""
        size = 1 if self.workspace is None else self.workspace.element_size()
        return all(place * size % 16 == 0 for place in self.places)


def addresses_of(tensors: Sequence[Tensor], count: int) -> list[int]:
    """Addresses of ``count`` tensors; 0 where there are none."""
    return [t.data_ptr() for t in tensors] or [0] * count


def stored_factors(tensors: Sequence[Tensor], count: int) -> FactorList:
    """Factors that the op was given, or ``count`` that are drawn in the pass."""
    return FactorList(addresses_of(tensors, count), tensors[0].dtype if tensors else None)


def make_factors(
    weight: Tensor,
    rank: int,
    keys: Tensor,
    tensor_ids: Sequence[int],
    rows: Sequence[int],
    first_rows: Sequence[int],
    left: Sequence[Tensor] = (),
    core: Sequence[Tensor] = (),
    kind: str = "none",
    key: int = 0,
    squared: bool = False,
) -> FactorList:
    """P in the dtype of such weights, of all matrices in one launch; with key 1 it is B, drawn as A is with key 0.

    ``squared`` takes the squares of A's elements instead of A, and keeps them in float32: in 16 bits they underflow.

    The workspace comes from PyTorch's allocator at each call. Tables do not hold its address, so a graph capture may
    use a workspace of its own.
    """
    device, dtype, count = weight.device, torch.float32 if squared else weight.dtype, len(rows)
    *places, size = accumulate((m * rank for m in rows), initial=0)
    workspace = torch.empty(size, dtype=dtype, device=device)
    factors, cores = stored_factors(left, count), addresses_of(core, count)

    def build():
        entries = [
            {
                OUT: places[t],
                LEFT: factors.places[t],
                CORE: cores[t],
                TENSOR_ID: tensor_ids[t],
                ROWS: rows[t],
                FIRST_ROW: first_rows[t],
            }
            for t in range(count)
        ]
        return build_table(entries, [blocks(m, PRODUCT.rows) for m in rows], device)

    columns = (places, factors.places, cores, tensor_ids, rows, first_rows)
    table = cached_table(("product", device, *map(tuple, columns)), build)
    launch(
        product_kernel,
        table.programs,
        device,
        PRODUCT.config,
        table=table.pointers,
        keys_ptr=keys,
        workspace_ptr=workspace,
        FACTORS=factors_of(rank, kind, factors, FactorList([]), core, precision_on(device, dtype, rank), squared),
        KEY=key,
        TYPE=TYPES[dtype],
        TILE=PRODUCT,
    )
    return FactorList(places, dtype, workspace)


def factors_of(
    rank: int,
    kind: str,
    left: FactorList,
    right: FactorList,
    core: Sequence[Tensor],
    precision: str,
    squared: bool = False,
) -> Factors:
    """The constants of a kernel."""
    return Factors(
        rank,
        triton.next_power_of_2(rank),
        kind,
        left.dtype and TYPES[left.dtype],
        right.dtype and TYPES[right.dtype],
        TYPES[core[0].dtype] if core else None,
        precision,
        squared,
        left.aligned and right.aligned,
    )
