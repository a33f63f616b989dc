"""Each op against the memory floor and against what PyTorch code does today.

    python -m benchmarks.kernels [--shape 8192 8192] [--dtype float32 bfloat16] [--threads 1 2] [--json FILE]
    python -m benchmarks.kernels --device cuda [--shape 8192 8192] [--dtype float32 bfloat16] [--json FILE]

Every row is a ratio of medians taken in turn in one run: `floor_ratio` is ours over ``W.add_(1.0)``, `speedup` is the
other code's time over ours. The other code: ``W.add_(torch.normal(...), alpha=a)`` for dense noise, two of our own
passes for two draws, ``W.addmm_(U @ Z, V.T, alpha=a)`` for low rank. Run it on an idle machine. PGAP_ISA=avx2 in the
environment times that build.

With ``--device cuda`` (CUDA or ROCm) there are more ops and more to compare with (benchmarks/idioms.py), times are
those of events on the device with cold caches, GB/s are the bytes that a pass has to move over its time, and `of copy`
is that over the same of ``spare.copy_(W)``. `host ms` is how long a call takes to return; keys and scalars are those
of the call before, which the op has on the device by then. What does not run is reported as such, not left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import idioms, timing
from benchmarks.timing import Call
from pgap_kernels import Adam, backends, cpu, dense_perturb_, lowrank_perturb_, masked_perturb_, preconditioned_update_

A = 1e-3
ONE = [(1, A)]
LIST = 224  # matrices of a model of 32 layers


@dataclass(frozen=True)
class Case:
    """A pass over ``whole``, and what is timed beside it, by name."""

    op: str
    whole: torch.Tensor
    ours: Call
    others: dict[str, Call]
    rank: int | None = None
    extra: int = 0  # bytes that it has to move beyond one read and one write of ``whole``


def cases(w: torch.Tensor, ranks: tuple[int, ...] = (16, 64)) -> Iterator[Case]:
    """What is timed on every device, for one weight matrix."""
    dense = partial(dense_perturb_, [w], tensor_ids=[1])
    normal = {"torch.normal": partial(idioms.normal, w, A)}
    yield Case("dense normal", w, partial(dense, ONE), normal)
    yield Case("dense rademacher", w, partial(dense, ONE, distribution="rademacher"), normal)
    one = partial(dense, ONE)
    yield Case("dense normal, two draws", w, partial(dense, [(0, A), (1, A)]), {"two passes": lambda: (one(), one())})
    for rank in ranks:
        if rank <= min(w.shape):
            yield _low_rank(w, rank)


def _low_rank(w: torch.Tensor, rank: int) -> Case:
    u, v, z = (torch.randn(rows, rank, device=w.device) for rows in (*w.shape, rank))
    ours = partial(lowrank_perturb_, [w], [u], [v], core=[z], coefficient=A)
    theirs = partial(idioms.low_rank, w, *(t.to(w.dtype) for t in (u, z, v)), A)
    return Case(f"low rank {rank}", w, ours, {"addmm_": theirs}, rank, u.nbytes + v.nbytes)


def gpu_cases(w: torch.Tensor) -> Iterator[Case]:
    """Those, and what only a GPU is asked for."""
    dense = partial(dense_perturb_, [w], ONE, tensor_ids=[1])
    normal = {"torch.normal": partial(idioms.normal, w, A), "torch.compile": partial(idioms.compiled_normal, w, A)}
    for case in cases(w, (16, 64, 256)):
        case.others.update(normal if "torch.normal" in case.others else {})
        yield case
    yield Case("dense normal, fast", w, partial(dense, tier="fast"), {**normal, "exact tier": dense})
    if w.dtype != torch.float32:
        stochastic = partial(dense, rounding="stochastic", rounding_key=2)
        yield Case("dense normal, stochastic", w, stochastic, {"to nearest": dense})
    masked = partial(masked_perturb_, [w], ONE, tensor_ids=[1], share=(2, 0.5))
    yield Case("masked, share 0.5", w, masked, {"rand, normal": partial(idioms.masked_normal, w, A, 0.5)})
    m, v = (torch.zeros(w.shape, device=w.device) for _ in range(2))
    adam = partial(preconditioned_update_, [w], [[m], [v]], ONE, Adam(A, step=3), tensor_ids=[1])
    eager = {"eager Adam": partial(idioms.adam, w, m, v, A, A)}
    yield Case("adam", w, adam, eager, extra=2 * (m.nbytes + v.nbytes))
    del m, v, adam, eager
    rows, columns = (max(size // 8, 1) for size in w.shape)
    whole = torch.randn(LIST, rows, columns, device=w.device).to(w.dtype)
    many = whole.unbind()
    ids = list(range(LIST))

    def separately() -> None:
        for t, ident in zip(many, ids, strict=True):
            dense_perturb_([t], ONE, tensor_ids=[ident])

    together = partial(dense_perturb_, many, ONE, tensor_ids=ids)
    yield Case(f"dense normal, {LIST} tensors", whole, together, {f"{LIST} calls": separately})


def measure(case: Case, timer: timing.Timer, repeats: int, warmups: int = 1) -> list[dict]:
    """A row for each code that the case is compared with."""
    runnable, failed = {}, {}
    for name, call in case.others.items():
        try:
            call()
        except Exception as error:  # whatever a compiler throws is the finding
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            runnable[name] = call
    whole, spare = case.whole, torch.empty_like(case.whole)
    calls = [lambda: whole.add_(1.0), lambda: spare.copy_(whole), case.ours, *runnable.values()]
    floor, copy, ours, *theirs = timing.medians(calls, timer, repeats, warmups)
    speed, copy_speed = (2 * whole.nbytes + case.extra) / ours.done, 2 * whole.nbytes / copy.done
    row = {
        "op": case.op,
        "dtype": str(whole.dtype).removeprefix("torch."),
        "shape": list(whole.shape),
        "rank": case.rank,
        "seconds": ours.done,
        "host_seconds": ours.returned,
        "floor_ratio": ours.done / floor.done,
        "gb_per_s": speed / 1e9,
        "copy_gb_per_s": copy_speed / 1e9,
        "copy_share": speed / copy_speed,
    }
    compared = zip(runnable, theirs, strict=True)
    rows = [row | {"against": x, "other_seconds": t.done, "speedup": t.done / ours.done} for x, t in compared]
    return rows + [row | {"against": name, "error": error} for name, error in failed.items()]


def cpu_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Rows of every dtype and thread count, printed as they come."""
    print(f"{'op':26}{'dtype':10}{'threads':>8}{'isa':>8}{'ms':>9}{'x floor':>9}  speed-up")
    for dtype in args.dtype:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for case in cases(torch.randn(*args.shape).to(getattr(torch, dtype))):
                for row in measure(case, timing.on_host, args.repeats or 5):
                    row |= {"threads": threads, "isa": cpu.isa()[0]}
                    print(
                        f"{row['op']:26}{row['dtype']:10}{row['threads']:8}{row['isa']:>8}{1e3 * row['seconds']:9.1f}"
                        f"{row['floor_ratio']:9.2f}  {_outcome(row)}",
                        flush=True,
                    )
                    yield row


