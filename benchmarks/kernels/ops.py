"""The ops that benchmarks.kernels times, each with the PyTorch code that does the same today."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import linear

import pgap_kernels as ops  # its ops are looked up when a case is made: a commit compared with may lack some
from benchmarks.harness.timer import Call
from benchmarks.kernels import idioms

A = 1e-3
ONE = [(1, A)]
TWO = [(0, -A), (1, A)]
PROBES = [(key, 0.1) for key in range(4)]
LIST = 224  # matrices of a model of 32 layers
LAYERS = [(576, 576), (192, 576), (1536, 576), (576, 1536), (5120, 5120)]  # SmolLM2-135M's, and one of OPT-13B's
ALL = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """A pass over ``whole``, and what is timed beside it."""

    whole: Tensor
    ours: Call
    idiom: Call  # today's PyTorch code
    others: dict[str, Call] = field(default_factory=dict)  # other PyTorch code
    own: dict[str, Call] = field(default_factory=dict)  # our own ops used otherwise
    extra: int = 0  # bytes that it has to move beyond one read and one write of ``whole``
    floor: Call | None = None  # None: ``whole.add_(1.0)``
    before: Call | None = None  # what comes, untimed, before each call but the floor's
    matrix: Tensor | None = None  # whose size the rows give; None: that of ``whole``

    @property
    def sized_by(self) -> Tensor:
        return self.whole if self.matrix is None else self.matrix


@dataclass(frozen=True)
class Op:
    """How to make a case of a weight matrix (with a rank, and a number of tokens), and for which settings."""

    title: str
    case: Callable[..., Case]
    idiom: str  # the code it replaces
    dtypes: tuple[str, ...] = ALL
    ranked: bool = False
    sized: bool = True  # False: the same tensors whatever the matrix
    layers: bool = False  # timed behind layers (LAYERS), for numbers of tokens
    floor: str = "W.add_(1.0)"
    devices: tuple[str, ...] = ("cpu", "cuda")


def _with_compiled(idiom: Callable, *arguments: object) -> dict:
    """The idiom and its compiled form, as keywords of a case."""
    # Compiling is put off until the call.
    return {
        "idiom": partial(idiom, *arguments),
        "others": {"torch.compile": lambda: idioms.compiled(idiom)(*arguments)},
    }


def _dense(w: Tensor, **options: object) -> Case:
    ours = partial(ops.dense_perturb_, [w], ONE, tensor_ids=[1], **options)
    return Case(w, ours, **_with_compiled(idioms.normal, w, A))


def _rademacher(w: Tensor) -> Case:
    ours = partial(ops.dense_perturb_, [w], ONE, tensor_ids=[1], distribution="rademacher")
    return Case(w, ours, **_with_compiled(idioms.rademacher, w, A))


def _two_draws(w: Tensor) -> Case:
    def two_passes() -> None:
        for draws in TWO:
            ops.dense_perturb_([w], [draws], tensor_ids=[1])

    ours = partial(ops.dense_perturb_, [w], TWO, tensor_ids=[1])
    return Case(w, ours, **_with_compiled(idioms.two_normals, w, A), own={"two_passes": two_passes})


def _stochastic(w: Tensor) -> Case:
    nearest = partial(ops.dense_perturb_, [w], ONE, tensor_ids=[1])
    ours = partial(nearest, rounding="stochastic", rounding_key=2)
    return Case(w, ours, **_with_compiled(idioms.stochastic, w, A), own={"to_nearest": nearest})


def _scratch(w: Tensor) -> Case:
    out = torch.empty_like(w)
    ours = partial(ops.dense_perturb_, [w], ONE, tensor_ids=[1], out=[out])
    return Case(w, ours, **_with_compiled(idioms.scratch, w, out, A))


def _draw(w: Tensor) -> Case:
    ours = partial(ops.draw, w.shape, 1, 1, device=w.device)
    return Case(w, ours, **_with_compiled(idioms.draw, w), extra=-w.nbytes)


def _assemble(w: Tensor) -> Case:
    ours = partial(ops.assemble_gradient_, [w], PROBES, tensor_ids=[1])
    return Case(w, ours, **_with_compiled(idioms.assemble, w, [c for _, c in PROBES]), extra=-w.nbytes)


def _masked(w: Tensor) -> Case:
    bits = ops.threshold_bits([w], 0.6745)  # the median of |N(0, 1)|: half are kept
    ours = partial(ops.masked_perturb_, [w], ONE, tensor_ids=[1], bits=bits)
    return Case(w, ours, **_with_compiled(idioms.masked, w, w.abs() <= 0.6745, A), extra=bits[0].nbytes)


def _adam(w: Tensor) -> Case:
    m, v = (torch.zeros(w.shape, device=w.device) for _ in range(2))
    ours = partial(ops.preconditioned_update_, [w], [[m], [v]], ONE, ops.AdamRule(A, step=3), tensor_ids=[1])
    return Case(w, ours, **_with_compiled(idioms.adam, w, m, v, A, A), extra=2 * (m.nbytes + v.nbytes))


def _anchor(w: Tensor) -> Case:
    w0 = w.clone()
    c = 0.99
    case = Case(
        w, partial(ops.anchor_affine_, [w], [w0], c), **_with_compiled(idioms.anchor, w, w0, c), extra=w0.nbytes
    )
    case.others["lerp"] = partial(idioms.lerp, w, w0, c)
    return case


def _dot(w: Tensor) -> Case:
    ours = partial(ops.seeded_dot, [w], 1, tensor_ids=[1])
    return Case(w, ours, **_with_compiled(idioms.dot, w), extra=-w.nbytes)


def _norms(w: Tensor) -> Case:
    w0 = w.clone()
    return Case(w, partial(ops.squared_norms, [w], [w0]), **_with_compiled(idioms.squared_norm, w, w0))


def _low_rank(w: Tensor, rank: int) -> Case:
    u, v, z = (torch.randn(rows, rank, device=w.device) for rows in (*w.shape, rank))
    ours = partial(ops.lowrank_perturb_, [w], [u], [v], core=[z], coefficient=A)
    left, core, right = (t.to(w.dtype) for t in (u, z, v))
    case = Case(w, ours, **_with_compiled(idioms.low_rank, w, left, core, right, 1.0, A), extra=u.nbytes + v.nbytes)
    case.others["addmm_"] = partial(idioms.addmm, w, left, core, right, A)
    return case


def _quotient(w: Tensor, rank: int) -> Case:
    u, v = (torch.randn(rows, rank, device=w.device) for rows in w.shape)
    first, second = torch.randn(rank, device=w.device), torch.rand(rank, device=w.device)
    e = 1e-8
    ours = partial(ops.lowrank_perturb_, [w], [u], [v], core=[first], below=[second], e=e, coefficient=A)
    left, right, m, below = (t.to(w.dtype) for t in (u, v, first, second))
    theirs = _with_compiled(idioms.quotient, w, left, m, right, below, e, A)
    return Case(w, ours, **theirs, extra=u.nbytes + v.nbytes)


def _forward(w: Tensor, rank: int, tokens: int) -> Case:
    """A layer's output plus what U Z V^T adds to it: each call straight after the layer, as hooks make it."""
    from pgap_kernels.arguments import ForwardArguments
    from pgap_kernels.ops.forward import add_lowrank_  # what mode folded calls: the op without its checks

    out, into = w.shape
    x = torch.randn(tokens, into, device=w.device).to(w.dtype)
    y = linear(x, w)
    u, v, z = (torch.randn(rows, rank, device=w.device) for rows in (out, into, rank))
    u *= 1e-6  # y stays finite over all turns
    left, core, right = (t.to(w.dtype) for t in (u, z, v))

    def layer() -> None:
        """Reads x, writes y, and leaves the caches as they are in a model."""
        torch.mm(x, w.T, out=y)

    given = ForwardArguments([u], [v], [z], coefficients=[], keys=[], shape=[out, into], rank=rank, tensor_id=0)
    return Case(
        y,
        partial(add_lowrank_, y, x, given),
        **_with_compiled(idioms.forward, y, x, left, core, right),
        own={"in_place": partial(ops.lowrank_perturb_, [w], [u], [v], core=[z], coefficient=A)},
        extra=x.nbytes + u.nbytes + v.nbytes,
        floor=partial(linear, x, w),
        before=layer,
        matrix=w,
    )


