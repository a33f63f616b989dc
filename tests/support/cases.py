"""Calls of the ops that have a rule of their own, each built anew for every run, so that every backend gets the same.

``masked``, ``preconditioned``, ``anchored`` and ``reduced`` are dictionaries of them by name; ``run`` makes a call and
returns what it left behind, with what lies around it in memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgap_kernels import noise

from .helpers import DTYPES, ops, weights

SHAPES = [(), (0,), (0, 4), (1,), (31,), (4095,), (4097,), (11, 397), (3, 5, 2, 2)]
IDS = [noise.tensor_id(f"w{i}") for i in range(len(SHAPES))]
KEYS = [noise.derive(9, step, noise.Role.DENSE) for step in range(3)]
MASK_KEY = noise.derive(9, 0, noise.Role.MASK)
COEFFICIENTS = [1e-1, -0.37, 2.5e-2]
ROUNDINGS = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic", "rounding_key": noise.derive(9, 0, noise.Role.ROUNDING)},
}
DISTRIBUTIONS = ("normal", "rademacher")
# contiguous; rows apart in memory; a shard beside others; indices beyond 2**31, rows far apart
LAYOUTS = ("plain", "strided", "shard", "far")
# Rounding alone touches no index, so every layout is tried with the rounding that does.
PLACES = [("plain", "nearest"), *((layout, "stochastic") for layout in LAYOUTS)]
RULES = ("momentum", "adam", "hizoo", "helene", "helene_refresh")


@dataclass(frozen=True)
class Case:
    """An op's name, what builds its keyword arguments, and the names of those it writes."""

    op: str
    build: Callable[[], dict]
    written: tuple[str, ...] = ()


def run(case: Case, backend: str | None) -> list[Tensor]:
    """The storages of what the call has written, or what it returned."""
    arguments = case.build()
    returned = getattr(ops, case.op)(**arguments, backend=backend)
    return [storage(t) for name in case.written for t in flat(arguments[name])] if case.written else [returned]


def flat(value) -> list[Tensor]:
    """The tensors of nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    values = list(value.values()) if isinstance(value, dict) else value
    return [t for v in values for t in flat(v)] if isinstance(values, (list, tuple)) else []


def storage(tensor: Tensor) -> Tensor:
    """All of the memory that the tensor is a view of."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


# ---- layouts -------------------------------------------------------------------------------------------------------


