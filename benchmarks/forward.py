"""What a low-rank direction costs in the forward: a layer alone, with our op, with PyTorch's products.

    python -m benchmarks.forward [--shape 576 576] [--tokens 128 512] [--rank 8 16] [--dtype bfloat16] [--json FILE]

For every layer (--shape OUT IN, more than once for several), number of tokens, rank and dtype, seconds of

    linear    y = F.linear(x, W)
    ours      after it, lowrank_forward_(y, x, A, B, [M]), called as the hooks of mode folded call it: without checks
    naive     after it, y += ((x @ B) @ M.T) @ A.T, with A, B, M of y's dtype
    in place  lowrank_perturb_([W], [A], [B], core=[M]): what moving the weight itself costs; a step of two forwards
              moves it three times, or twice and copies it back

They take turns, and a figure is the median of its turns. Ours and the naive are timed by themselves, each straight
after a linear, which has read x, written y and emptied the caches of code as in a model; `+%` is their share of the
linear, `gain` is naive over ours. A, B and M of ours are float32. Without options: the layers of SmolLM2-135M and one
of OPT-13B. Run it on an idle machine. PGAP_ISA=avx2 in the environment times that build of ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from benchmarks import machine, timing
from pgap_kernels import cpu, lowrank_perturb_
from pgap_kernels.ops.forward import add_lowrank_

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (5120, 5120)]
SECONDS = 1.0  # of turns at one set of figures, unless --repeats says how many


def measure(
    shape: tuple[int, int],
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    timer: timing.Timer,
    repeats: int | None = None,
) -> dict:
    """Seconds of the four, and their shares of the linear."""
    m, n = shape
    x, w = torch.randn(tokens, n, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    a, b, core = (torch.randn(rows, rank, device=device) for rows in (m, n, rank))
    a *= 1e-6
    u, v, z = (t.to(dtype) for t in (a, b, core))
    y = torch.empty(tokens, m, dtype=dtype, device=device)

    def layer() -> None:
        nonlocal y
        y = linear(x, w)

    def ours() -> None:
        add_lowrank_(y, x, left=a, right=b, cores=[core], transposed=False)

    def naive() -> None:
        nonlocal y
        y += ((x @ v) @ z.T) @ u.T

    in_place = partial(lowrank_perturb_, [w], [a], [b], core=[core], coefficient=1.0)
    calls = [layer, ours, layer, naive, in_place]
    if repeats is None:
        turn = sum(s.done for s in timing.medians(calls, timer, 1, 2))
        repeats = min(max(round(SECONDS / turn), 5), 101)
    alone, added, again, naively, moved = (s.done for s in timing.medians(calls, timer, repeats, 2))
    alone = (alone + again) / 2
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "tokens": tokens,
        "rank": rank,
        "repeats": repeats,
        "linear": alone,
        "ours": added,
        "naive": naively,
        "in_place": moved,
        "ours_share": added / alone,
        "naive_share": naively / alone,
    }


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Rows of every combination, printed as they come."""
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        facts, timer = machine.gpu(device), timing.on_gpu(device)
    else:
        device, timer = torch.device("cpu"), timing.on_host
        facts = {"isa": cpu.isa()[0], "torch": torch.__version__}
    print(", ".join(f"{name} {value or 'unknown'}" for name, value in facts.items()))
    print(
        f"{'dtype':10}{'threads':>8}{'layer':>12}{'tokens':>7}{'rank':>5}"
        f"{'linear ms':>11}{'ours ms':>9}{'+%':>8}{'naive ms':>10}{'+%':>8}{'gain':>7}{'in place ms':>13}"
    )
    threads = args.threads if args.device == "cpu" else [torch.get_num_threads()]
    for dtype, count, shape, tokens, rank in itertools.product(
        args.dtype, threads, args.shape or SHAPES, args.tokens, args.rank
    ):
        torch.set_num_threads(count)
        row = measure(tuple(shape), tokens, rank, getattr(torch, dtype), device, timer, args.repeats)
        row |= {"threads": count, **facts}
        print(
            f"{dtype:10}{count:8}{'{} x {}'.format(*shape):>12}{tokens:7}{rank:5}{1e3 * row['linear']:11.3f}"
            f"{1e3 * row['ours']:9.3f}{100 * row['ours_share']:8.1f}{1e3 * row['naive']:10.3f}"
            f"{100 * row['naive_share']:8.1f}{row['naive'] / row['ours']:7.2f}{1e3 * row['in_place']:13.3f}",
            flush=True,
        )
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("OUT", "IN"), help="of a layer")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048], help="default: %(default)s")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16, 64], help="default: %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, help="turns per figure (default: what a second has room for, 5 to 101)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if reason := machine.refusal(args.device, "lowrank_forward_"):
        parser.error(reason)
    with torch.no_grad():
        found = list(rows(args))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
