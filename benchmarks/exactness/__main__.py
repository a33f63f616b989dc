"""Which modes leave the weights alone, which let small updates arrive, and what that costs on a real model.

    python -m benchmarks.exactness [--quick] [--only drift] [--json FILE] [--figure FILE]

drift      steps with a learning rate of 0: how many weights have changed a bit, and how far they went. The modes
           scratch and folded must not change one.
movement   prescribed updates of 1e-6 to 1e-4 RMS per step on 16-bit weights N(0, 0.02^2), perturbed with eps 1e-3:
           correlation of where a weight went with where it was sent. Then a direction that stays, within noise: how
           much of the way along it is made.
smollm2    SmolLM2-135M in float32, the modes on the same batches: losses, passes over the weights as counted by the
           optimizer, and medians of seconds inside and outside the forwards. Fetches the model the first time.

The run ends with the facts that must hold, and with status 1 if one does not. A full run takes about an hour on two
cores, mostly for smollm2; --quick a few minutes. Time on an idle machine, or with --threads 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.exactness import drift, movement, tables
from benchmarks.harness import machine, options

Rows = Callable[[argparse.Namespace], Iterator[dict]]
SECTIONS = ("drift", "movement", "smollm2")
_ALL_DTYPES = ["float32", "bfloat16", "float16"]
FULL = {
    "drift_width": 256, "drift_steps": 1000, "drift_rank": 64, "drift_window": 100, "drift_probes": 10,
    "drift_dtype": _ALL_DTYPES,
    "sizes": [1e-6, 1e-5, 1e-4], "matrix": 1024, "movement_rank": 64, "movement_steps": 200,
    "persistent_steps": 2000, "merge_every": 100,
    "ranks": [64, 16], "window": 100, "probes": 10, "steps": 11, "block": 2, "batch": 16,
}  # fmt: skip
QUICK = FULL | {
    "drift_width": 128, "drift_steps": 100,
    "matrix": 512, "persistent_steps": 400,
    "ranks": [16], "window": 10, "probes": 2, "steps": 4, "block": 1, "batch": 4,
}  # fmt: skip


def facts(rows: list[dict]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    found: list[tuple[str, bool]] = []
    drift = [r for r in rows if r["section"] == "drift" and r["exact"]]
    if drift:
        found.append(("drift: scratch and folded change no bit", all(r["changed"] == 0 for r in drift)))
    for least, scheme in ((0.99, "ours: folded, window, before the merge"), (0.9, "ours: scratch + residual")):
        at = [r for r in rows if r["section"] == "movement" and r["scheme"] == scheme and r["table"] == "random"]
        values = [r["correlation"] for r in at if r["fresh"] == 1e-5]
        if values:
            text = f"movement: {scheme}: correlation at least {least} at 1e-5 RMS per step"
            found.append((text, min(values) >= least))
    for r in rows:
        if r["section"] == "smollm2" and r["mode"] == "folded, window":
            limit = 0.25 if (r["window"], r["probes"]) == (100, 10) else r["passes_declared"]
            text = f"smollm2: folded, window, rank {r['rank']}: at most {limit:.2f} passes over the weights per step"
            found.append((text, r["passes_per_step"] <= limit + 1e-9))
    return found


def _smollm2(args: argparse.Namespace) -> Iterator[dict]:
    from benchmarks.exactness import smollm2  # transformers takes seconds to import

    yield from smollm2.rows(args)


RUNNERS: dict[str, Rows] = {
    "drift": drift.rows,
    "movement": movement.rows,
    "smollm2": _smollm2,
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every setting that it leaves out."""
    parser = options.parser("benchmarks.exactness", __doc__)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="these sections; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer steps: seconds to minutes")
    parser.add_argument(
        "--movement-dtype", nargs="+", choices=_ALL_DTYPES[1:], default=["bfloat16"], help="default: bfloat16"
    )
    parser.add_argument("--ranks", type=int, nargs="+", help=f"smollm2: ranks of P-GAP; default: {FULL['ranks']}")
    parser.add_argument("--steps", type=int, help=f"smollm2: steps to time and compare; default: {FULL['steps']}")
    parser.add_argument("--batch", type=int, help=f"smollm2: sentences per batch; default: {FULL['batch']}")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and settings there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw drift and movement there (.png, .svg, .pdf)")
    args = parser.parse_args(given)
    options.fill(args, QUICK if args.quick else FULL)
    options.check_counts(parser, args, ("steps", "batch", "threads", "ranks"))
    options.check_files(parser, args, ("json", "figure"))
    if args.figure:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--figure needs matplotlib; pip install matplotlib, or leave --figure out")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for section in args.only or SECTIONS:
        own = list(RUNNERS[section](args))
        rows += own
        for table in tables.tables(section, own):
            table.print()
    held = facts(rows)
    for text, holds in held:
        print("holds " if holds else "FAILS ", text)
    if args.json:
        report = {"machine": machine.facts(), "arguments": options.settings(args)}
        report |= {"facts": [{"fact": text, "holds": holds} for text, holds in held], "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.figure:
        from benchmarks.exactness import figure

        figure.draw(rows, args.figure)
    return 0 if all(holds for _, holds in held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
