"""The settings of ``benchmarks.kernels`` on the packages of two commits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache

import torch

from benchmarks.harness import compare, tables
from benchmarks.harness.checkouts import Worker
from benchmarks.kernels.sweep import Point, Sweep


def rows(workers: dict[str, Worker], args: argparse.Namespace, points: Sequence[Point]) -> list[dict]:
    """The rows of all settings, each printed as soon as it is there."""
    how = {"device": args.device, "isa": args.isa, "provider": args.provider}
    how |= {"repeats": args.repeats, "budget": args.budget}
    requests = [{"case": point.title, "point": list(point), "how": how} for point in points]
    figures = {"ms": "seconds"} | ({"host ms": "host_seconds"} if args.device == "cuda" else {})
    console, found = tables.console(), []
    for point, own in zip(points, compare.rows(workers, requests, args.rounds), strict=True):
        shape = " x ".join(map(str, point.shape))
        compare.table(f"{point.title}, {shape}, threads {point.threads}", own, figures).print(console)
        found += own
    return found


def answer(request: dict) -> list[dict]:
    """The rows of a setting, on the package of this process."""
    point = Point(*request["point"])
    how = request["how"]
    sweep = _sweep(how["device"], tuple(how["isa"] or ()))
    sweep.providers, sweep.repeats, sweep.budget = how["provider"], how["repeats"], how["budget"]
    (found,) = sweep.rows([point._replace(shape=(point.shape[0], point.shape[1]))])
    return [row | {"case": " ".join(x for x in (row["provider"], row["isa"]) if x)} for row in found]


@lru_cache(1)
def _sweep(device: str, isas: tuple[str, ...]) -> Sweep:
    """Kept between the requests: it knows how long calls took."""
    return Sweep.of(torch.device(device), isas)
