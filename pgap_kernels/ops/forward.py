"""A low-rank direction in the forward itself: the output of a layer moves, its weight is only read by the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from ..noise import check_uint
from ._arguments import Key, Scalar
from ._library import define, table, written
from .lowrank import MAX_RANK, AlignedCore, sign_of

_FORWARD = (
    "Tensor inputs, Tensor left, Tensor right, Tensor? core, Tensor? z, Tensor keys, Tensor coefficient, "
    "Tensor delta, int tensor_id, int[] sign_ids, bool aligned, bool paired, bool transposed, str? backend"
)
FLOATS = checks.WEIGHT_DTYPES
INDICES = (torch.int64, torch.int32)


def _forward_impl(
    outputs, inputs, left, right, core, z, keys, coefficient, delta, tensor_id, sign_ids, aligned, paired, transposed,
    forced,
):  # fmt: skip
    if outputs.numel() == 0:
        return
    backend = backends.select("lowrank_forward_", outputs.device, outputs.dtype, forced)
    rank, device = left.shape[1], outputs.device
    if aligned:
        (z,) = backend.aligned_core([z], keys, [tensor_id], sign_ids, delta.item())
    elif z is None and len(keys):
        z, one = torch.empty(rank, rank, device=device, dtype=torch.float32), torch.ones(1, 1, dtype=torch.float32)
        backend.assemble_gradient_([z], keys, one, [tensor_id], [0, rank], "normal", "exact")
    if z is None:
        cores = [core]
    else:
        moved = coefficient.to(device) * z
        cores = [moved, -moved] if paired else [moved]
        if core is not None:
            cores = [core + c for c in cores]
    fold_(outputs, inputs, left, right, cores, transposed, forced)
    written([outputs])


def fold_(outputs, inputs, left, right, cores, transposed, forced=None):
    """The op on stored cores alone, one for each part of the rows, without checks: it runs behind every layer."""
    columns = outputs.shape[-1]
    tokens = outputs.numel() // columns
    if inputs.dtype in INDICES:
        x = inputs.reshape(tokens)
        if inputs.device.type == "cpu":
            _check_numbers(x, len(left if transposed else right))
    else:
        x = inputs.reshape(tokens, inputs.shape[-1])
    backend = backends.select("lowrank_forward_", outputs.device, outputs.dtype, forced)
    backend.lowrank_forward_(outputs.view(tokens, columns), x, left, right, cores, transposed)


define(f"lowrank_forward_(Tensor(a!) outputs, {_FORWARD}) -> ()", _forward_impl)


@torch.compiler.disable
def lowrank_forward_(
    outputs: Tensor,
    inputs: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    core: Tensor | None = None,
    z: Key | Tensor | AlignedCore | None = None,
    coefficient: Scalar = 1.0,
    tensor_id: int | None = None,
    paired: bool = False,
    transposed: bool = False,
    backend: str | None = None,
) -> None:
    """Add to a layer's output what a low-rank direction of its weight would, and leave the weight alone.

        y <- y + x D^T   (y + x D if ``transposed``),   D = A (C + a Z) B^T                (K10 of the kernel algebra)

    nn.Linear has y = x W^T; transformers' Conv1D and, with indices for x, nn.Embedding have y = x W. Products
    accumulate in float32 and y is rounded once; on a GPU the intermediate (tokens, rank) matrix and both factors are
    rounded to the dtype of a 16-bit y.

    Args:
        outputs: y, float32, bfloat16 or float16, (..., m), or (..., n) if transposed; contiguous; written in place,
            so it shares no memory with the other tensors.
        inputs: x, floating point (..., n), or (..., m) if transposed; or, if transposed, int64 or int32 row numbers
            of the shape of y without its last dimension. Numbers outside 0 .. m - 1 are refused on a CPU and not
            looked for on a GPU.
        left, right: A (m, rank) and B (n, rank), float32 or y's dtype, contiguous, rank <= 512.
        core: C (rank, rank) float32; None is zero.
        z: Z: a float32 tensor (rank, rank), a key that regenerates it under ``tensor_id``, an ``AlignedCore`` with
            the singular values of this weight, or None.
        coefficient: a, one float or a tensor of one.
        tensor_id: of the weight; needed when Z is drawn.
        paired: the first half of x's rows (its leading dimension) sees C + a Z, the second half C - a Z.
        transposed: see above.
        backend: name of the backend to force; None chooses.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written.
    """
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
    if paired and (z is None or outputs.shape[0] % 2):
        raise ValueError(
            f"paired: got True with {'no z' if z is None else f'{outputs.shape[0]} leading rows'}; accepted: with a z "
            "and an even number of them, both signs stacked"
        )
    if core is None and z is None:
        raise ValueError("core, z: got neither; accepted: at least one of them")
    a = _one("coefficient", coefficient)
    bits: list[int | Tensor] = []
    sign_ids, delta = list[int](), _ONE
    stored: Tensor | None = None
    if core is not None:
        _check_square("core", core, rank)
    if isinstance(z, AlignedCore):
        values = checks.tensors("z.singular_values", z.singular_values, (torch.float32,))
        if len(values) != 1 or values[0].shape != (rank,) or not values[0].is_contiguous():
            raise ValueError(
                f"z.singular_values: got {len(values)} of shape {tuple(values[0].shape)}; accepted: one contiguous "
                f"({rank},)"
            )
        delta, stored = checks.scalar_row("z.delta", z.delta, 1), values[0]
        if delta.device.type == "cpu" and delta.item() < 0:
            raise ValueError(f"z.delta: got {delta.item()}; accepted: 0 or more")
        bits = [checks.key_bits("z.key", z.key)]
    elif isinstance(z, Tensor) and z.dtype != torch.int64:
        _check_square("z", z, rank)
        stored = z
    elif z is not None:
        bits = [checks.key_bits("z", z)]
    if bits and tensor_id is None:
        raise ValueError("tensor_id: got None; accepted: the id of the weight when z is drawn from a key")
    number = 0 if tensor_id is None else check_uint("tensor_id", tensor_id, 32)
    if isinstance(z, AlignedCore):
        sign_bits, sign_ids = sign_of("z.", z.sign_key, z.sign_ids, [number], 1)
        bits += sign_bits
    device, begin = outputs.device, outputs.data_ptr()
    end = begin + outputs.nbytes
    for name, t in (("inputs", inputs), ("left", left), ("right", right), ("core", core), ("z", stored)):
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{name}: got a tensor on {t.device}; accepted: {device}, as outputs")
        if begin and t.data_ptr() < end and begin < _end(t):
            raise ValueError(f"{name}: shares memory with outputs; accepted: tensors apart from what is written")
    keys = checks.pack_keys(bits) if bits else _NO_KEYS
    with torch.no_grad():
        table.lowrank_forward_(
            outputs,
            inputs,
            left,
            right,
            core,
            stored,
            keys,
            a,
            delta,
            number,
            sign_ids,
            isinstance(z, AlignedCore),
            paired,
            transposed,
            backend,
        )


_ONE = torch.ones(1, dtype=torch.float32, device="cpu")
_NO_KEYS = torch.empty(0, dtype=torch.int64, device="cpu")


def _check(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; accepted: a tensor")
    if t.layout != torch.strided or t.dtype not in dtypes:
        raise TypeError(f"{name}: got {t.layout} {t.dtype}; accepted: strided {', '.join(map(str, dtypes))}")


def _check_square(name: str, t: Tensor, rank: int) -> None:
    _check(name, t, (torch.float32,))
    if t.shape != (rank, rank) or not t.is_contiguous():
        raise ValueError(
            f"{name}: got shape {tuple(t.shape)} with strides {t.stride()}; accepted: contiguous ({rank}, {rank})"
        )


def _one(name: str, value: Scalar) -> Tensor:
    return _ONE if value == 1.0 and type(value) is float else checks.scalar_row(name, value, 1)


def _end(t: Tensor) -> int:
    """Address behind the last element."""
    if t.is_contiguous() or not t.numel():
        return t.data_ptr() + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (last + 1) * t.element_size()


def _check_numbers(x: Tensor, rows: int) -> None:
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"inputs: got row numbers {low} to {high}; accepted: 0 to {rows - 1}")