def gpu_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Rows of every dtype, printed as they come."""
    device = torch.device("cuda", torch.cuda.current_device())
    facts, timer = timing.facts(device), timing.on_gpu(device)
    print(", ".join(f"{name} {value or 'unknown'}" for name, value in facts.items()))
    columns = f"{'ms':>9}{'host ms':>9}{'x floor':>9}{'GB/s':>8}{'of copy':>9}"
    print(f"{'op':26}{'dtype':10}{columns}  speed-up")
    for dtype in args.dtype:
        for case in gpu_cases(torch.randn(*args.shape, device=device).to(getattr(torch, dtype))):
            for row in measure(case, timer, args.repeats or 20, warmups=3):
                row |= facts
                print(
                    f"{row['op']:26}{row['dtype']:10}{1e3 * row['seconds']:9.3f}{1e3 * row['host_seconds']:9.3f}"
                    f"{row['floor_ratio']:9.2f}{row['gb_per_s']:8.0f}{row['copy_share']:9.2f}  {_outcome(row)}",
                    flush=True,
                )
                yield row


def _outcome(row: dict) -> str:
    return f"{row['against']}: {row['error']}" if "error" in row else f"{row['speedup']:.2f}x {row['against']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--shape", type=int, nargs=2, default=(8192, 8192), metavar=("ROWS", "COLUMNS"))
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="of the CPU")
    parser.add_argument("--repeats", type=int, help="runs per figure, whose median counts (default: 5, on a GPU 20)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.device == "cpu" and cpu.unavailable:
        parser.error(cpu.unavailable)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: got cuda, but PyTorch finds no CUDA or ROCm device here; accepted here: cpu")
        reason = backends.triton.refusal("dense_perturb_", torch.device("cuda"), torch.float32)
        if reason:
            parser.error(f"--device: got cuda, but the Triton backend does not run here: {reason}")
    rows = list(gpu_rows(args) if args.device == "cuda" else cpu_rows(args))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
