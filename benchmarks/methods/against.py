"""The contenders of ``benchmarks.methods`` on the packages of two commits."""

from __future__ import annotations

import argparse
import statistics
from functools import lru_cache

import torch

from benchmarks.harness import compare
from benchmarks.harness.checkouts import Worker
from benchmarks.methods.contenders import Contender, Spec, specs
from benchmarks.step.models import Workload

FIGURES = {"step, ms": "total", "outside, ms": "perturb"}


def rows(workers: dict[str, Worker], args: argparse.Namespace) -> list[dict]:
    """The rows of every contender, those of a method printed as soon as they are there."""
    found = []
    setting = {"model": args.model, "dtype": args.dtype, "tokens": args.tokens, "steps": args.steps}
    for method in args.only:
        requests = [{"case": str(s), "spec": list(s), **setting} for s in specs(method, args.providers)]
        own = [row for turn in compare.rows(workers, requests, args.rounds) for row in turn]
        compare.table(f"{method}, {args.model}, {args.dtype}, {args.tokens} tokens", own, FIGURES).print()
        found += [{"method": method, **row} for row in own]
    return found


def answer(request: dict) -> list[dict]:
    """Some steps of a contender, without refreshes; it stays as it is for the next round."""
    contender = _contender(request["model"], request["dtype"], request["tokens"], tuple(request["spec"]))
    done = len(contender.seconds)
    contender.block(range(done, done + request["steps"]))
    seconds = contender.seconds[done:]
    means = {part: statistics.fmean(s[part] for s in seconds) for part in ("total", "forward", "perturb")}
    return [{"case": request["case"], **means, "seconds_of_steps": seconds}]


@lru_cache(1)
def _workload(model: str, dtype: str) -> Workload:
    return Workload(model, getattr(torch, dtype))


@lru_cache(1)
def _contender(model: str, dtype: str, tokens: int, spec: tuple) -> Contender:
    """One at a time: the weights are shared, and what a contender keeps is not."""
    contender = Contender(Spec(*spec), _workload(model, dtype), tokens)
    contender.prepare()
    return contender
