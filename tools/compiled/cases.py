"""What tools.compiled compiles: every op of the Triton backend in its main configurations, and others' kernels.

A case is a call of the public op on one 4096 x 4096 matrix; which kernel that launches, and how, the op says itself
(launches.py). Kernels that run beside a pass and do not touch weights have read = written = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton

from pgap_kernels import (
    AdamRule,
    AdaMURule,
    HELENERule,
    HiZOORule,
    MomentumRule,
    anchor_affine_,
    assemble_gradient_,
    dense_perturb_,
    lowrank_forward_,
    lowrank_perturb_,
    masked_perturb_,
    preconditioned_perturb_,
    preconditioned_update_,
    seeded_dot,
    squared_norms,
)
from pgap_kernels.triton import guard
from pgap_kernels.triton.config import forward_config
from tools.compiled import baselines, inductor
from tools.compiled.launches import Launch, recorded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SIDE = 4096


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    kernel: str
    config: str
    dtype: str
    launches: Callable[[str], list[Launch]]  # of a call, on a GPU of an architecture
    tile: Callable[[dict], int]  # weights in a tile, given the kernel's arguments
    read: int  # bytes per weight
    written: int
    # Times that each loop over weights runs, given the arguments and the tiles of a program, in the order of the code.
    loops: Callable[[dict, int], tuple[int, ...]]
    fixed: int = 0  # how many of those, the first, run as often as arguments say; the rest may be unrolled or peeled
    readers: tuple[str, ...] = ()  # functions that the kernel calls to read weights; none: every load is one
    rank: int | None = None
    numbers: int = SIDE * SIDE  # that the launch makes or goes over
    function: str = ""  # of more than one launch, the kernel meant
    only: str = ""  # beginning of the targets it is for

    @property
    def name(self) -> str:
        return " ".join(x for x in (self.kernel, self.config, self.rank and f"rank {self.rank}", self.dtype) if x)

    def launch(self, architecture: str) -> Launch:
        """The launch that is meant."""
        found = [x for x in self.launches(architecture) if self.function in ("", x.kernel.fn.__name__)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} launches of {self.function or 'a kernel'}, not one")
        return found[0]


Op = Callable[[torch.dtype], object]  # called with the dtype of the weights


def _matrix(dtype: torch.dtype = torch.float32, columns: int = SIDE) -> torch.Tensor:
    return torch.empty(SIDE, columns, dtype=dtype)


def _same(value, *_):
    """The value, whatever the launch."""
    return value


def _tiled(
    kernel: str, config: str, dtype: str, op: Op, read: int, written: int, loops: int = 0, lanes: int = 0
) -> Case:
    """A case of a kernel that goes over groups of 4096 weights.

    Its loops over draws are counted at one draw each; with ``lanes`` it then loops over the four lanes of a group.
    """
    launches = partial(recorded, partial(op, DTYPES[dtype]))
    times, tile = (1,) * loops + (4,) * lanes, 4096 // 4**lanes
    return Case(
        kernel,
        config,
        dtype,
        launches,
        partial(_same, tile),
        read,
        written,
        partial(_same, times),
        fixed=loops,
        readers=("load_tile", "load_lane"),
    )


# ---- dense ----------------------------------------------------------------------------------------------------------

ONE = [(1, 1e-3)]
ROUNDED: dict = {"rounding": "stochastic", "rounding_key": 9}
# Configuration, op, loops.
DENSE: list[tuple[str, Op, int]] = [
    ("J=1", lambda t: dense_perturb_([_matrix(t)], ONE, tensor_ids=[7]), 0),
    ("J=2", lambda t: dense_perturb_([_matrix(t)], ONE * 2, tensor_ids=[7]), 0),
    ("looped", lambda t: dense_perturb_([_matrix(t)], ONE * 3, tensor_ids=[7]), 1),
    ("decay", lambda t: dense_perturb_([_matrix(t)], ONE, tensor_ids=[7], decay=1e-4), 0),
    ("stochastic", lambda t: dense_perturb_([_matrix(t)], ONE, tensor_ids=[7], decay=1e-4, **ROUNDED), 0),
    ("staged", lambda t: _staged(t), 2),
    ("fast", lambda t: dense_perturb_([_matrix(t)], ONE, tensor_ids=[7], tier="fast"), 0),
    ("rademacher", lambda t: dense_perturb_([_matrix(t)], ONE, tensor_ids=[7], distribution="rademacher"), 0),
    ("mask threshold", lambda t: masked_perturb_([_matrix(t)], ONE, tensor_ids=[7], threshold=0.1), 0),
    ("mask share", lambda t: masked_perturb_([_matrix(t)], ONE, tensor_ids=[7], share=(5, 0.5)), 0),
    ("mask bits", lambda t: masked_perturb_([_matrix(t)], ONE, tensor_ids=[7], bits=[_bits()]), 0),
]


def _bits() -> torch.Tensor:
    return torch.empty(SIDE * SIDE // 32, dtype=torch.int32)


def _staged(dtype: torch.dtype) -> None:
    """Two passes in one, as a replay has them, each with decay and, for 16 bits, stochastic rounding."""
    keys, scalars = torch.tensor([1, 2]), torch.ones(2, 1)
    draws = {"keys": keys, "coefficients": scalars, "tensor_ids": [7], "rounding_keys": keys}
    torch.ops.pgap_kernels.dense_perturb_([_matrix(dtype)], **draws, decay=scalars, stages=[1, 1])


def _assemble(draws: list, dtype: torch.dtype) -> None:
    assemble_gradient_([_matrix(dtype)], draws, tensor_ids=[7])


def dense_cases() -> list[Case]:
    """Dense noise, in place and masked, and assembled into a tensor that is not read."""
    cases = []
    for dtype, size in BYTES.items():
        for config, op, loops in DENSE:
            if (dtype, config) == ("fp32", "stochastic"):
                continue  # is rounded to nearest
            case = _tiled("dense", config, dtype, op, size, size, loops)
            cases.append(replace(case, only="sm_") if config == "fast" else case)
    for config, draws, loops in (("J=1", ONE, 0), ("looped", ONE * 3, 1)):
        cases.append(_tiled("assemble", config, "fp32", partial(_assemble, draws), 0, 4, loops))
    return cases


# ---- with state, an anchor, or a sum for a result -------------------------------------------------------------------

# Rule, bytes of state read and written per weight.
RULES = {
    "momentum": (MomentumRule(1e-3), 4, 4),
    "adam": (AdamRule(1e-3, 3), 8, 8),
    "hizoo": (HiZOORule(1e-3, 1.0), 4, 4),
    "adamu": (AdaMURule(1e-3, 1.0, 0.9, 0.1), 4, 4),
    "helene": (HELENERule(1e-3, 0.5, 1.0), 8, 4),
    "helene refresh": (HELENERule(1e-3, 0.5, 1.0, refresh=(0.9, 4.0)), 8, 8),
}


def _update(draws: list, rule, options: dict, dtype: torch.dtype) -> None:
    state = [[_matrix()] for _ in range(rule.states)]
    restore = [1e-3] * len(draws)
    preconditioned_update_([_matrix(dtype)], state, draws, rule, tensor_ids=[7], restore=restore, **options)


def _perturb(dtype: torch.dtype) -> None:
    preconditioned_perturb_([_matrix(dtype)], ONE, [_matrix()], tensor_ids=[7])


def preconditioned_cases() -> list[Case]:
    """Updates with state beside the weights, and the perturbation that only reads it."""
    cases = []
    for dtype, size in BYTES.items():
        for config, (rule, read, written) in RULES.items():
            op = partial(_update, ONE * 2 if config == "adamu" else ONE, rule, {"decay": 1e-4})
            cases.append(_tiled("preconditioned", config, dtype, op, size + read, size + written, 1, 1))
        op = partial(_update, ONE * 2, AdamRule(1e-3, 3), ROUNDED)
        cases.append(_tiled("preconditioned", "stochastic", dtype, op, size + 8, size + 8, 1, 1))
        cases.append(_tiled("preconditioned", "perturb", dtype, _perturb, size + 4, size, 1, 1))
    return cases


def _from_delta(dtype: torch.dtype) -> None:
    w, anchor, delta = ([_matrix(dtype)] for _ in range(3))
    anchor_affine_(w, anchor, 0.5, deltas=delta, tensor_ids=[7], **ROUNDED)


# Kernel, configuration, op, tensors of the weights' size read and written, whether it loops over lanes.
OTHERS: list[tuple[str, str, Op, int, int, int]] = [
    ("anchor", "", lambda t: anchor_affine_([_matrix(t)], [_matrix(t)], 0.5), 2, 1, 0),
    ("anchor", "stored delta", _from_delta, 2, 1, 0),
    ("reduce", "dot", lambda t: seeded_dot([_matrix(t)], 1, tensor_ids=[7]), 1, 0, 1),
    ("reduce", "distance", lambda t: squared_norms([_matrix(t)], [_matrix(t)]), 2, 0, 1),
]


def _guard(dtype: torch.dtype) -> None:
    scalars = torch.empty(1, 1, device="meta")
    guard.guard(scalars.device, scalars)


def other_cases() -> list[Case]:
    """Distances from an anchor, sums, and what runs beside them: the sum of parts, the check of device scalars."""
    cases = []
    for dtype, size in BYTES.items():
        for kernel, config, op, read, written, lanes in OTHERS:
            case = _tiled(kernel, config, dtype, op, read * size, written * size, lanes=lanes)
            cases.append(replace(case, function="reduce_kernel") if kernel == "reduce" else case)
    parts = _tiled("reduce", "parts", "fp32", lambda t: squared_norms([_matrix(t)]), 0, 0)
    return [*cases, replace(parts, function="sum_tiles_kernel"), _tiled("guard", "", "fp32", _guard, 0, 0)]


# ---- low rank -------------------------------------------------------------------------------------------------------

# Configuration, rank, core.
LOWRANK: list[tuple[str, int, Callable[[int], object]]] = [
    ("no core", 4, lambda rank: None),
    ("drawn core", 16, lambda rank: 3),
    ("drawn core", 64, lambda rank: 3),
    ("stored core", 16, lambda rank: [torch.empty(rank, rank)]),
    ("stochastic", 16, lambda rank: 3),
    ("no core", 128, lambda rank: None),
    ("drawn factors", 4, lambda rank: None),
    ("quotient", 4, lambda rank: [torch.empty(rank)]),
    ("quotient", 32, lambda rank: [torch.empty(rank)]),
]


def _lowrank(config: str, rank: int, core: Callable[[int], object], dtype: torch.dtype) -> None:
    """Factors of W's dtype."""
    w, left, right = _matrix(dtype), [_matrix(dtype, rank)], [_matrix(dtype, rank)]
    options = {"decay": 1e-4} | ROUNDED if config == "stochastic" else {}
    if config == "quotient":
        options = {"below": [torch.empty(rank)], "e": 1e-8}
    if config == "drawn factors":
        left, right, options = 1, 2, {"rank": rank}
    lowrank_perturb_([w], left, right, core=core(rank), coefficient=1e-3, tensor_ids=[7], **options)


