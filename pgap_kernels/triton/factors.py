"""The small side of a low-rank direction: P = A C, with A and C stored or regenerated.

    A[i, k] = normal number (row i) r + k under its key;   C[k, j] = normal number k r + j

One program of a low-rank pass makes P of its rows once and keeps it; above a rank that the configuration states
`product_kernel` makes P of all matrices first (docs/kernels.md has the model behind the crossover).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import PRODUCT
from .launch import TYPES, assembled, cached_table, identity, is_nvidia, launch, scratch
from .noise import element_normal
from .rounding import narrow
from .tiles import EXTRA, FIELDS, FIRST_TILE, OUT, ROWS, TENSOR_ID

# Columns of a low-rank table beyond those of tiles.py; EXTRA is A, SECOND is B.
FIRST_ROW = tl.constexpr(20)  # of the shard in the unsharded matrix
CORE = tl.constexpr(18)  # C or its diagonal


@triton.jit
def left_tile(entry, key, i, k, RANK: tl.constexpr, LEFT_TYPE: tl.constexpr):
    """A[i, k] in float32 for rows i (BM, 1) of the shard and columns k (1, K); 0 outside. LEFT_TYPE None: drawn."""
    rows = tl.load(entry + ROWS)
    if LEFT_TYPE is None:
        e = (tl.load(entry + FIRST_ROW) + i) * RANK + k
        a = element_normal(e, tl.load(entry + TENSOR_ID).to(tl.uint32), key)
        a = tl.where((i < rows) & (k < RANK), a, 0.0)
    else:
        pointer = tl.load(entry + EXTRA).to(tl.pointer_type(LEFT_TYPE))
        a = tl.load(pointer + i * RANK + k, mask=(i < rows) & (k < RANK), other=0.0).to(tl.float32)
    return a


@triton.jit
def core_tile(entry, keys_ptr, k, j, RANK: tl.constexpr, KIND: tl.constexpr, CORE_TYPE: tl.constexpr):
    """C[k, j] in float32 for rows k (K, 1) and columns j (1, J); 0 outside."""
    inside = (k < RANK) & (j < RANK)
    if KIND == "full":
        pointer = tl.load(entry + CORE).to(tl.pointer_type(CORE_TYPE))
        c = tl.load(pointer + k * RANK + j, mask=inside, other=0.0).to(tl.float32)
    else:
        tensor_id, key = tl.load(entry + TENSOR_ID).to(tl.uint32), tl.load(keys_ptr + 2)
        c = element_normal((k * RANK + j).to(tl.int64), tensor_id, key)
        c = tl.where(inside, c, 0.0)
    return c


@triton.jit
def product_tile(
    entry,
    keys_ptr,
    i,
    j,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    LEFT_TYPE: tl.constexpr,
    CORE_TYPE: tl.constexpr,
    KEY: tl.constexpr,
    PRODUCTS: tl.constexpr,
    K: tl.constexpr,
):
    """P[i, j] in float32, the sum over k in steps of K."""
    key = tl.load(keys_ptr + KEY)
    if KIND == "none":
        p = left_tile(entry, key, i, j, RANK, LEFT_TYPE)
    elif KIND == "diagonal":
        pointer = tl.load(entry + CORE).to(tl.pointer_type(CORE_TYPE))
        c = tl.load(pointer + j, mask=j < RANK, other=0.0).to(tl.float32)
        p = left_tile(entry, key, i, j, RANK, LEFT_TYPE) * c
    else:
        p = tl.zeros((i.shape[0], j.shape[1]), tl.float32)
        for first in range(0, RANK, K):
            a = left_tile(entry, key, i, first + tl.arange(0, K)[None, :], RANK, LEFT_TYPE)
            c = core_tile(entry, keys_ptr, first + tl.arange(0, K)[:, None], j, RANK, KIND, CORE_TYPE)
            p = tl.dot(a, c, acc=p, input_precision=PRODUCTS)
    return p


@triton.jit
def product_kernel(
    map_ptr,
    table_ptr,
    keys_ptr,  # of A, B, C
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
    LEFT_TYPE: tl.constexpr,
    CORE_TYPE: tl.constexpr,
    KEY: tl.constexpr,  # which key draws A: 0, or 1 to make B by this kernel
    PRODUCTS: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
):
    """P of BM rows of one matrix, rounded to TYPE, at OUT (rows x RANK)."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.load(map_ptr + tile).to(tl.int64) * FIELDS
    i = (tile - tl.load(entry + FIRST_TILE)) * BM + tl.arange(0, BM)[:, None]
    pointer = tl.load(entry + OUT).to(tl.pointer_type(TYPE))
    for first in range(0, RANK, K):
        j = first + tl.arange(0, K)[None, :]
        p = product_tile(entry, keys_ptr, i, j, RANK, KIND, LEFT_TYPE, CORE_TYPE, KEY, PRODUCTS, K)
        tl.store(pointer + i * RANK + j, narrow(p, TYPE), mask=(i < tl.load(entry + ROWS)) & (j < RANK))


def products_on(device: torch.device, dtype: torch.dtype, rank: int) -> str:
    """How float32 products are made: IEEE, but where P is rounded to 16 bits anyway the tensor cores are as good."""
    return "tf32x3" if is_nvidia(device) and dtype != torch.float32 and rank >= 16 else "ieee"


class Factors(NamedTuple):
    """What is common to the factors of one pass."""

    rank: int
    dtype: torch.dtype
    tensor_ids: list[int]
    keys: Tensor

    def products(self, side, rows, firsts, left=(), core=(), kind="none") -> list[Tensor]:
        """P (or B, as the drawn "right" side without a core) of every matrix in one launch, in a scratch."""
        rank, device = self.rank, self.keys.device
        buffer = scratch(side, device, self.dtype, sum(rows) * rank)
        parts = [part.view(-1, rank) for part in buffer[: sum(rows) * rank].split([m * rank for m in rows])]

        def make():
            entries = [
                {
                    OUT: part.data_ptr(),
                    EXTRA: left[t].data_ptr() if left else 0,
                    CORE: core[t].data_ptr() if core else 0,
                    TENSOR_ID: self.tensor_ids[t],
                    ROWS: rows[t],
                    FIRST_ROW: firsts[t],
                }
                for t, part in enumerate(parts)
            ]
            return assembled(entries, [triton.cdiv(m, PRODUCT.rows) for m in rows], device, keep=buffer)

        key = ("product", side, kind, rank, *map(tuple, (rows, firsts, self.tensor_ids)))
        tensors = cached_table((*key, identity(parts, left, core)), make)
        launch(
            product_kernel,
            tensors.tiles,
            device,
            PRODUCT.config,
            map_ptr=tensors.map,
            table_ptr=tensors.entries,
            keys_ptr=self.keys,
            RANK=rank,
            KIND=kind,
            TYPE=TYPES[self.dtype],
            LEFT_TYPE=TYPES[left[0].dtype] if left else None,
            CORE_TYPE=TYPES[core[0].dtype] if core else None,
            KEY=1 if side == "right" else 0,
            PRODUCTS=products_on(device, self.dtype, rank),
            BM=PRODUCT.rows,
            K=PRODUCT.step,
        )
        return parts
