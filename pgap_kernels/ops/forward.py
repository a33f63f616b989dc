"""A low-rank direction in the forward itself: the output of a layer moves, its weight is only read by the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from ..arguments import ForwardArguments, schema
from ..noise import check_uint
from ._library import bump_versions, define, torch_ops, traceable
from ._packing import Key
from .lowrank import MAX_RANK

FLOATS = checks.WEIGHT_DTYPES
INDICES = (torch.int64, torch.int32)
# One for all slices of the rows, one for each, or a key for each to draw it with.
Factors = Tensor | Sequence[Tensor] | Sequence[Key]


def _forward(outputs, inputs, **arguments):
    if outputs.numel():
        add_lowrank_(outputs, inputs, ForwardArguments(**arguments))
        bump_versions([outputs])


def add_lowrank_(outputs: Tensor, inputs: Tensor, arguments: ForwardArguments) -> None:
    """Unchecked fast path for hooks: called after every layer's forward. ``outputs`` is contiguous and not empty."""
    columns = outputs.shape[-1]
    tokens = outputs.numel() // columns
    if inputs.dtype in INDICES:
        x = inputs.reshape(tokens)
        if inputs.device.type == "cpu":
            _check_indices(x, arguments.shape[0])
    else:
        x = inputs.reshape(tokens, inputs.shape[-1])
    backend = backends.select("lowrank_forward_", outputs.device, outputs.dtype)
    backend.lowrank_forward_(outputs.view(tokens, columns), x, arguments)


define(f"lowrank_forward_(Tensor(a!) outputs, Tensor inputs, *, {schema(ForwardArguments)}) -> ()", _forward)


