"""The optimizers that ``benchmarks.host`` times, on a model of 224 tensors too small to matter."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.optimizers import mode_options
from pgap_kernels import optim

LAYERS, WIDTH, GROUPS = 112, 8, 16
FORWARDS, PLAIN = ("constant", "real"), "two plain forwards"
CASES = {
    "MeZO inplace": ("MeZO", "inplace"),
    "MeZO two_pass": ("MeZO", "two_pass"),
    "MeZO scratch": ("MeZO", "scratch"),
    "P-GAP inplace": ("PGAP", "inplace"),
    "P-GAP scratch": ("PGAP", "scratch"),
    "P-GAP folded": ("PGAP", "folded"),
    "P-GAP folded, window": ("PGAP", "folded, window"),
    f"P-GAP folded, {GROUPS} groups": ("PGAP", "folded"),
    f"LOZO folded, {GROUPS} groups": ("LOZO", "folded"),
}


def requests(steps: int) -> list[dict]:
    """A request for each case and kind of forward."""
    pairs = [(PLAIN, "real"), *itertools.product(CASES, FORWARDS)]
    return [
        {"case": f"{name}, {forwards}", "name": name, "forwards": forwards, "steps": steps} for name, forwards in pairs
    ]


def answer(request: dict) -> list[dict]:
    """The median seconds of a step without a refresh."""
    torch.set_num_threads(1)
    step = _stepper(request["name"], request["forwards"])
    for _ in range(3):  # the first refreshes, looks for stray uses of weights, and enters a schedule
        step()
    seconds = []
    for _ in range(request["steps"]):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return [{"case": request["case"], "seconds": statistics.median(seconds)}]


def _stepper(name: str, forwards: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    method, mode = CASES.get(name, ("", ""))
    options: dict[str, Any] = {"rank": 4, "window": 1 << 30} if method in ("PGAP", "LOZO") else {}
    groups = "groups" in name
    x, made_up = torch.randn(4, WIDTH), itertools.cycle((torch.tensor(1.0), torch.tensor(1.001)))
    if groups:
        options |= {"members": 2, "groups": GROUPS}
        x, made_up = torch.randn(2 * GROUPS, WIDTH), itertools.cycle((torch.linspace(1, 1.001, 2 * GROUPS),))

    def real() -> torch.Tensor:
        losses = model(x).square().mean(1)
        return losses if groups else losses.mean()

    closure = {"constant": lambda: next(made_up), "real": real}[forwards]
    if name == PLAIN:
        return torch.no_grad()(lambda: (closure().item(), closure().item()))
    optimizer = getattr(optim, method)(model, allow_unused=True, **mode_options(mode), **options)
    return lambda: optimizer.step(closure)
