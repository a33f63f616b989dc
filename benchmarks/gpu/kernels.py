"""Ops on a gigabyte of weights, with cold caches, against the device's own copy and today's PyTorch code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch

from benchmarks.gpu.host import profile
from benchmarks.gpu.part import Part
from benchmarks.harness.tables import Table
from benchmarks.kernels.ops import weights
from benchmarks.kernels.sweep import Point, Sweep, make_case
from pgap_kernels import use_backend

SHAPE, SMALL = (16384, 32768), (64, 96)  # 1 GiB in bfloat16
LAYER, TOKENS = (8192, 2048), 2048  # OPT-1.3B's widest
RANKS = (16, 64, 128)
REPEATS = 31
SECONDS = 8  # a point, with its compilation, seldom takes more
PROVIDERS = ("ours", "idiom", "addmm_", "lerp", "two_passes", "to_nearest", "one_by_one", "in_place")


def points(part: Part) -> list[tuple[Point, tuple[str, ...]]]:
    """Settings and who takes part, what is most worth knowing first."""
    shape = SMALL if part.rehearse else SHAPE
    ranks = (4,) if part.rehearse else RANKS
    tokens = 8 if part.rehearse else TOKENS
    threads = torch.get_num_threads()

    def point(op: str, dtype: str = "bfloat16", rank: int | None = None) -> Point:
        if op == "forward":
            return Point(1, op, dtype, SMALL if part.rehearse else LAYER, rank, threads, tokens)
        return Point(1, op, dtype, shape, rank, threads)

    found = [point("dense"), point("fast"), point("rademacher"), *(point("lowrank", rank=r) for r in ranks)]
    found += [point("forward", rank=r) for r in ranks]
    found += [point(op) for op in ("list", "two_draws", "stochastic", "scratch")]
    found += [point("dense", "float32"), *(point("lowrank", "float32", r) for r in ranks)]
    found += [point(op, "float32") for op in ("host", "draw", "assemble")]
    found += [point(op) for op in ("adam", "masked", "anchor", "dot", "norms")]
    if part.rehearse:  # the interpreter has no fast tier, and takes seconds over hundreds of tensors
        found = [p for p in found if p.op not in ("fast", "list", "host")]
    # A compilation takes as long as all the rest.
    return [*((p, PROVIDERS) for p in found), (point("dense"), ("ours", "torch.compile"))]


def run(part: Part) -> None:
    with use_backend("triton") if part.rehearse else contextlib.nullcontext():
        for point, providers in points(part):
            if part.left < (0 if part.rehearse else SECONDS):
                part.write(not_run=point.title)
                continue
            sweep = Sweep.of(part.device, ())
            sweep.providers, sweep.budget, sweep.repeats = providers, 0.1, 1 if part.rehearse else REPEATS
            try:
                (rows,) = sweep.rows([point])
            except torch.cuda.OutOfMemoryError as error:
                part.write(not_run=point.title, why=str(error).splitlines()[0])
                torch.cuda.empty_cache()
                continue
            for row in rows:
                part.write(**row)
        for op in ("dense",) if part.rehearse else ("dense", "list", "lowrank", "forward"):
            point = next(p for p, _ in points(part) if p.op == op)
            case = make_case(point, weights(point.shape, point.dtype, part.device))
            case.ours()
            print(op, profile(case.ours, 1 if part.rehearse else 20), flush=True)


def failures(rows: Iterable[dict]) -> list[str]:
    found = [row for row in rows if "unmeasured" in row and "too long for" not in row["unmeasured"]]
    return [f"{row['op']}, {row['provider']}: {row['unmeasured']}" for row in found]


def tables(rows: Sequence[dict]) -> list[Table]:
    columns = ["op", "dtype", "rank", "provider", "ms", "of copy", "x floor", "x idiom", "host ms"]
    lines = []
    for row in (r for r in rows if "seconds" in r):
        line = [row["op"], row["dtype"], str(row["rank"] or ""), row["provider"], f"{1e3 * row['seconds']:.3f}"]
        line.append(f"{row['copy_share']:.2f}" if "copy_share" in row else "")
        line.append(f"{row['floor_ratio']:.2f}")
        line.append(f"{row['speedup_vs_idiom']:.2f}" if row["speedup_vs_idiom"] else "")
        lines.append([*line, f"{1e3 * row['host_seconds']:.2f}"])
    caption = "; ".join(f"not run: {row['not_run']}" for row in rows if "not_run" in row)
    return [Table(columns, lines, "Kernels", caption)]
