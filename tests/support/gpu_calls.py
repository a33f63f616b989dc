"""Calls of every op whose scalars and keys all live on the device, as a captured step has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgap_kernels import noise

from .gpu import moved
from .helpers import ops, poison, weights

SHAPES = [(37, 129), (4099,), (70, 70)]
IDS = [noise.tensor_id(f"w{i}") for i in range(len(SHAPES))]


@dataclass
class Call:
    """A call, what it writes, and the tensors on the device that it reads its scalars and keys from."""

    make: Callable[[], object]
    written: list[Tensor]
    scalars: list[Tensor]
    keys: list[Tensor] = field(default_factory=list)


def _scalars(device: torch.device, *values: float) -> list[Tensor]:
    return [torch.tensor([value], device=device) for value in values]


def _keys(device: torch.device, count: int) -> list[Tensor]:
    return [torch.tensor([key], device=device) for key in (5, -6, 7, -8)[:count]]


def _weights(device: torch.device, dtype=torch.float32, shapes=SHAPES, **options) -> list[Tensor]:
    return moved(weights(shapes, dtype, **options), device)


def dense(device: torch.device, dtype=torch.bfloat16) -> Call:
    w, keys, (a, b, d) = _weights(device, dtype), _keys(device, 3), _scalars(device, 0.3, -0.2, 0.01)
    options = {"tensor_ids": IDS, "decay": d, "rounding": "stochastic", "rounding_key": keys[2], "backend": "triton"}
    return Call(lambda: ops.dense_perturb_(w, [(keys[0], a), (keys[1], b)], **options), w, [a, b, d], keys)


def masked(device: torch.device, by: str) -> Call:
    w, keys, (a, level) = _weights(device), _keys(device, 2), _scalars(device, 0.3, 0.5)
    mask = {"threshold": level} if by == "threshold" else {"share": (keys[1], 0.4)}
    scalars, used = ([a, level], keys[:1]) if by == "threshold" else ([a], keys)
    options = {"tensor_ids": IDS, "backend": "triton", **mask}
    return Call(lambda: ops.masked_perturb_(w, [(keys[0], a)], **options), w, scalars, used)


def assemble(device: torch.device) -> Call:
    g, keys, (a, b) = moved(poison(weights(SHAPES)), device), _keys(device, 2), _scalars(device, 0.3, -0.2)
    draws = [(keys[0], a), (keys[1], b)]
    return Call(lambda: ops.assemble_gradient_(g, draws, tensor_ids=IDS, backend="triton"), g, [a, b], keys)


def adam(device: torch.device) -> Call:
    """Betas and eps on the host beside a learning rate on the device."""
    w, m, v = (_weights(device, seed=seed, scale=0.1) for seed in range(3))
    v = [t.square_() for t in v]
    keys, (rho, r, lr) = _keys(device, 1), _scalars(device, 0.3, 1e-3, 1e-2)
    options = {"tensor_ids": IDS, "restore": [r], "backend": "triton"}

    def make() -> None:
        ops.preconditioned_update_(w, [m, v], [(keys[0], rho)], ops.AdamRule(lr, step=3), **options)

    return Call(make, [*w, *m, *v], [rho, r, lr], keys)


def preconditioned(device: torch.device) -> Call:
    w, keys, (a,) = _weights(device), _keys(device, 1), _scalars(device, 0.3)
    h = [t.square() + 0.1 for t in _weights(device, seed=1)]
    options = {"tensor_ids": IDS, "backend": "triton"}
    return Call(lambda: ops.preconditioned_perturb_(w, [(keys[0], a)], h, **options), w, [a], keys)


def anchor(device: torch.device) -> Call:
    w, origin, (c,) = _weights(device), _weights(device, seed=1), _scalars(device, 0.3)
    return Call(lambda: ops.anchor_affine_(w, origin, c, backend="triton"), w, [c])


def lowrank(device: torch.device, rank: int, dtype=torch.float32, stored: bool = True) -> Call:
    shapes = [(200, 130), (130, 257)]
    w, keys, (a, d) = _weights(device, dtype, shapes), _keys(device, 3), _scalars(device, 1e-2, 0.1)
    left, right = ([(m, rank) for m, _ in shapes], [(n, rank) for _, n in shapes])
    factors = (_weights(device, shapes=left, seed=1), _weights(device, shapes=right, seed=2)) if stored else keys[1:]
    options = {"core": keys[0], "coefficient": a, "decay": d, "rank": rank, "tensor_ids": IDS[:2], "backend": "triton"}
    return Call(lambda: ops.lowrank_perturb_(w, *factors, **options), w, [a, d], keys[:1] if stored else keys)


WRITING: dict[str, Callable[[torch.device], Call]] = {
    "dense": dense,
    "dense float32": lambda device: dense(device, torch.float32),
    "masked by threshold": lambda device: masked(device, "threshold"),
    "masked by share": lambda device: masked(device, "share"),
    "assemble": assemble,
    "adam": adam,
    "preconditioned": preconditioned,
    "anchor": anchor,
    "low rank 8": lambda device: lowrank(device, 8),
    "low rank 16 bfloat16": lambda device: lowrank(device, 16, torch.bfloat16),
    "low rank 64": lambda device: lowrank(device, 64),
    "low rank 64 drawn": lambda device: lowrank(device, 64, torch.bfloat16, stored=False),
}
