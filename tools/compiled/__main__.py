"""Static facts of every Triton kernel, compiled ahead of time: no GPU is used, nothing here is a timing.

    python -m tools.compiled                                        every kernel, for sm_80, sm_90 and gfx942
    python -m tools.compiled --kernel dense --target sm_90 --dtype bf16
    python -m tools.compiled --json rows.json --listing out/         rows as JSON, the counted paths as text

slots   issue slots per weight: instructions of the common path (see common_path.py) over the weights of one thread.
        Kernels that loop over draws are counted at one draw; loops over tiles at the tiles of a 4096 x 4096 matrix.
regs    registers of a thread
spill   instructions on its local memory: spills, or arrays in the slow paths of others' kernels
shared  bytes of shared memory
ld, st  bits of the narrowest access that is needed to read or write a tile; 0: it is not read or written
mma     tensor-core instructions on the path
B/w     bytes of weights (and of state of their size) moved per weight

ms per GPU is a model of a pass over 1e9 weights, the larger of two times; m and i say which, memory or issue:

    memory  bytes / (0.9 x peak bandwidth)               A100-80G 2.039 TB/s, H100 SXM 3.35 TB/s, H200 4.8 TB/s
    issue   slots / (0.8 x 128 lanes x SMs x clock)      A100 108 SMs at 1.41 GHz, H100 and H200 132 at 1.755 GHz

Beside our kernels: "copy" (W += a), passes with Triton's generators ("tl.randn", "tl.randn4x"), and what torch.compile
makes of MeZO's perturbation (inductor.py).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tools.compiled.cases import BYTES, all_cases
from tools.compiled.measure import TARGETS, rows


def line(row: dict) -> str:
    """A row of the printed table."""
    name = f"{row['kernel']:15}{row['config']:17}{row['rank'] or '':>4} {row['dtype']:6}{row['target']:8}"
    if row["error"]:
        return name + row["error"].strip().splitlines()[-1]
    numbers = (
        f"{row['slots_per_weight']:7.1f}{row['registers']:6}{row['spills']:6}"
        f"{row['shared_bytes']:8}{row['load_bits']:5}{row['store_bits']:5}{row['mma']:5}{row['bytes_per_weight']:5}"
    )
    times = [f"{gpu} {ms:.2f}{row['bound'][gpu][0]}" for gpu, ms in (row["model_ms"] or {}).items()]
    return name + numbers + "  " + "  ".join(times)


HEADER = (
    f"{'kernel':15}{'config':17}{'rank':>4} {'dtype':6}{'target':8}"
    f"{'slots':>7}{'regs':>6}{'spill':>6}{'shared':>8}{'ld':>5}{'st':>5}{'mma':>5}{'B/w':>5}"
    "  ms per 1e9 weights"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = all_cases()
    kernels = list(dict.fromkeys(case.kernel for case in cases))
    parser.add_argument("--target", default=",".join(TARGETS), help="separated by commas; default %(default)s")
    parser.add_argument(
        "--kernel", nargs="+", choices=kernels, default=kernels, metavar="NAME", help=", ".join(kernels)
    )
    parser.add_argument("--config", nargs="+", metavar="TEXT", help='only these configurations, e.g. "J=1" fast')
    parser.add_argument("--dtype", nargs="+", choices=BYTES, default=list(BYTES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--listing", type=Path, metavar="FOLDER", help="write the path of every row to a file there")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled; unset it")
    targets = args.target.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"--target {unknown[0]}: not one of {', '.join(TARGETS)}")
    jobs = [
        (i, target)
        for i, case in enumerate(cases)
        for target in targets
        if case.kernel in args.kernel
        and case.dtype in args.dtype
        and case.config in (args.config or [case.config])
        and target.startswith(case.only)
    ]
    if args.listing:
        args.listing.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    found = []
    for row in rows(jobs, args.jobs, args.listing):
        found.append(row)
        print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if any(row["error"] for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
