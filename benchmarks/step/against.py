"""The contenders of ``benchmarks.step`` on the packages of two commits."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch

from benchmarks.harness import compare
from benchmarks.harness.checkouts import Worker
from benchmarks.step.contenders import Contender, Spec, specs
from benchmarks.step.models import Workload

FIGURES = {"step, ms": "total", "outside, ms": "perturb", "refresh, ms": "refresh"}


def rows(workers: dict[str, Worker], args: argparse.Namespace, lengths: Mapping[str, Iterable[int]]) -> list[dict]:
    """The rows of every contender, those of a setting printed as soon as they are there."""
    found = []
    for model, dtype, threads in itertools.product(args.model, args.dtype, args.threads):
        for tokens in args.tokens or lengths[model]:
            setting = {"model": model, "dtype": dtype, "threads": threads, "tokens": tokens, "steps": args.steps}
            setting |= {"window": args.window, "probes": args.probes, "refresh_forwards": args.refresh_forwards}
            contenders = specs(args.methods, args.modes, args.providers, args.ranks)
            requests = [{"case": str(spec), "spec": list(spec), **setting} for spec in contenders]
            own = [row for turn in compare.rows(workers, requests, args.rounds) for row in turn]
            compare.table(f"{model}, {dtype}, {tokens} tokens, {threads} threads", own, FIGURES).print()
            found += own
    return found


def answer(request: dict) -> list[dict]:
    """Some steps of a contender; it stays as it is for the next round."""
    torch.set_num_threads(request["threads"])
    setting = [request[name] for name in ("model", "dtype", "tokens", "window", "probes", "refresh_forwards")]
    contender = _contender(*setting, tuple(request["spec"]))
    done = len(contender.seconds)
    contender.block(range(done, done + request["steps"]))
    seconds = contender.seconds[done:]
    medians = {part: statistics.median(s[part] for s in seconds) for part in ("total", "forward", "perturb")}
    about = {name: request[name] for name in ("case", "model", "dtype", "tokens", "threads")}
    return [{**about, **medians, "refresh": contender.refresh, "seconds_of_steps": seconds}]


@lru_cache(1)
def _workload(model: str, dtype: str) -> Workload:
    return Workload(model, getattr(torch, dtype))


@lru_cache(1)
def _contender(
    model: str, dtype: str, tokens: int, window: int, probes: int, refresh_forwards: int, spec: tuple
) -> Contender:
    """One at a time: the weights are shared, and what a contender keeps is not."""
    contender = Contender(Spec(*spec), _workload(model, dtype), tokens, window, probes)
    contender.prepare(refresh_forwards)
    return contender
