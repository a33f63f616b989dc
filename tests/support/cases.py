"""Calls of every op, built anew for every run, so that every backend gets the same.

``ROWS`` has a row for each op family, and for each of its forms: a new op is a new row. ``CASES`` are the calls that
every backend answers with the bits of the reference. Where an op sums products, its row has whole numbers, whose sums
are exact in whatever order they are made.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgap_kernels import noise

from .helpers import DTYPES, integers, ops, poison, weights

SHAPES = [(), (0,), (0, 4), (2, 0, 3), (1,), (31,), (4097,), (3, 397), (3, 5, 2, 2)]
MATRICES = [(35, 70), (64, 128), (0, 50), (33, 40)]
IDS = [noise.tensor_id(f"w{i}") for i in range(len(SHAPES))]
KEYS = [noise.derive(9, step, noise.Role.DENSE) for step in range(3)]
MASK_KEY, LEFT, RIGHT, CORE, SIGN = (
    noise.derive(9, 0, role)
    for role in (noise.Role.MASK, noise.Role.LEFT, noise.Role.RIGHT, noise.Role.CORE, noise.Role.SIGN)
)
COEFFICIENTS = [1e-1, -0.37, 2.5e-2]
ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic", "rounding_key": noise.derive(9, 0, noise.Role.ROUNDING)},
}
DISTRIBUTIONS = ("normal", "rademacher")
# contiguous; rows apart in memory; a shard beside others; indices beyond 2**31, rows far apart
LAYOUTS = ("plain", "strided", "shard", "far")
DECAYS = (0.0, 0.03, [0.0, 0.01, 0.2])
RULES = ("momentum", "adam", "hizoo", "helene", "helene_refresh", "adamu")


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
    return [storage(t) for name in case.written for t in flat(arguments[name])] if case.written else flat(returned)


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


def per_tensor(values: Sequence[float], count: int) -> list[float]:
    return list(itertools.islice(itertools.cycle(values), count))


def poisoned(shapes, dtype, layout: str, gap: int = 12) -> list[Tensor]:
    """Outputs, full of NaN."""
    return placed(poison(weights(shapes, dtype)), layout, gap)


def common(dtype, draws: int, distribution: str, rounding: str, decay, layout: str, shapes) -> dict:
    """What all ops that add noise take, with the weights laid out."""
    return {
        "weights": placed(weights(shapes, dtype), layout, 7),
        "draws": list(zip(KEYS[:draws], COEFFICIENTS[:draws], strict=True)),
        "tensor_ids": IDS[: len(shapes)],
        "decay": per_tensor(decay, len(shapes)) if isinstance(decay, list) else decay,
        "distribution": distribution,
        **ROUNDINGS[rounding],
        **spans(shapes, layout),
    }


# ---- the ops ---------------------------------------------------------------------------------------------------------


def dense_arguments(
    dtype=torch.float32,
    draws: int = 2,
    distribution: str = "normal",
    rounding: str = "nearest",
    decay=0.0,
    layout: str = "plain",
    out: bool = False,
    shapes=SHAPES,
) -> dict:
    """Arguments of ``dense_perturb_``."""
    arguments = common(dtype, draws, distribution, rounding, decay, layout, shapes)
    return arguments | ({"out": poisoned(shapes, dtype, layout)} if out else {})


def assemble_arguments(draws: int = 2, distribution: str = "normal", layout: str = "plain", shapes=SHAPES) -> dict:
    """Arguments of ``assemble_gradient_``."""
    arguments = common(torch.float32, draws, distribution, "nearest", 0.0, layout, shapes)
    del arguments["decay"], arguments["weights"]
    return {"gradients": poisoned(shapes, torch.float32, layout), **arguments}


def masked_arguments(mask: str, dtype=torch.float32, shapes=SHAPES, **options) -> dict:
    """Arguments of ``masked_perturb_`` with a mask of one of the three kinds; options are those of the dense op."""
    levels = per_tensor([0.3, 0.8, 0.05], len(shapes))
    own: dict[str, Any] = {"threshold": levels, "share": (MASK_KEY, 0.3)}
    own["bits"] = ops.threshold_bits(weights(shapes, dtype, seed=1), levels) if mask == "bits" else None
    return dense_arguments(dtype, shapes=shapes, **options) | {mask: own[mask]}


MASKS = ("threshold", "share", "bits")


def rule_named(name: str, count: int):
    """A rule with a learning rate (and a floor) per tensor."""
    lr = per_tensor([1e-2, 0.3, 1e-3], count)
    return {
        "momentum": ops.MomentumRule(lr, 0.9),
        "adam": ops.AdamRule(lr, step=3, betas=(0.9, 0.95)),
        "hizoo": ops.HiZOORule(lr, curvature=2.5, alpha=0.1),
        "helene": ops.HELENERule(lr, anneal=0.3, floor=per_tensor([0.5, 1.0], count), gamma=1.5, eps=1e-6),
        "adamu": ops.AdaMURule(lr, -1.0, 0.8, 0.3, per_tensor([1e-2, -0.5], count)),
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
    draws = {"hizoo": 1, "adamu": 2}.get(rule, draws)
    state = [weights(shapes, seed=2 + i, scale=0.1) for i in range(chosen.states)]
    state[-1] = [t.abs() + 0.1 for t in state[-1]] if rule not in ("momentum", "adamu") else state[-1]
    arguments = common(dtype, draws, distribution, rounding, decay, layout, shapes)
    restore = [1e-2, per_tensor([0.5, -0.2], len(shapes)), 0.0][:draws]
    if rule == "adamu":
        arguments["draws"] = [(key, a if i == 0 else 0.0) for i, (key, a) in enumerate(arguments["draws"])]
        restore[0] = 0.0
    return {
        **arguments,
        "state": [placed(s, layout, 10 + 3 * i) for i, s in enumerate(state)],
        "rule": chosen,
        "restore": restore,
    }


def perturb_arguments(dtype=torch.float32, layout: str = "plain", shapes=SHAPES, around=None, **options) -> dict:
    """Arguments of ``preconditioned_perturb_``; options are those of the dense op."""
    curvature = placed([t.abs() + 0.1 for t in weights(shapes, seed=2)], layout, 10)
    given = {"curvature": curvature} if around is None else {"curvature": curvature, "around": around}
    return dense_arguments(dtype, layout=layout, shapes=shapes, **options) | given


def anchor_arguments(
    dtype=torch.float32,
    anchors=torch.float32,
    deltas=None,
    rounding: str = "nearest",
    layout: str = "plain",
    coefficient=(0.7, -1.3, 0.0),
    out: bool = False,
    shapes=SHAPES,
) -> dict:
    """Arguments of ``anchor_affine_``; ``anchors`` and ``deltas`` are dtypes or "own", no ``deltas`` are given for
    None."""
    anchors, deltas = (dtype if kind == "own" else kind for kind in (anchors, deltas))
    arguments = {
        "weights": placed(weights(shapes, dtype), layout, 7),
        "anchors": placed(weights(shapes, anchors, seed=1), layout, 10),
        "coefficient": per_tensor(coefficient, len(shapes)) if isinstance(coefficient, (list, tuple)) else coefficient,
        "tensor_ids": IDS[: len(shapes)],
        **ROUNDINGS[rounding],
        **spans(shapes, layout),
    }
    if deltas is not None:
        arguments["deltas"] = placed(weights(shapes, deltas, seed=2, scale=0.1), layout, 13)
    return arguments | ({"out": poisoned(shapes, dtype, layout)} if out else {})


def lowrank_arguments(
    core: str,
    rank: int,
    dtype=torch.float32,
    rounding: str = "nearest",
    decay=0.0,
    layout: str = "plain",
    out: bool = False,
    shapes=MATRICES,
) -> dict:
    """Arguments of ``lowrank_perturb_``: whole numbers, or with the core "drawn" everything drawn; "quotient" is a
    diagonal core, and factors whose elements are signs, so that what it is divided by is 4.

    Decays are to the nearest power of two, so that no product with them is rounded either.
    """
    size = {"diagonal": (rank,), "quotient": (rank,), "full": (rank, rank)}.get(core)
    factors: dict[str, Any] = {
        "left": integers([(m, rank) for m, _ in shapes], 4, seed=1),
        "right": integers([(n, rank) for _, n in shapes], 4, seed=2),
        "core": integers([size] * len(shapes), 2, seed=3) if size else None,
    }
    if core == "quotient":
        for side in ("left", "right"):
            factors[side] = [torch.where(f > 0, 1.0, -1.0) for f in factors[side]]
        below = torch.ones(rank)
        below[0] = 16 - rank
        factors |= {"below": [below.clone() for _ in shapes], "e": 1.0}
    if core == "drawn":
        factors = {"left": LEFT, "right": RIGHT, "core": CORE, "rank": rank}
    arguments = {
        "weights": placed(weights(shapes, dtype), layout, 7),
        **factors,
        "coefficient": per_tensor([0.25, -0.5], len(shapes)),
        "decay": per_tensor([_power_of_two(d) for d in decay], len(shapes))
        if isinstance(decay, list)
        else _power_of_two(decay),
        "tensor_ids": IDS[: len(shapes)],
        **ROUNDINGS[rounding],
        **spans(shapes, layout),
    }
    return arguments | ({"out": poisoned(shapes, dtype, layout)} if out else {})


def _power_of_two(x: float) -> float:
    return 2.0 ** round(math.log2(x)) if x else 0.0


def dot_arguments(
    dtype=torch.float32, distribution: str = "normal", layout: str = "plain", shapes=SHAPES, exact: bool = False
) -> dict:
    """Arguments of ``seeded_dot``; ``exact`` ones are whole numbers."""
    values = [t.to(dtype) for t in integers(shapes, 9, seed=1)] if exact else weights(shapes, dtype)
    return {
        "tensors": placed(values, layout, 7),
        "key": KEYS[0],
        "tensor_ids": IDS[: len(shapes)],
        "distribution": distribution,
        **spans(shapes, layout),
    }


def norm_arguments(
    dtype=torch.float32, anchors=None, layout: str = "plain", shapes=SHAPES, exact: bool = False
) -> dict:
    """Arguments of ``squared_norms``; ``anchors`` is their dtype or "own", or None for none."""

    def values(kind, seed: int) -> list[Tensor]:
        return [t.to(kind) for t in integers(shapes, 9, seed)] if exact else weights(shapes, kind, seed=seed)

    arguments = {"tensors": placed(values(dtype, 0), layout, 7)}
    if anchors is not None:
        arguments["anchors"] = placed(values(dtype if anchors == "own" else anchors, 1), layout, 10)
    return arguments


def forward_arguments(indices: bool, dtype=torch.float32, layout: str = "plain", tokens: int = 14) -> dict:
    """Arguments of ``lowrank_forward_`` of which every product and sum is exact, in 16 bits too."""
    rank, columns, inner = 5, 37, 70
    left, right = integers([(inner if indices else columns, rank), (columns if indices else inner, rank)], 1, seed=1)
    core = torch.eye(rank)[torch.randperm(rank, generator=torch.Generator().manual_seed(5))]
    x = torch.arange(tokens) * 11 % inner if indices else integers([(tokens, inner)], 1, seed=4)[0].to(dtype)
    return {
        "outputs": weights([(tokens, columns)], dtype, seed=3)[0],
        "inputs": apart([x], 6)[0] if layout == "strided" else x,
        "left": left,
        "right": right,
        "cores": [core, -core],
        "transposed": indices,
    }


def slice_arguments(dtype=torch.float32, layout: str = "plain", tokens: int = 14) -> dict:
    """The same with factors and a coefficient of each of two slices."""
    arguments = forward_arguments(False, dtype, layout, tokens)
    sides = {name: [arguments[name], 2 - arguments[name]] for name in ("left", "right")}
    del arguments["cores"]
    return {**arguments, **sides, "coefficients": [1.0, -2.0]}


def draw_arguments(distribution: str = "normal", layout: str = "plain", shape=(3, 4099)) -> dict:
    """Arguments of ``draw``."""
    offset = 2**33 + 17 if layout == "far" else 0
    return {"shape": shape, "key": KEYS[0], "tensor_id": IDS[0], "distribution": distribution, "offset": offset}


def core_arguments(signs: bool) -> dict:
    """Arguments of ``aligned_core``, with drawn signs or without."""
    values = [torch.linspace(3, 0.01, rank) for rank in (1, 2, 7, 33)]
    drawn = {"sign_key": SIGN, "sign_ids": [0, 0, 1, 1]} if signs else {}
    return {"singular_values": values, "key": CORE, "delta": 0.7, "tensor_ids": IDS[:4], **drawn}


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A form of an op, for the properties of all ops.

    Attributes:
        build: makes the keyword arguments; of the settings it takes those that the row ``heeds``.
        written: the arguments that a call writes; with none it returns what it computes.
        elementwise: the arguments that have the shapes of what is written and go with it element by element.
        large: what makes ``build`` give several threads something to do.
    """

    op: str
    build: Callable[..., dict]
    heeds: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    elementwise: tuple[str, ...] = ()
    layouts: tuple[str, ...] = LAYOUTS
    large: tuple[tuple[str, Any], ...] = (("shapes", [(37, 401), (20001,)]),)

    def arguments(self, **changes) -> dict:
        """Arguments in the hardest setting (16 bits, stochastic rounding, a decay), with changes."""
        hard = {"dtype": torch.bfloat16, "rounding": "stochastic", "decay": 0.02}
        return self.build(**{name: value for name, value in hard.items() if name in self.heeds} | changes)

    def case(self, setting: dict) -> Case:
        """The call of a setting."""
        heeded = {name: setting[name] for name in self.heeds}
        written = (*self.written, "out") if heeded.get("out") else self.written
        return Case(self.op, functools.partial(self.build, **heeded), written)


