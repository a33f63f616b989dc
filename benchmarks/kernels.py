"""Each op against the memory floor and against what PyTorch code does today.

    python -m benchmarks.kernels [--shape 8192 8192] [--dtype float32 bfloat16] [--threads 1 2] [--json FILE]

Every row is a ratio of medians taken in turn in one run: `floor_ratio` is ours over ``W.add_(1.0)``, `speedup` is the
other code's time over ours. The other code: ``W.add_(torch.normal(...), alpha=a)`` for dense noise, two of our own
passes for two draws, ``W.addmm_(U @ Z, V.T, alpha=a)`` for low rank. Run it on an idle machine. PGAP_ISA=avx2 in the
environment times that build.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pgap_kernels import cpu, dense_perturb_, lowrank_perturb_

Case = tuple[str, str, Callable[[], object], Callable[[], object]]


def cases(w: torch.Tensor, ranks: tuple[int, ...] = (16, 64)) -> list[Case]:
    """(name, what it is compared with, ours, theirs) for one weight matrix."""
    (m, n), a = w.shape, 1e-3

    def dense(draws: int, distribution: str = "normal") -> Callable[[], object]:
        pairs = [(key, a) for key in range(draws)]
        return lambda: dense_perturb_([w], pairs, tensor_ids=[1], distribution=distribution)

    def idiom() -> None:
        w.add_(torch.normal(0.0, 1.0, w.shape, dtype=w.dtype), alpha=a)

    def two_passes() -> None:
        dense(1)()
        dense(1)()

    found: list[Case] = [
        ("dense normal", "torch.normal", dense(1), idiom),
        ("dense rademacher", "torch.normal", dense(1, "rademacher"), idiom),
        ("dense normal, two draws", "two passes", dense(2), two_passes),
    ]
    for rank in ranks:
        u, v, z = torch.randn(m, rank), torch.randn(n, rank), torch.randn(rank, rank)
        same = [t.to(w.dtype) for t in (u, v, z)]
        found.append(
            (
                f"low rank {rank}",
                "addmm_",
                lambda u=u, v=v, z=z: lowrank_perturb_([w], [u], [v], core=[z], coefficient=a),
                lambda s=same: w.addmm_(s[0] @ s[2], s[1].T, alpha=a),
            )
        )
    return found


def interleaved(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function; they take turns, so that a slow moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for times, function in zip(seconds, functions, strict=True):
            begin = time.perf_counter()
            function()
            if turn:  # the first is a warm-up
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in seconds]


def measure(shape: tuple[int, int], dtype: torch.dtype, threads: int, repeats: int) -> list[dict]:
    """Rows of one dtype and thread count."""
    torch.set_num_threads(threads)
    w = torch.randn(shape).to(dtype)
    rows = []
    for name, against, ours, theirs in cases(w):
        floor, mine, other = interleaved([lambda: w.add_(1.0), ours, theirs], repeats)
        rows.append(
            {
                "op": name,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
                "threads": threads,
                "isa": cpu.isa()[0],
                "seconds": mine,
                "floor_ratio": mine / floor,
                "against": against,
                "speedup": other / mine,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(8192, 8192), metavar=("ROWS", "COLUMNS"))
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--repeats", type=int, default=5, help="runs per figure; the median counts")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if cpu.unavailable:
        parser.error(cpu.unavailable)
    rows = []
    print(f"{'op':26}{'dtype':10}{'threads':>8}{'isa':>8}{'ms':>9}{'x floor':>9}  speed-up")
    for dtype in args.dtype:
        for threads in args.threads:
            for row in measure(tuple(args.shape), getattr(torch, dtype), threads, args.repeats):
                rows.append(row)
                print(
                    f"{row['op']:26}{row['dtype']:10}{row['threads']:8}{row['isa']:>8}{1e3 * row['seconds']:9.1f}"
                    f"{row['floor_ratio']:9.2f}  {row['speedup']:.2f}x {row['against']}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