@traceable
def lowrank_forward_(
    outputs: Tensor,
    inputs: Tensor,
    left: Factors,
    right: Factors,
    cores: Sequence[Tensor] | None = None,
    *,
    coefficients: Sequence[float] | Tensor | None = None,
    transposed: bool = False,
    shape: tuple[int, int] | None = None,
    rank: int | None = None,
    tensor_id: int | None = None,
    span: tuple[int, int] | None = None,
) -> None:
    """Add to a layer's output what low-rank directions of its weight would, and leave the weight alone.

        y_s <- y_s + x_s D_s^T   (y_s + x_s D_s if ``transposed``),   D_s = A_s C_s B_s^T

    nn.Linear has y = x W^T; transformers' Conv1D and, with indices for x, nn.Embedding have y = x W. The rows (the
    leading dimension) are split into equal slices s, each of which sees a direction of its own: many directions in one
    forward, for one read of W by the layer. Products accumulate in float32 and y is rounded once; on a GPU the
    intermediate (tokens, rank) matrix and the factors are rounded to the dtype of a 16-bit y.

    Args:
        outputs: y, float32, bfloat16 or float16, (..., m), or (..., n) if transposed; contiguous; written in place,
            so it shares no memory with the other tensors.
        inputs: x, floating point (..., n), or (..., m) if transposed; or, if transposed, int64 or int32 row indices
            of the shape of y without its last dimension. Indices outside 0 .. m - 1 are refused on a CPU and not
            looked for on a GPU.
        left, right: A (m, rank) and B (n, rank), float32 or y's dtype, contiguous, rank <= 512: one tensor for all
            slices, or a list with one for each, or a list (or int64 tensor) with a key for each; such a factor is the
            normal noise of its key, drawn on the way, as ``lowrank_perturb_`` draws it.
        cores: C of each slice, contiguous float32 (rank, rank). Without, it is a coefficient times the identity.
        coefficients: of each slice, where there are no cores; by default 1.
        transposed: see above.
        shape, rank, tensor_id: of the weight, (m, n), the factors' rank and the weight's id: needed where factors are
            drawn.
        span: (base, row_stride) of a weight that is a shard, as in the ``slices`` of other ops.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed: got {transposed!r}; accepted: True or False")
    _check("outputs", outputs, FLOATS)
    if outputs.dim() < 2 or (outputs.numel() and not outputs.is_contiguous()):
        raise ValueError(
            f"outputs: got shape {tuple(outputs.shape)} with strides {outputs.stride()}; accepted: contiguous (..., m)"
        )
    _check("inputs", inputs, (*FLOATS, *INDICES) if transposed else FLOATS)
    sides = [_side(name, value, outputs) for name, value in (("left", left), ("right", right))]
    drawn = [side.name for side in sides if side.keys is not None]
    stored = [side for side in sides if side.keys is None]
    if drawn and (shape is None or tensor_id is None or (rank is None and not stored)):
        missing = next(n for n, v in (("shape", shape), ("tensor_id", tensor_id), ("rank", rank)) if v is None)
        raise ValueError(f"{missing}: got None; accepted: of the weight and its factors, as {drawn[0]} is drawn")
    given = stored[0].tensors[0].shape[1] if stored else rank
    if rank not in (None, given) or not isinstance(given, int) or not 1 <= given <= MAX_RANK:
        raise ValueError(f"rank: got {rank}; accepted: 1 to {MAX_RANK}, the rank of the factors")
    rank, rows = given, [side.rows(i, shape) for i, side in enumerate(sides)]
    for side, expected in zip(sides, rows, strict=True):
        for i, f in enumerate(side.tensors):
            if f.shape != (expected, rank):
                raise ValueError(f"{side.label(i)}: got shape {tuple(f.shape)}; accepted: {(expected, rank)}")
    into, out_of = rows if transposed else rows[::-1]
    if outputs.shape[-1] != out_of:
        raise ValueError(f"outputs: got {outputs.shape[-1]} columns; accepted: {out_of}, the rows of the factor")
    wanted = outputs.shape[:-1] if inputs.dtype in INDICES else (*outputs.shape[:-1], into)
    if inputs.shape != wanted:
        raise ValueError(f"inputs: got shape {tuple(inputs.shape)}; accepted: {tuple(wanted)}")
    middle = _cores(cores, rank)
    if middle and coefficients is not None:
        raise ValueError("coefficients: got some beside cores; accepted: one of the two (multiply the cores)")
    scale = None if coefficients is None else _coefficients(coefficients)
    counts = {"cores": len(middle) or None, "coefficients": None if scale is None else len(scale)}
    counts |= {side.name: side.slices for side in sides}
    slices = next((count for count in counts.values() if count is not None), 1)
    for name, count in counts.items():
        if count not in (None, slices):
            raise ValueError(f"{name}: got {count}; accepted: {slices}, one for each slice of the rows")
    if outputs.shape[0] % slices:
        name = next((name for name, count in counts.items() if count is not None), "cores")
        raise ValueError(f"{name}: got {slices} for {outputs.shape[0]} rows; accepted: a number that divides them")
    named = [("inputs", inputs), *((side.label(i), f) for side in sides for i, f in enumerate(side.tensors))]
    named += [(f"cores[{i}]", core) for i, core in enumerate(middle)]
    begin, end = _span(outputs)
    for name, t in named:
        if t.device != outputs.device:
            raise ValueError(f"{name}: got a tensor on {t.device}; accepted: {outputs.device}, as outputs")
        first, last = _span(t)
        if begin and first < end and begin < last:
            raise ValueError(f"{name}: shares memory with outputs; accepted: tensors apart from what is written")
    # Made on the device: a copy from the host would wait for it, and cannot be captured in a graph.
    keys = torch.zeros(slices, 2, dtype=torch.int64, device=outputs.device)
    for i, side in enumerate(sides):
        if side.keys is not None:
            keys[:, i] = side.keys
    if not middle and scale is None:
        scale = torch.ones(slices, dtype=torch.float32, device=outputs.device)
    arguments = ForwardArguments(
        left=sides[0].tensors,
        right=sides[1].tensors,
        cores=middle,
        coefficients=[] if scale is None else list(scale.to(outputs.device)[:, None]),
        keys=list(keys) if drawn else [],
        shape=rows,
        rank=rank,
        tensor_id=0 if tensor_id is None else check_uint("tensor_id", tensor_id, 32),
        span=checks.span("span", span, *rows),
        transposed=transposed,
    )
    with torch.no_grad():
        torch_ops.lowrank_forward_(outputs, inputs, **arguments._asdict())


class _Side(NamedTuple):
    """A or B of the slices: the tensors, one or one for each; or a key for each."""

    name: str
    tensors: list[Tensor]
    keys: Tensor | None
    several: bool  # one for each slice

    @property
    def slices(self) -> int | None:
        """How many slices it is for; None if for any number."""
        return (len(self.tensors) if self.keys is None else len(self.keys)) if self.several else None

    def rows(self, dim: int, shape: Sequence[int] | None) -> int:
        """The weight's size along the factor."""
        if shape is None:
            return self.tensors[0].shape[0]
        if not isinstance(shape, (list, tuple)) or len(shape) != 2 or any(type(s) is not int or s < 0 for s in shape):
            raise ValueError(f"shape: got {shape!r}; accepted: (m, n) of the weight")
        return shape[dim]

    def label(self, i: int) -> str:
        """How an error names a tensor."""
        return f"{self.name}[{i}]" if self.several else self.name


