"""A low-rank direction in the forward itself: the output of a layer moves, its weight is only read by the layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks
from ._library import bump_versions, define, torch_ops
from .lowrank import MAX_RANK

FLOATS = checks.WEIGHT_DTYPES
INDICES = (torch.int64, torch.int32)
_KERNEL_CORES = 2


def _forward(outputs, inputs, *, left, right, cores, transposed=False):
    if outputs.numel():
        add_lowrank_(outputs, inputs, left=left, right=right, cores=cores, transposed=transposed)
        bump_versions([outputs])


def add_lowrank_(
    outputs: Tensor, inputs: Tensor, *, left: Tensor, right: Tensor, cores: Sequence[Tensor], transposed: bool
) -> None:
    """Unchecked fast path for hooks: called after every layer's forward. ``outputs`` is contiguous and not empty."""
    columns = outputs.shape[-1]
    tokens = outputs.numel() // columns
    y = outputs.view(tokens, columns)
    if inputs.dtype in INDICES:
        x = inputs.reshape(tokens)
        if inputs.device.type == "cpu":
            _check_indices(x, len(left if transposed else right))
    else:
        x = inputs.reshape(tokens, inputs.shape[-1])
    backend = backends.select("lowrank_forward_", outputs.device, outputs.dtype)
    if len(cores) <= _KERNEL_CORES:
        backend.lowrank_forward_(y, x, left, right, cores, transposed)
        return
    # A pass takes the rows of two cores; kernels that read every row's own core would make it one.
    rows = tokens // len(cores)
    for first in range(0, len(cores), _KERNEL_CORES):
        own = cores[first : first + _KERNEL_CORES]
        part = slice(first * rows, (first + len(own)) * rows)
        backend.lowrank_forward_(y[part], x[part], left, right, own, transposed)


define(
    "lowrank_forward_(Tensor(a!) outputs, Tensor inputs, *, Tensor left, Tensor right, Tensor[] cores, "
    "bool transposed=False) -> ()",
    _forward,
)


@torch.compiler.disable
def lowrank_forward_(
    outputs: Tensor,
    inputs: Tensor,
    left: Tensor,
    right: Tensor,
    cores: Sequence[Tensor],
    *,
    transposed: bool = False,
) -> None:
    """Add to a layer's output what a low-rank direction of its weight would, and leave the weight alone.

        y <- y + x D^T   (y + x D if ``transposed``),   D = A C B^T                        (K10 of the kernel algebra)

    nn.Linear has y = x W^T; transformers' Conv1D and, with indices for x, nn.Embedding have y = x W. Several cores
    split the rows (the leading dimension) into as many equal slices, each of which sees the direction of its own core:
    two cores are both signs of a batch stacked twice. Products accumulate in float32 and y is rounded once; on a GPU
    the intermediate (tokens, rank) matrix and both factors are rounded to the dtype of a 16-bit y.

    Args:
        outputs: y, float32, bfloat16 or float16, (..., m), or (..., n) if transposed; contiguous; written in place,
            so it shares no memory with the other tensors.
        inputs: x, floating point (..., n), or (..., m) if transposed; or, if transposed, int64 or int32 row indices
            of the shape of y without its last dimension. Indices outside 0 .. m - 1 are refused on a CPU and not
            looked for on a GPU.
        left, right: A (m, rank) and B (n, rank), float32 or y's dtype, contiguous, rank <= 512.
        cores: C of each slice of the rows, contiguous float32 (rank, rank).
        transposed: see above.

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
    factor_types = (torch.float32,) if outputs.dtype == torch.float32 else (torch.float32, outputs.dtype)
    _check("left", left, factor_types)
    _check("right", right, factor_types)
    rank = left.shape[1] if left.dim() == 2 else 0
    for name, f in (("left", left), ("right", right)):
        if f.dim() != 2 or not f.is_contiguous() or not 1 <= f.shape[1] <= MAX_RANK or f.shape[1] != rank:
            raise ValueError(
                f"{name}: got shape {tuple(f.shape)} with strides {f.stride()}; accepted: contiguous (rows, rank) with "
                f"the same rank, 1 to {MAX_RANK}, as the other factor"
            )
    into, out_of = (left, right) if transposed else (right, left)
    if outputs.shape[-1] != out_of.shape[0]:
        raise ValueError(
            f"outputs: got {outputs.shape[-1]} columns; accepted: {out_of.shape[0]}, the rows of the factor"
        )
    shape = outputs.shape[:-1] if inputs.dtype in INDICES else (*outputs.shape[:-1], into.shape[0])
    if inputs.shape != shape:
        raise ValueError(f"inputs: got shape {tuple(inputs.shape)}; accepted: {tuple(shape)}")
    cores = checks.tensors("cores", cores, (torch.float32,))
    for i, core in enumerate(cores):
        if core.shape != (rank, rank) or not core.is_contiguous():
            raise ValueError(
                f"cores[{i}]: got shape {tuple(core.shape)} with strides {core.stride()}; accepted: contiguous "
                f"({rank}, {rank})"
            )
    if outputs.shape[0] % len(cores):
        raise ValueError(f"cores: got {len(cores)} for {outputs.shape[0]} rows; accepted: a number that divides them")
    named = [("inputs", inputs), ("left", left), ("right", right)]
    named += [(f"cores[{i}]", core) for i, core in enumerate(cores)]
    begin, end = outputs.data_ptr(), outputs.data_ptr() + outputs.nbytes
    for name, t in named:
        if t.device != outputs.device:
            raise ValueError(f"{name}: got a tensor on {t.device}; accepted: {outputs.device}, as outputs")
        if begin and t.data_ptr() < end and begin < _end(t):
            raise ValueError(f"{name}: shares memory with outputs; accepted: tensors apart from what is written")
    with torch.no_grad():
        torch_ops.lowrank_forward_(outputs, inputs, left=left, right=right, cores=cores, transposed=transposed)


def _check(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; accepted: a tensor")
    if t.layout != torch.strided or t.dtype not in dtypes:
        raise TypeError(f"{name}: got {t.layout} {t.dtype}; accepted: strided {', '.join(map(str, dtypes))}")


def _end(t: Tensor) -> int:
    """Address after the last element."""
    if t.is_contiguous() or not t.numel():
        return t.data_ptr() + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (last + 1) * t.element_size()


def _check_indices(x: Tensor, rows: int) -> None:
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"inputs: got row indices {low} to {high}; accepted: 0 to {rows - 1}")