def _many(whole: Tensor) -> Case:
    tensors, ids = whole.unbind(), list(range(LIST))

    def one_by_one() -> None:
        for w, ident in zip(tensors, ids, strict=True):
            ops.dense_perturb_([w], ONE, tensor_ids=[ident])

    ours = partial(ops.dense_perturb_, tensors, ONE, tensor_ids=ids)
    return Case(whole, ours, partial(idioms.many_normals, tensors, A), own={"one_by_one": one_by_one})


def _list(w: Tensor) -> Case:
    """``w`` cut into near-square matrices, the rest left out."""
    rows = max(isqrt(w.numel() // LIST), 1)
    columns = w.numel() // LIST // rows
    return _many(w.view(-1)[: LIST * rows * columns].view(LIST, rows, columns))


def _host(w: Tensor) -> Case:
    return _many(torch.zeros(LIST, 4, 4, dtype=w.dtype, device=w.device))


_NORMAL = "W.add_(torch.normal(0, 1, W.shape), alpha=a)"
OPS: dict[str, Op] = {
    "dense": Op("dense normal", _dense, _NORMAL),
    "fast": Op("dense normal, fast tier", partial(_dense, tier="fast"), _NORMAL, devices=("cuda",)),
    "rademacher": Op("dense rademacher", _rademacher, "W.add_(torch.randint(0, 2, W.shape) * 2 - 1, alpha=a)"),
    "two_draws": Op("two draws in one pass", _two_draws, "that of one draw, twice"),
    "stochastic": Op(
        "dense normal, stochastic rounding", _stochastic, "in float32, random bits added to those cut off", ALL[1:]
    ),
    "scratch": Op("dense normal into a scratch", _scratch, "torch.add(W, torch.normal(...), alpha=a, out=scratch)"),
    "draw": Op("draw", _draw, "torch.normal(0, 1, shape)", ALL[:1]),
    "assemble": Op(
        "assemble a gradient of 4 probes", _assemble, "G.add_(torch.normal(...), alpha=c), 4 times", ALL[:1]
    ),
    "masked": Op("masked, half kept", _masked, "W.add_(torch.normal(...) * mask, alpha=a)"),
    "adam": Op("Adam update", _adam, "g = rho * torch.normal(...), then m, v, W in place"),
    "anchor": Op("distance from an anchor scaled", _anchor, "W.sub_(W0).mul_(c).add_(W0)"),
    "dot": Op("seeded dot", _dot, "(torch.normal(...) * W).sum()"),
    "norms": Op("squared norm of a distance", _norms, "torch.linalg.vector_norm(W - W0) ** 2"),
    "lowrank": Op("low rank", _low_rank, "W.add_(scale * (U @ Z @ V.T), alpha=a)", ranked=True),
    "quotient": Op("quotient of low ranks", _quotient, "W.add_(U m V.T / sqrt(U² v V².T + e), alpha=a)", ranked=True),
    "forward": Op(
        "low rank in the forward",
        _forward,
        "y.add_(((x @ V) @ Z.T) @ U.T)",
        ranked=True,
        layers=True,
        floor="F.linear(x, W)",
    ),
    "list": Op(f"dense normal, {LIST} tensors in one call", _list, _NORMAL + " in a loop"),
    "host": Op(f"dense normal, {LIST} tensors of 16 weights", _host, _NORMAL + " in a loop", ALL[:1], sized=False),
}


def weights(shape: tuple[int, int], dtype: str, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers, a block of them repeated: drawing hundreds of MB takes longer than a pass over them."""
    numel = shape[0] * shape[1]
    block = torch.randn(min(numel, 1 << 20), device=device).to(getattr(torch, dtype))
    return block.repeat(-(-numel // block.numel()))[:numel].view(shape)


def shape_of(megabytes: float, dtype: str) -> tuple[int, int]:
    """A near-square matrix of that many MB (2^20 bytes), its rows a power of two."""
    numel = int(megabytes * 2**20) // getattr(torch, dtype).itemsize
    rows = 1 << max(numel.bit_length() - 1, 0) // 2
    return rows, max(numel // rows, 1)
