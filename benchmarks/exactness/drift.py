"""What is left of the weights when nothing is learnt: steps with a learning rate of 0, bit by bit."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.optimizers import mode_options
from pgap_kernels import draw, noise
from pgap_kernels.finetune.baseline import BaselineMeZO
from pgap_kernels.optim import PGAP, MeZO

SEED, EPS, SIGMA = 0, 1e-3, 0.02
_LOOKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Net(nn.Module):
    """An embedding, two linear layers and a norm; every weight is normal with standard deviation 0.02."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8 * width, width)
        self.inner = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width)
        self.outer = nn.Linear(4 * width, width)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(SIGMA * draw(p.shape, noise.derive(SEED, 0, noise.Role.DATA), noise.tensor_id(name)))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(self.embedding(tokens))))


def _loss(model: nn.Module) -> Tensor:
    return model(torch.arange(4)).float().square().mean()


class Scheme(NamedTuple):
    """A method that gets a model and the options of P-GAP; ``exact``: no bit may change."""

    name: str
    make: Callable[[nn.Module, dict], MeZO | PGAP | BaselineMeZO]
    exact: bool


def _mezo(mode: str) -> Callable[[nn.Module, dict], MeZO]:
    return lambda model, _: MeZO(model, lr=0.0, eps=EPS, seed=SEED, **mode_options(mode))


def _pgap(mode: str) -> Callable[[nn.Module, dict], PGAP]:
    return lambda model, options: PGAP(model, lr=0.0, eps=EPS, seed=SEED, **mode_options(mode), **options)


SCHEMES = [
    Scheme("MeZO scratch", _mezo("scratch"), True),
    Scheme("P-GAP scratch", _pgap("scratch"), True),
    Scheme("P-GAP folded", _pgap("folded"), True),
    Scheme("P-GAP folded, window", _pgap("folded, window"), True),
    Scheme("MeZO inplace", _mezo("inplace"), False),
    Scheme("MeZO inplace, two_pass", _mezo("two_pass"), False),
    Scheme("P-GAP inplace", _pgap("inplace"), False),
    Scheme("MeZO's own logic in PyTorch", lambda model, _: BaselineMeZO(model, lr=0.0, eps=EPS, seed=SEED), False),
]


def changed_bits(now: Tensor, before: Tensor) -> int:
    """How many elements differ in any bit; unlike ``!=`` it sees a zero that changed its sign."""
    whole = torch.int32 if now.dtype == torch.float32 else torch.int16
    return int((now.view(whole) != before.view(whole)).sum())


def _difference(model: nn.Module, before: list[Tensor]) -> dict[str, float]:
    now = [p.detach() for p in model.parameters()]
    square = sum((a.double() - b.double()).square().sum().item() for a, b in zip(now, before, strict=True))
    size = sum(b.double().square().sum().item() for b in before)
    changed = sum(changed_bits(a, b) for a, b in zip(now, before, strict=True))
    total = sum(b.numel() for b in before)
    return {"changed": changed, "share": changed / total, "drift": (square / size) ** 0.5, "elements": total}


@torch.no_grad()
def rows(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each dtype, scheme and step at which one looks; what is pending is merged before."""
    options = {"rank": args.drift_rank, "window": args.drift_window, "probes": args.drift_probes}
    looks = sorted({n for n in _LOOKS if n < args.drift_steps} | {args.drift_steps})
    tasks = [(dtype, scheme) for dtype in args.drift_dtype for scheme in SCHEMES]
    with tqdm(total=len(tasks) * args.drift_steps, desc="drift", unit="step", dynamic_ncols=True) as bar:
        for dtype, scheme in tasks:
            model = Net(args.drift_width, getattr(torch, dtype))
            before = [p.detach().clone() for p in model.parameters()]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "16-bit weights are perturbed in place")  # that is the point
                method = scheme.make(model, options)
            closure = partial(_loss, model)
            for step in range(1, args.drift_steps + 1):
                method.step(closure)
                if step in looks:
                    if not isinstance(method, BaselineMeZO):
                        method.merge()
                    row = {"section": "drift", "scheme": scheme.name, "exact": scheme.exact, "dtype": dtype}
                    yield {**row, "step": step, **_difference(model, before)}
                bar.update()