def _lowrank_loops(arguments: dict, tiles: int) -> tuple[int, ...]:
    """Over tiles, and, where P is not made by the program, over the rank in each; of quotients twice."""
    rank, tile = arguments["FACTORS"].rank, arguments["TILE"]
    step = tile.step if rank >= 16 else 1
    products = 2 if arguments["QUOTIENT"] else 1
    return (tiles,) if tile.resident or rank == step else (tiles, *[-(-rank // step)] * products)


def lowrank_cases() -> list[Case]:
    """Low-rank directions, and the product of factors that runs before those of high rank, per weight of the matrix."""
    cases = []
    for dtype, size in BYTES.items():
        for config, rank, core in LOWRANK:
            if (dtype, config) == ("fp32", "stochastic"):
                continue
            launches = partial(recorded, partial(_lowrank, config, rank, core, DTYPES[dtype]))
            case = Case(
                "low rank",
                config,
                dtype,
                launches,
                lambda x: x["TILE"].rows * x["TILE"].columns,
                size,
                size,
                _lowrank_loops,
                fixed=1,
                readers=("load_block",),
                rank=rank,
            )
            cases.append(replace(case, function="lowrank_kernel"))
        for config, rank, core in (("drawn core", 64, lambda rank: 3), ("stored core", 128, LOWRANK[3][2])):
            launches = partial(recorded, partial(_lowrank, config, rank, core, DTYPES[dtype]))
            case = Case(
                "factor product",
                config,
                dtype,
                launches,
                lambda x: x["TILE"].rows * x["TILE"].step,
                read=0,
                written=0,
                loops=lambda _, tiles: (tiles, tiles),  # over columns of P, and over the sum in each
                rank=rank,
            )
            cases.append(replace(case, function="product_kernel", numbers=SIDE * rank))
    return cases


# ---- low rank in the forward ----------------------------------------------------------------------------------------

# Configuration, ranks, dtype of x: None is that of y, whose elements and x's are the weights here. "own": two slices,
# each with its own factors and a coefficient.
FORWARD: list[tuple[str, tuple[int, ...], torch.dtype | None]] = [
    ("project", (1, 8, 16, 32, 64, 128), None),
    ("project own", (1, 16), None),
    ("project float32", (16, 32, 64, 128), torch.float32),
    ("mix", (128,), None),
    ("mix rows", (16, 128), torch.int64),
    ("expand", (1, 8, 16, 64, 128), None),
    ("expand own", (1, 16), None),
    ("draw own", (16,), None),
]


def _forward(rank: int, x_dtype: torch.dtype | None, config: str, dtype: torch.dtype) -> None:
    """Factors of y's dtype, as many tokens as columns."""
    numbers = x_dtype == torch.int64
    x = torch.zeros(SIDE, dtype=x_dtype) if numbers else _matrix(x_dtype or dtype)
    left, right = _matrix(dtype, rank), _matrix(dtype, rank)
    if not config.endswith("own"):
        lowrank_forward_(_matrix(dtype), x, left, right, [torch.empty(rank, rank)], transposed=numbers)
        return
    ours = [1, 2] if config.startswith("draw") else [left, left.clone()]
    other = {"coefficients": [1.0, -1.0], "shape": (SIDE, SIDE), "tensor_id": 7}
    lowrank_forward_(_matrix(dtype), x, ours, [right, right.clone()], **other)


def _steps(over: str, arguments: dict, _: int) -> tuple[int, ...]:
    """Of the sum over the rank, or over the width of its rows."""
    steps = -(-getattr(arguments["SHAPE"], over) // arguments["TILE"].step)
    return (steps,) if steps > 1 else ()


def _forward_case(config: str, rank: int, x_dtype: torch.dtype | None, dtype: str) -> Case:
    launches, kernel = partial(recorded, partial(_forward, rank, x_dtype, config, DTYPES[dtype])), config.split()[0]
    case = Case(
        "forward",
        config,
        dtype,
        launches,
        lambda x: x["TILE"].rows * x["TILE"].columns,
        read=0,
        written=0,
        loops=partial(_steps, "rank"),
        rank=rank,
        numbers=SIDE * rank,
        function=f"{kernel}_kernel",
    )
    if kernel == "draw":
        size = BYTES[dtype]
        return replace(case, tile=lambda x: x["BLOCK"], written=size, loops=lambda *_: (), numbers=2 * SIDE * rank)
    if kernel == "expand":
        size, loops = BYTES[dtype], partial(_steps, "width")
        return replace(case, read=size, written=size, loops=loops, readers=("load_outputs",), numbers=SIDE * SIDE)
    if kernel == "project":
        read = 4 if x_dtype else BYTES[dtype]
        wide = forward_config(DTYPES[dtype], rank, "other").project.columns  # the same for every target
        times = -(-rank // wide)  # that x is read
        tile, loops = (lambda x: x["TILE"].rows * x["TILE"].step), (lambda _, tiles: (tiles,))
        readers, numbers = ("load_inputs",), SIDE * SIDE * times
        return replace(case, tile=tile, read=read, loops=loops, fixed=1, readers=readers, numbers=numbers)
    return case


def forward_cases() -> list[Case]:
    """x F, its product with the core (or that of rows of F), and the pass over y, per element of x or y."""
    return [
        _forward_case(config, rank, x_dtype, dtype)
        for dtype in BYTES
        for config, ranks, x_dtype in FORWARD
        if (dtype, config) != ("fp32", "project float32")
        for rank in ranks
    ]


# ---- others' --------------------------------------------------------------------------------------------------------


def _baseline(function: triton.JITFunction, dtype: str, block: int, weights: int, architecture: str) -> list[Launch]:
    given = {"w_ptr": _matrix(DTYPES[dtype]), "a_ptr": torch.empty(1), "seed": 12345, "BLOCK": block}
    arguments = {name: given[name] for name in function.arg_names}
    return [Launch(function, SIDE * SIDE // weights, arguments, {"num_warps": 4})]


def _inductor(dtype: str, architecture: str) -> list[Launch]:
    function = inductor.kernel(dtype)
    arguments: dict = dict.fromkeys((x for x in function.arg_names if "ptr" in x), _matrix(DTYPES[dtype]))
    arguments |= {"in_ptr0": torch.empty(1, dtype=torch.int64), "load_seed_offset": 0}
    arguments |= {"xnumel": SIDE * SIDE, "XBLOCK": 1024}
    return [Launch(function, SIDE * SIDE // 1024, arguments, {"num_warps": 4})]


def baseline_cases() -> list[Case]:
    """With Triton's default options; inductor's kernel in the first of the two shapes that it would try."""
    cases = []
    for dtype, size in BYTES.items():
        for name, function, block, weights in (
            ("copy", baselines.add_kernel, 4096, 4096),
            ("tl.randn", baselines.randn_kernel, 1024, 1024),
            ("tl.randn4x", baselines.randn4x_kernel, 1024, 4096),
        ):
            launches = partial(_baseline, function, dtype, block, weights)
            cases.append(Case(name, "", dtype, launches, partial(_same, weights), size, size, partial(_same, ())))
        launches = partial(_inductor, dtype)
        tile, loops = partial(_same, 1024), partial(_same, ())
        cases.append(Case("torch.compile", "MeZO idiom", dtype, launches, tile, size, size, loops))
    return cases


def all_cases() -> list[Case]:
    ours = [*dense_cases(), *preconditioned_cases(), *other_cases(), *lowrank_cases(), *forward_cases()]
    return [*ours, *baseline_cases()]
