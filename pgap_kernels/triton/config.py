"""The one table of launch configurations. Nothing is autotuned: a kernel that writes in place must run once.

Results of dense kernels do not depend on it; those of low-rank products do (order of summation), so there is one entry
per dtype and rank bucket, with narrower tiles where the target has no warp-group products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NVIDIA = ("nvidia", "hopper")


class Config(NamedTuple):
    """Compiler options of a kernel."""

    num_warps: int = 4
    num_stages: int = 1
    registers: int = 128  # of a thread, at most

    def options(self, architecture: str) -> dict[str, int | bool]:
        """Compiler options; contraction is off, since bits are part of the contract.

        ``num_warps`` counts warps of 32 lanes; AMD's waves have 64, so half as many do. NVIDIA's assembler takes as
        many registers as make one program fast; the limit keeps several programs on a processor.
        """
        warps = self.num_warps // 2 if architecture == "cdna" else self.num_warps
        options: dict[str, int | bool] = {"num_warps": warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        return options | {"maxnreg": self.registers} if architecture in NVIDIA else options


# A thread's share of a tile is 128 bits of each lane: 8 elements of 16 bits, or 4 of 32.
DENSE = {torch.float32: Config(num_warps=8), torch.bfloat16: Config(), torch.float16: Config()}
# One draw and little else fits into fewer registers, so that seven programs run on a processor instead of five.
LEAN = {torch.bfloat16: Config(registers=72), torch.float16: Config(registers=72)}
# Kernels with extra operands process 4 elements per thread for every dtype: 128-bit accesses for float32 state, and 8
# would exceed 128 registers. 16-bit weights are then accessed 64 bits at a time.
FOUR_EACH = Config(num_warps=8)


def dense_config(dtype: torch.dtype, draws: int, lean: bool) -> Config:
    """The configuration of a dense pass over so many unrolled draws (0: in a loop); ``lean``: it does no more than add
    them to weights."""
    return LEAN.get(dtype, DENSE[dtype]) if lean and draws == 1 else DENSE[dtype]


class LowRankConfig(NamedTuple):
    """Tile (rows, columns), step of the sum over the rank, tiles of a strip, and where P is: see ``LOWRANK``."""

    rows: int
    columns: int
    resident: bool  # the program holds P; else it reads P in steps for every tile
    makes: bool  # the program makes P from A and C; else a launch before it does
    step: int = 16
    strip: int = 64
    config: Config = Config()


class ProductConfig(NamedTuple):
    """Rows of a program and step of the sum in P."""

    rows: int
    step: int
    config: Config = Config()


PRODUCT = ProductConfig(rows=32, step=16)
_EIGHT_WARPS = Config(num_warps=8)
BUCKETS = (8, 15, 32, 64, 128, 512)
# Ranks below 16 are sums of outer products, whatever the target.
_SMALL = (LowRankConfig(16, 64, resident=True, makes=True), LowRankConfig(32, 64, resident=False, makes=False))
# float32 products are IEEE and made by fma, whose operands fill the registers; 16-bit ones go to tensor cores. Chosen
# so that nothing spills with 128 registers: P is made in the pass, or held by it, where that fits beside a tile.
_STEPS = LowRankConfig(32, 64, resident=False, makes=False, config=_EIGHT_WARPS)
_FLOAT32 = (*_SMALL, *[_STEPS] * 4)
_HALF = (
    *_SMALL,
    LowRankConfig(64, 64, resident=True, makes=True, strip=32, config=_EIGHT_WARPS),
    LowRankConfig(64, 64, resident=True, makes=False, strip=32, config=_EIGHT_WARPS),
    *[_STEPS._replace(strip=32)] * 2,
)
# Of quotients, whose two sums fill the registers: their factors are made beforehand. Not timed on a card yet.
_QUOTIENT = tuple(config._replace(columns=32, config=Config()) for config in (_SMALL[1], _STEPS))
# The fastest of those that benchmarks.gpu.tuning has timed on an H200, spills or not (of rank 16, 2 % slower than the
# fastest, which spills). float32 takes three products of TF32 there (factors.py).
_HOPPER_FLOAT32 = (
    *_SMALL,
    LowRankConfig(64, 64, resident=False, makes=False, config=Config(registers=255)),
    LowRankConfig(128, 64, resident=True, makes=False, config=_EIGHT_WARPS),
    _STEPS,
    _STEPS,
)
_HOPPER_HALF = (
    *_SMALL,
    LowRankConfig(32, 256, resident=True, makes=True, strip=32),
    *[LowRankConfig(128, 64, resident=True, makes=False, strip=32)] * 2,
    LowRankConfig(128, 128, resident=False, makes=False, step=32, strip=32, config=_EIGHT_WARPS),
)
# By whether the target has warp-group products, dtype and largest rank of the bucket.
LOWRANK = {
    (hopper, dtype, limit): config
    for hopper, rows in ((False, (_FLOAT32, _HALF)), (True, (_HOPPER_FLOAT32, _HOPPER_HALF)))
    for dtype, row in zip((torch.float32, torch.bfloat16, torch.float16), (*rows, rows[1]), strict=True)
    for limit, config in zip(BUCKETS, row, strict=True)
}


def lowrank_config(
    dtype: torch.dtype, rank: int, stochastic: bool, architecture: str, quotient: bool = False
) -> LowRankConfig:
    """The configuration of a dtype's rank bucket; tiles are narrower if random words need registers."""
    if quotient:
        return _QUOTIENT[rank >= 16]
    config = LOWRANK[architecture == "hopper", dtype, next(limit for limit in BUCKETS if rank <= limit)]
    return config._replace(columns=config.columns // 2) if stochastic else config


class ForwardTile(NamedTuple):
    """Tile (rows, columns) of a result of the low rank in the forward, and step of the sum in it."""

    rows: int
    columns: int
    step: int
    config: Config = Config()


class ForwardConfig(NamedTuple):
    """Tiles of x F, of (x F) N and of y, and whether the program of the first makes the second: see ``FORWARD``."""

    mixes: bool
    project: ForwardTile
    mix: ForwardTile
    expand: ForwardTile

    def width(self, rank: int) -> int:
        """Columns of t: whole steps of the sum over them."""
        return -(-rank // self.expand.step) * self.expand.step


DRAW, DRAW_CONFIG = 1024, Config()  # elements of a program that draws factors
FORWARD_BUCKETS = (16, 32, 64, 512)
# Loads of x run ahead by num_stages - 1, which takes shared memory but no registers. A program has few rows, so that a
# few thousand tokens occupy every processor. It multiplies by the core, too, as long as that does not spill
# (docs/notebook.md).
_FORWARD_FLOAT32 = (
    ForwardConfig(
        True,
        ForwardTile(32, 16, 32, Config(num_stages=4)),
        ForwardTile(32, 16, 16, Config(num_stages=3)),
        ForwardTile(32, 64, 16, _EIGHT_WARPS),
    ),
    ForwardConfig(
        True,
        ForwardTile(32, 32, 32, Config(8, 4)),
        ForwardTile(32, 32, 16, Config(num_stages=3)),
        ForwardTile(64, 64, 16, Config(8, 3)),
    ),
    *[
        ForwardConfig(
            False,
            ForwardTile(64, 64, 16, Config(8, 4)),
            ForwardTile(32, 64, 16, Config(num_stages=3)),
            ForwardTile(64, 64, 16, Config(8, 3)),
        )
    ]
    * 2,
)
_FORWARD_HALF = (
    ForwardConfig(
        True,
        ForwardTile(32, 16, 128, Config(num_stages=3)),
        ForwardTile(32, 16, 16, Config(num_stages=3)),
        ForwardTile(64, 128, 16, _EIGHT_WARPS),
    ),
    ForwardConfig(
        True,
        ForwardTile(32, 32, 128, Config(num_stages=3)),
        ForwardTile(32, 32, 16, Config(num_stages=3)),
        ForwardTile(64, 128, 32, _EIGHT_WARPS),
    ),
    ForwardConfig(
        True,
        ForwardTile(32, 64, 64, Config(8, 3)),
        ForwardTile(32, 64, 16, Config(num_stages=3)),
        ForwardTile(64, 128, 64, _EIGHT_WARPS),
    ),
    ForwardConfig(
        False,
        ForwardTile(64, 128, 64, Config(8, 3)),
        ForwardTile(32, 64, 16, Config(num_stages=3)),
        ForwardTile(64, 128, 32, Config(8, 3)),
    ),
)
# Of Hopper's, again the fastest that were timed: with 16 tokens two thousand of them occupy every processor.
_HOPPER_FORWARD_HALF = tuple(
    config._replace(project=config.project._replace(rows=16, step=128, config=Config(warps, 4))) if warps else config
    for config, warps in zip(_FORWARD_HALF, (4, 0, 8, 0), strict=True)
)
FORWARD = {
    (hopper, dtype, limit): config
    for hopper, half in ((False, _FORWARD_HALF), (True, _HOPPER_FORWARD_HALF))
    for dtype, row in zip((torch.float32, torch.bfloat16, torch.float16), (_FORWARD_FLOAT32, half, half), strict=True)
    for limit, config in zip(FORWARD_BUCKETS, row, strict=True)
}


def forward_config(dtype: torch.dtype, rank: int, architecture: str, split: bool = False) -> ForwardConfig:
    """The configuration of a dtype's rank bucket; it takes less of x at a time if each x is two operands."""
    config = FORWARD[architecture == "hopper", dtype, next(limit for limit in FORWARD_BUCKETS if rank <= limit)]
    return config._replace(project=config.project._replace(rows=32, step=32)) if split else config
