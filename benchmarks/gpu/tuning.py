"""Alternatives to entries of the table of launch configurations (pgap_kernels/triton/config.py), timed in turns."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.kernels import LAYER, SHAPE, SMALL, TOKENS
from benchmarks.gpu.part import ROOT, Part
from benchmarks.harness.tables import Table
from benchmarks.harness.timer import Call, medians, on_gpu, on_host
from benchmarks.kernels.ops import OPS, weights
from pgap_kernels import use_backend
from pgap_kernels.triton import config
from pgap_kernels.triton.config import BUCKETS, FORWARD_BUCKETS, Config, ForwardConfig, LowRankConfig

BFLOAT16 = torch.bfloat16
REPEATS = 9
COMPILERS = 15


class Alternative(NamedTuple):
    """An entry of a table in the place of the usual one."""

    op: str
    rank: int | None
    table: str  # attribute of the module of configurations
    key: Any
    entry: Any


def alternatives() -> list[Alternative]:
    """The usual entry first, of each setting."""
    found = []
    for op in ("dense", "rademacher", "fast"):
        entries = [config.LEAN[BFLOAT16]]
        entries += [Config(warps, registers=n) for warps in (4, 8) for n in (128, 96, 80, 72, 64, 56)]
        found += [Alternative(op, None, "LEAN", BFLOAT16, entry) for entry in dict.fromkeys(entries)]
    for rank in (16, 64, 128):
        key = (True, BFLOAT16, next(limit for limit in BUCKETS if rank <= limit))
        entries = [config.LOWRANK[key], *(_lowrank(config.LOWRANK[key], rank))]
        found += [Alternative("lowrank", rank, "LOWRANK", key, entry) for entry in dict.fromkeys(entries)]
    for rank in (16, 64):
        key = (True, BFLOAT16, next(limit for limit in FORWARD_BUCKETS if rank <= limit))
        entries = [config.FORWARD[key], *_forward(config.FORWARD[key])]
        found += [Alternative("forward", rank, "FORWARD", key, entry) for entry in dict.fromkeys(entries)]
    return found


def _lowrank(usual: LowRankConfig, rank: int) -> Iterator[LowRankConfig]:
    tiles = ((32, 128), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (32, 256))
    held = (True, False) if rank > 64 else (True,)
    for (rows, columns), warps, stages, registers, resident in product(tiles, (4, 8), (1, 2, 3), (128, 255), held):
        if rows * columns <= 32 * warps * 96:
            compiled = Config(warps, stages, registers)
            yield usual._replace(rows=rows, columns=columns, resident=resident, config=compiled)


def _forward(usual: ForwardConfig) -> Iterator[ForwardConfig]:
    for rows, step, stages, warps in product((16, 32), (64, 128, 256), (3, 4), (4, 8)):
        yield usual._replace(project=usual.project._replace(rows=rows, step=step, config=Config(warps, stages)))
    for (rows, columns), warps, stages in product(((64, 128), (128, 64), (64, 64), (32, 128)), (4, 8), (1, 2)):
        expand = usual.expand._replace(rows=rows, columns=columns, config=Config(warps, stages))
        yield usual._replace(expand=expand)


@contextlib.contextmanager
def instead(alternative: Alternative) -> Iterator[None]:
    """With the entry in its table."""
    table = getattr(config, alternative.table)
    before = table[alternative.key]
    table[alternative.key] = alternative.entry
    try:
        yield
    finally:
        table[alternative.key] = before


def run(part: Part) -> None:
    if part.rehearse:
        with use_backend("triton"):
            _measure(
                part, [a for a in alternatives() if a.op in ("rademacher", "lowrank") and a.rank in (None, 16)][::5]
            )
        return
    processes = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.tuning", str(i)], cwd=ROOT) for i in range(COMPILERS)
    ]
    until = time.monotonic() + part.left / 2
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # what it has not compiled is compiled when it is measured
    _measure(part, alternatives())


def _measure(part: Part, found: Sequence[Alternative]) -> None:
    timer = on_host if part.rehearse else on_gpu(part.device)
    for (op, rank), group in groupby(found, key=lambda a: (a.op, a.rank)):
        shape, tokens = (LAYER if op == "forward" else SHAPE), TOKENS
        if part.rehearse:
            shape, tokens = SMALL, 8
        w = weights(shape, "bfloat16", part.device)
        case = OPS[op].case(w, *(x for x in (rank, tokens if op == "forward" else None) if x is not None))
        calls, tried = [], []
        for alternative in group:

            def call(alternative: Alternative = alternative, ours: Call = case.ours) -> None:
                with instead(alternative):
                    ours()

            try:
                call()
                if part.device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # shared memory or registers that the device does not have
                said = str(error).splitlines() or [""]
                part.write(op=op, rank=rank, entry=str(alternative.entry), error=f"{type(error).__name__}: {said[0]}")
                continue
            calls.append(call)
            tried.append(alternative)
        before = [case.before] * len(calls)
        times = medians(calls, timer, 2 if part.rehearse else REPEATS, 1, before)
        for alternative, seconds in zip(tried, times, strict=True):
            part.write(op=op, rank=rank, entry=str(alternative.entry), seconds=seconds.done)
        if part.left < 0:
            part.write(not_run="what comes after " + op)
            return


def compile_share(number: int) -> None:
    """Compile every COMPILERS-th alternative, into Triton's cache, by a call on a small tensor."""
    device = torch.device("cuda")
    for alternative in alternatives()[number::COMPILERS]:
        w = weights((1024, 1024), "bfloat16", device)
        more = (x for x in (alternative.rank, 64 if alternative.op == "forward" else None) if x is not None)
        case = OPS[alternative.op].case(w, *more)
        try:
            with instead(alternative):
                case.ours()
        except Exception as error:  # the process that times it says so too
            print(f"{alternative}: {error}", file=sys.stderr)
    torch.cuda.synchronize()


def failures(rows: Sequence[dict]) -> list[str]:
    return []  # an alternative that does not run is a finding


def tables(rows: Sequence[dict]) -> list[Table]:
    lines = []
    for (op, rank), group in groupby((r for r in rows if "seconds" in r), key=lambda r: (r["op"], r["rank"])):
        own = list(group)
        for row in [own[0], *sorted(own[1:], key=lambda r: r["seconds"])[:5]]:
            relative = row["seconds"] / own[0]["seconds"]
            lines.append([f"{op} {rank or ''}", row["entry"], f"{1e3 * row['seconds']:.3f}", f"{relative:.3f}"])
    return [Table(["op", "entry", "ms", "x usual"], lines, "The usual entry, and the fastest others")]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    compile_share(int(sys.argv[1]))