def _side(name: str, value: Factors, outputs: Tensor) -> _Side:
    one = isinstance(value, Tensor) and value.is_floating_point()
    several = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)
    values: list[Any] = [value] if one else list(value) if several else []
    if not values:
        raise TypeError(f"{name}: got {value!r}; accepted: a tensor, or a list with a tensor or a key for each slice")
    if not any(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        return _Side(name, [], checks.key_tensor(name, values), True)
    factor_types = (torch.float32,) if outputs.dtype == torch.float32 else (torch.float32, outputs.dtype)
    side = _Side(name, values, None, not one)
    for i, f in enumerate(values):
        _check(side.label(i), f, factor_types)
        if f.dim() != 2 or not f.is_contiguous() or f.dtype != values[0].dtype or not 1 <= f.shape[1] <= MAX_RANK:
            raise ValueError(
                f"{side.label(i)}: got shape {tuple(f.shape)} with strides {f.stride()}, {f.dtype}; accepted: "
                f"contiguous (rows, rank) with rank 1 to {MAX_RANK}, of one dtype"
            )
    return side


def _cores(cores: Sequence[Tensor] | None, rank: int) -> list[Tensor]:
    found = [] if cores is None else checks.tensors("cores", cores, (torch.float32,))
    for i, core in enumerate(found):
        if core.shape != (rank, rank) or not core.is_contiguous():
            raise ValueError(
                f"cores[{i}]: got shape {tuple(core.shape)} with strides {core.stride()}; accepted: contiguous "
                f"({rank}, {rank})"
            )
    return found


def _coefficients(values: Sequence[float] | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        if values.dim() != 1 or not values.numel() or values.dtype != torch.float32:
            raise ValueError(
                f"coefficients: got {values.dtype} of shape {tuple(values.shape)}; accepted: float32, one of each slice"
            )
        return values
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(f"coefficients: got {values!r}; accepted: a list of floats or a tensor, one for each slice")
    numbers = [checks.number(f"coefficients[{i}]", v) for i, v in enumerate(values)]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _check(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; accepted: a tensor")
    if t.layout != torch.strided or t.dtype not in dtypes:
        raise TypeError(f"{name}: got {t.layout} {t.dtype}; accepted: strided {', '.join(map(str, dtypes))}")


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first element and after the last; zeros while a graph is traced, whose tensors have none."""
    if torch.compiler.is_compiling():
        return 0, 0
    if t.is_contiguous() or not t.numel():
        return t.data_ptr(), t.data_ptr() + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _check_indices(x: Tensor, rows: int) -> None:
    if torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"inputs: got row indices {low} to {high}; accepted: 0 to {rows - 1}")