def apart(tensors: list[Tensor], gap: int) -> list[Tensor]:
    """Copies whose rows (the first dimension) lie ``gap`` poisoned elements apart."""
    result = []
    for t in tensors:
        rows, columns = (t.shape[0], math.prod(t.shape[1:])) if t.dim() > 1 else (1, t.numel())
        buffer = torch.full((rows, columns + gap), float("nan"), dtype=t.dtype)
        view = buffer[:, gap // 2 : gap // 2 + columns]
        view = view.unflatten(1, t.shape[1:]) if t.dim() > 1 else view[0].view(t.shape)
        result.append(view.copy_(t))
    return result


def placed(tensors: list[Tensor], layout: str, gap: int) -> list[Tensor]:
    """The tensors as a layout has them."""
    return apart(tensors, gap) if layout in ("strided", "shard") else tensors


def spans(shapes, layout: str) -> dict:
    """The ``slices`` argument of a layout."""
    if layout not in ("shard", "far"):
        return {}
    result = []
    for shape in shapes:
        columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
        if layout == "shard":
            result.append((3 * (columns + 11) + 5, columns + 11))
        else:
            result.append((4099 * (2**20 + 7) + 1001, 2**20 + 7) if len(shape) > 1 else (2**33 + 17, 2**40))
    return {"slices": result}


def per_tensor(values: list[float], count: int) -> list[float]:
    return list(itertools.islice(itertools.cycle(values), count))


def common(dtype, draws: int, distribution: str, rounding: str, decay, layout: str, shapes) -> dict:
    """What all ops that add noise take, with the weights laid out."""
    return {
        "weights": placed(weights(shapes, dtype), layout, 7),
        "draws": list(zip(KEYS[:draws], COEFFICIENTS[:draws], strict=True)),
        "tensor_ids": IDS[: len(shapes)],
        "decay": decay,
        "distribution": distribution,
        **ROUNDINGS[rounding],
        **spans(shapes, layout),
    }


# ---- masked_perturb_ -----------------------------------------------------------------------------------------------

THRESHOLDS = [0.3, 0.8, 0.05]
DECAYS = [0.0, 0.03, per_tensor([0.0, 0.01, 0.2], len(SHAPES))]  # with one, two and three draws


def masked_arguments(
    mask: str,
    dtype=torch.float32,
    draws: int = 2,
    distribution: str = "normal",
    rounding: str = "nearest",
    decay=0.0,
    layout: str = "plain",
    out: bool = False,
    shapes=SHAPES,
) -> dict:
    """Arguments of ``masked_perturb_`` with a mask of one of the three kinds."""
    arguments = common(dtype, draws, distribution, rounding, decay, layout, shapes)
    levels = per_tensor(THRESHOLDS, len(shapes))
    if mask == "threshold":
        arguments["threshold"] = levels
    elif mask == "share":
        arguments["share"] = (MASK_KEY, 0.3)
    else:
        arguments["bits"] = ops.threshold_bits(weights(shapes, dtype, seed=1), levels)
    if out:
        poisoned = [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes]
        arguments["out"] = placed(poisoned, layout, 12)
    return arguments


def _masked() -> dict[str, Case]:
    def case(**options) -> Case:
        written = ("weights", "out") if options.get("out") else ("weights",)
        return Case("masked_perturb_", functools.partial(masked_arguments, **options), written)

    cases = {}
    for mask, dtype, (layout, rounding) in itertools.product(MASKS, DTYPES, PLACES):
        options = {"dtype": dtype, "layout": layout, "rounding": rounding, "decay": 0.02}
        cases[f"{mask} {dtype} {layout} {rounding}"] = case(mask=mask, **options)
        if layout == "strided":
            cases[f"{mask} {dtype} {layout} {rounding} out"] = case(mask=mask, out=True, **options)
    for mask, draws, distribution in itertools.product(MASKS, (1, 2, 3), DISTRIBUTIONS):
        options = {"draws": draws, "distribution": distribution, "decay": DECAYS[draws - 1]}
        cases[f"{mask} {draws} {distribution}"] = case(mask=mask, **options)
    return cases


MASKS = ("threshold", "share", "bits")
masked = _masked()


# ---- preconditioned_update_ and preconditioned_perturb_ ------------------------------------------------------------


def rule_named(name: str, count: int):
    """A rule with a learning rate (and a floor) per tensor."""
    lr = per_tensor([1e-2, 0.3, 1e-3], count)
    return {
        "momentum": ops.MomentumRule(lr, 0.9),
        "adam": ops.AdamRule(lr, step=3, betas=(0.9, 0.95)),
        "hizoo": ops.HiZOORule(lr, curvature=2.5, alpha=0.1),
        "helene": ops.HELENERule(lr, anneal=0.3, floor=per_tensor([0.5, 1.0], count), gamma=1.5, eps=1e-6),
        "helene_refresh": ops.HELENERule(lr, anneal=0.3, floor=per_tensor([0.5, 1.0], count), refresh=(0.99, 8.0)),
    }[name]


def update_arguments(
    rule: str,
    dtype=torch.float32,
    draws: int = 1,
    distribution: str = "normal",
    rounding: str = "nearest",
    decay=0.0,
    layout: str = "plain",
    shapes=SHAPES,
) -> dict:
    """Arguments of ``preconditioned_update_``; the second state, and the first of HiZOO, is positive."""
    chosen = rule_named(rule, len(shapes))
    state = [weights(shapes, seed=2 + i, scale=0.1) for i in range(chosen.states)]
    state[-1] = [t.abs() + 0.1 for t in state[-1]] if rule != "momentum" else state[-1]
    return {
        **common(dtype, draws, distribution, rounding, decay, layout, shapes),
        "state": [placed(s, layout, 10 + 3 * i) for i, s in enumerate(state)],
        "rule": chosen,
        "restore": [1e-2, per_tensor([0.5, -0.2], len(shapes)), 0.0][:draws],
    }


def perturb_arguments(
    dtype=torch.float32,
    draws: int = 2,
    distribution: str = "normal",
    rounding: str = "nearest",
    decay=0.0,
    layout: str = "plain",
    out: bool = False,
    shapes=SHAPES,
) -> dict:
    """Arguments of ``preconditioned_perturb_``."""
    arguments = common(dtype, draws, distribution, rounding, decay, layout, shapes)
    arguments["curvature"] = placed([t.abs() + 0.1 for t in weights(shapes, seed=2)], layout, 10)
    if out:
        poisoned = [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes]
        arguments["out"] = placed(poisoned, layout, 12)
    return arguments


def _preconditioned() -> dict[str, Case]:
    def update(**options) -> Case:
        build = functools.partial(update_arguments, **options)
        return Case("preconditioned_update_", build, ("weights", "state"))

    def perturb(**options) -> Case:
        written = ("weights", "curvature", *(("out",) if options.get("out") else ()))
        return Case("preconditioned_perturb_", functools.partial(perturb_arguments, **options), written)

    cases = {}
    for dtype, (layout, rounding) in itertools.product(DTYPES, PLACES):
        options = {"dtype": dtype, "layout": layout, "rounding": rounding, "decay": 0.02}
        cases[f"perturb {dtype} {layout} {rounding}"] = perturb(**options)
        if layout == "strided":
            cases[f"perturb {dtype} {layout} {rounding} out"] = perturb(out=True, **options)
        for rule in RULES if layout == "plain" else ("momentum", "helene_refresh"):  # with one state, and with two
            cases[f"{rule} {dtype} {layout} {rounding}"] = update(rule=rule, **options)
    for draws, distribution in itertools.product((1, 2, 3), DISTRIBUTIONS):
        options = {"draws": draws, "distribution": distribution, "decay": DECAYS[draws - 1]}
        cases[f"perturb {draws} {distribution}"] = perturb(**options)
        for rule in RULES:
            if rule != "hizoo" or draws == 1:
                cases[f"{rule} {draws} {distribution}"] = update(rule=rule, **options)
    return cases


preconditioned = _preconditioned()


# ---- anchor_affine_ ------------------------------------------------------------------------------------------------


def anchor_arguments(
    dtype=torch.float32,
    anchors=torch.float32,
    deltas=None,
    rounding: str = "nearest",
    layout: str = "plain",
    coefficient=0.7,
    out: bool = False,
    shapes=SHAPES,
) -> dict:
    """Arguments of ``anchor_affine_``; ``anchors`` and ``deltas`` are dtypes, no ``deltas`` are given for None."""
    arguments = {
        "weights": placed(weights(shapes, dtype), layout, 7),
        "anchors": placed(weights(shapes, anchors, seed=1), layout, 10),
        "coefficient": coefficient,
        "tensor_ids": IDS[: len(shapes)],
        **ROUNDINGS[rounding],
        **spans(shapes, layout),
    }
    if deltas is not None:
        arguments["deltas"] = placed(weights(shapes, deltas, seed=2, scale=0.1), layout, 13)
    if out:
        poisoned = [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes]
        arguments["out"] = placed(poisoned, layout, 12)
    return arguments


def _anchored() -> dict[str, Case]:
    cases = {}
    for dtype, (layout, rounding) in itertools.product(DTYPES, PLACES):
        own = dict.fromkeys([torch.float32, dtype])
        for anchors, deltas in itertools.product(own, [None, *own]):
            options = {"dtype": dtype, "anchors": anchors, "deltas": deltas, "rounding": rounding, "layout": layout}
            options["coefficient"] = per_tensor([0.7, -1.3, 0.0], len(SHAPES)) if layout == "strided" else 0.7
            build = functools.partial(anchor_arguments, **options)
            name = f"{dtype} {layout} {rounding} {anchors} {deltas}"
            cases[name] = Case("anchor_affine_", build, ("weights",))
            if layout == "strided":
                cases[f"{name} out"] = Case("anchor_affine_", functools.partial(build, out=True), ("weights", "out"))
    return cases


anchored = _anchored()


# ---- seeded_dot and squared_norms ----------------------------------------------------------------------------------


def dot_arguments(dtype=torch.float32, distribution: str = "normal", layout: str = "plain", shapes=SHAPES) -> dict:
    """Arguments of ``seeded_dot``."""
    return {
        "tensors": placed(weights(shapes, dtype), layout, 7),
        "key": KEYS[0],
        "tensor_ids": IDS[: len(shapes)],
        "distribution": distribution,
        **spans(shapes, layout),
    }


def norm_arguments(dtype=torch.float32, anchors=None, layout: str = "plain", shapes=SHAPES) -> dict:
    """Arguments of ``squared_norms``; ``anchors`` is their dtype, or None for none."""
    arguments = {"tensors": placed(weights(shapes, dtype), layout, 7)}
    if anchors is not None:
        arguments["anchors"] = placed(weights(shapes, anchors, seed=1), layout, 10)
    return arguments


def _reduced() -> dict[str, Case]:
    cases = {}
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        for distribution in DISTRIBUTIONS:
            options = {"dtype": dtype, "layout": layout, "distribution": distribution}
            cases[f"dot {dtype} {layout} {distribution}"] = Case(
                "seeded_dot", functools.partial(dot_arguments, **options)
            )
        if layout in ("plain", "strided"):
            for anchors in dict.fromkeys([None, torch.float32, dtype]):
                options = {"dtype": dtype, "layout": layout, "anchors": anchors}
                cases[f"norm {dtype} {layout} {anchors}"] = Case(
                    "squared_norms", functools.partial(norm_arguments, **options)
                )
    return cases


reduced = _reduced()
