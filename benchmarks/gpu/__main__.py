"""Everything worth knowing of a GPU, in the minutes for which one has it.

    python -m benchmarks.gpu [--minutes 8] [--out DIR] [--only PART ...]
    python -m benchmarks.gpu --rehearse         every line of it on a CPU, on tiny tensors: minutes

Parts, in order of worth; each is a process of its own with its share of what is left of the time:

    known        whether the noise is the contract's, to the bit: stored vectors, the CPU's draws, far offsets
    tests        the tests that need a GPU, over all cores
    kernels      every op on a gigabyte of weights, against the device's copy and today's PyTorch code
    step         whole steps on OPT-1.3B's shapes against their forwards, with and without CUDA graphs; populations
    sanitizer    a small call of every kernel under compute-sanitizer (memcheck, racecheck)
    profile      Nsight Compute on one launch of the most important kernels (DIR/profile.txt)
    learning     the built-in model fine-tuned, then cells of the convergence study; only if asked for. Where there is
                 no network the model comes in pieces (python -m benchmarks.gpu.packed)
    tuning       alternatives to the entries of the table of launch configurations; only if asked for

Each writes DIR/PART.jsonl, a row as soon as it is there, and DIR/PART.log. A part that hangs or crashes loses nothing
but what was left of it. Tables come after each part, and what was to be reached at the end. The exit status is 1 if a
known answer, a test or a check was wrong, or a part did not end by itself.

"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.part import ROOT, Part
from benchmarks.gpu.targets import targets
from benchmarks.harness import machine, options
from benchmarks.harness.tables import Table
from benchmarks.harness.targets import table as targets_table

# Shares of the time: of what is left, each part gets its own over those of it and the parts to come.
SHARES = {"known": 1.0, "tests": 4.0, "kernels": 3.0, "step": 3.0, "sanitizer": 1.5, "profile": 1.0}
EXTRA = {"learning": 3.0, "tuning": 1.5}  # only if asked for
GRACE = 5.0  # seconds beyond its share after which a part is killed


def run_part(part: Part) -> str:
    """Run a part in a process of its own; how it ended."""
    environment = dict(os.environ)
    if part.rehearse and part.name in ("known", "kernels", "tuning", "profile"):
        environment["TRITON_INTERPRET"] = "1"
    given = [part.name, str(part.out), f"{part.seconds:.1f}", "rehearse" if part.rehearse else "run", *part.given]
    command = [sys.executable, "-m", "benchmarks.gpu.part", *given]
    with (part.out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(part.seconds + GRACE)
            return "completed" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            return "stopped: its time was over"
        finally:  # whatever it has left running would take the device from the next part
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    weights = SHARES | EXTRA
    given = {"tests": args.tests, "learning": [str(args.packed)] if args.packed else []}
    ended: list[list[str]] = []
    rows: dict[str, list[dict]] = {}
    bad = False
    for number, name in enumerate(args.only):
        share = weights[name] / sum(weights[other] for other in args.only[number:])
        seconds = max(1.0, (end - time.monotonic()) * share)
        part = Part(name, args.out, seconds, args.rehearse, tuple(given.get(name, ())))
        part.file.unlink(missing_ok=True)
        print(f"{name}: up to {part.seconds:.0f} s, rows in {part.file}", flush=True)
        how = run_part(part)
        seconds = time.monotonic() - part.begin
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        rows[name] = part.rows()
        failures = module.failures(rows[name])
        for table in module.tables(rows[name]):
            table.print()
        ended.append([name, f"{seconds:.0f}", how, str(len(failures)), failures[0] if failures else ""])
        bad = bad or how != "completed" or bool(failures)
        sys.stdout.flush()
    targets_table(targets(rows)).print()
    Table(["part", "seconds", "ended", "failures", "the first"], ended, "Parts").print()
    return int(bad)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.parser("benchmarks.gpu", __doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for all parts together; default: %(default)g")
    add("--out", type=Path, metavar="DIR", default=Path("runs/gpu"), help="default: %(default)s")
    names, usual = (*SHARES, *EXTRA), "all but learning and tuning"
    add("--only", nargs="+", choices=names, metavar="PART", default=list(SHARES), help=f"default: {usual}")
    add("--tests", nargs="+", metavar="TEST", default=[], help="of part tests, as pytest takes them; default: all")
    add("--packed", type=Path, metavar="FOLDER", help="of part learning: the model, of benchmarks.gpu.packed")
    add("--rehearse", action="store_true", help="on a CPU: shows that only the GPU can be new")
    args = parser.parse_args(given)
    if not args.minutes > 0:
        parser.error(f"--minutes: got {args.minutes}; accepted: numbers above 0")
    if not args.rehearse and (reason := _refusal()):
        parser.error(reason)
    return args


def _refusal() -> str | None:
    if missing := [name for name in ("pytest", "transformers") if not importlib.util.find_spec(name)]:
        return f"{', '.join(missing)}: not installed, and parts need them; `pip install {' '.join(missing)}`"
    reason = machine.refusal("cuda", "dense_perturb_")
    return reason and reason.replace("--device: got cuda, but ", "") + ". `--rehearse` runs it all on a CPU"


if __name__ == "__main__":
    raise SystemExit(main())