def _settings() -> list[dict]:
    """Few settings in which any two values of any two factors meet (test_op_properties looks)."""
    # Rounding alone touches no index, so every layout is tried with the rounding that does.
    places = [("plain", "nearest"), *((layout, "stochastic") for layout in LAYOUTS)]
    return [
        {
            "dtype": dtype,
            "layout": layout,
            "rounding": rounding,
            "draws": (1, 2, 3)[(i + j) % 3],
            "distribution": DISTRIBUTIONS[(i + j) % 2],
            "decay": DECAYS[(i + 2 * j) % 3],
            "out": bool((i + j // 2) % 2),
        }
        for (i, dtype), (j, (layout, rounding)) in itertools.product(enumerate(DTYPES), enumerate(places))
    ]


SETTINGS = _settings()
_NOISE = ("dtype", "layout", "rounding", "draws", "distribution", "decay")
_ANCHOR = ("dtype", "layout", "rounding", "out")
_LOWRANK = ("dtype", "layout", "rounding", "decay", "out")


def _rows() -> dict[str, Row]:
    part = functools.partial
    weights_alone = {"written": ("weights",), "elementwise": ("weights",)}
    rows = {
        "dense": Row("dense_perturb_", dense_arguments, (*_NOISE, "out"), **weights_alone),
        "assemble": Row(
            "assemble_gradient_",
            assemble_arguments,
            ("draws", "distribution", "layout"),
            ("gradients",),
            ("gradients",),
        ),
    }
    for mask in MASKS:
        build = part(masked_arguments, mask)
        elementwise = ("weights", "bits") if mask == "bits" else ("weights",)
        rows[f"masked {mask}"] = Row("masked_perturb_", build, (*_NOISE, "out"), ("weights",), elementwise)
    for rule in RULES:
        heeds = tuple(name for name in _NOISE if rule not in ("hizoo", "adamu") or name != "draws")
        both = ("weights", "state")
        rows[rule] = Row("preconditioned_update_", part(update_arguments, rule), heeds, both, both)
    for name, build in (("preconditioned", perturb_arguments), ("around", part(perturb_arguments, around=-0.7))):
        both = ("weights", "curvature")
        rows[name] = Row("preconditioned_perturb_", build, (*_NOISE, "out"), ("weights",), both)
    for anchors, deltas in ((torch.float32, None), ("own", None), (torch.float32, "own"), ("own", torch.float32)):
        build = part(anchor_arguments, anchors=anchors, deltas=deltas)
        name, elementwise = f"anchor {anchors} {deltas}", ("weights", "anchors", *(("deltas",) if deltas else ()))
        rows[name] = Row("anchor_affine_", build, _ANCHOR, ("weights",), elementwise)
    for core, rank in (("none", 3), ("diagonal", 9), ("full", 12), ("quotient", 5), ("drawn", 1)):
        build = part(lowrank_arguments, core, rank)
        large = (("shapes", [(131, 197), (70, 40)]),)
        rows[f"low rank {core}"] = Row("lowrank_perturb_", build, _LOWRANK, **weights_alone, large=large)
    dot = part(dot_arguments, distribution="rademacher", exact=True)
    rows["dot"] = Row("seeded_dot", dot, ("dtype", "layout"))
    for anchors in (None, torch.float32, "own"):
        build = part(norm_arguments, anchors=anchors, exact=True)
        rows[f"norms {anchors}"] = Row("squared_norms", build, ("dtype", "layout"), layouts=("plain", "strided"))
    for indices in (False, True):
        rows[f"forward{' indices' * indices}"] = Row(
            "lowrank_forward_",
            part(forward_arguments, indices),
            ("dtype",) if indices else ("dtype", "layout"),
            ("outputs",),
            layouts=("plain", "strided"),
            large=(("tokens", 254),),
        )
    rows["forward slices"] = Row(
        "lowrank_forward_",
        slice_arguments,
        ("dtype", "layout"),
        ("outputs",),
        layouts=("plain", "strided"),
        large=(("tokens", 254),),
    )
    rows["draw"] = Row(
        "draw",
        draw_arguments,
        ("distribution", "layout"),
        layouts=("plain", "far"),
        large=(("shape", (300, 401)),),
    )
    for signs in (False, True):
        rows[f"aligned core{' signs' * signs}"] = Row("aligned_core", part(core_arguments, signs), large=())
    return rows


def _cases() -> dict[str, Case]:
    cases = {}
    for name, row in ROWS.items():
        for setting in SETTINGS:
            if "layout" not in row.heeds or setting["layout"] in row.layouts:
                cases[" ".join([name, *(str(setting[factor]) for factor in row.heeds)])] = row.case(setting)
    return cases


ROWS = _rows()
CASES = _cases()
