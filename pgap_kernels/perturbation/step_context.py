"""What surrounds a step: Ctrl-C waits for passes, every forward starts from the same random numbers and buffers."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class DefaultDevice:
    """The caller's default device: for the closure, not for what the optimizer makes on the host."""

    def __init__(self) -> None:
        self.cpu = torch.device("cpu")
        self.replaced = torch.get_default_device().type != "cpu"

    def __enter__(self) -> DefaultDevice:
        if self.replaced:
            self.cpu.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.replaced:
            self.cpu.__exit__(*error)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """As the caller has it, for a forward; taken off, not covered, as each mode slows every torch call."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


@contextlib.contextmanager
def ambient_state_aside() -> Iterator[DefaultDevice]:
    """Run the optimizer outside of the caller's inference mode, whose tensors could not be written later, and of its
    grad mode and default device."""
    with torch.inference_mode(False), torch.no_grad(), DefaultDevice() as default_device:
        yield default_device


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back while weights are written; it is delivered when the pass is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if handler is None:  # installed by something other than Python: not ours to replace
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


class Autocast:
    """The autocasting that surrounds a step: it is for the forwards, not for what the optimizer computes."""

    def __init__(self, device_types: set[str]) -> None:
        served = [t for t in device_types if torch.amp.is_autocast_available(t)]
        self.dtypes = {t: torch.get_autocast_dtype(t) for t in served if torch.is_autocast_enabled(t)}

    def outside(self) -> contextlib.ExitStack:
        """Off, for the step."""
        return _entered(torch.autocast(t, enabled=False) for t in self.dtypes)

    def inside(self) -> contextlib.ExitStack:
        """As it was, for a forward; without the weights that it holds of the forward before."""
        torch.clear_autocast_cache()
        return _entered(torch.autocast(t, dtype=dtype) for t, dtype in self.dtypes.items())


def _entered(contexts: Iterable[contextlib.AbstractContextManager]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


class ForwardState:
    """RNG states and module buffers, so that every forward of a step starts from the same ones.

    Buffers up to ``SMALL`` bytes are copied at each step. Larger ones (packed weights of quantised models) are copied
    only once a forward was seen to change them, by their version counters. Batch norm writes its statistics past the
    version counter, but those are small. Buffers that share memory with a weight move with the weight.
    """

    SMALL = 1 << 20

    def __init__(self, model: nn.Module | None, weights: Iterable[Tensor]) -> None:
        self.modules = list(model.modules()) if model is not None else []
        tensors = list(weights)
        self.cuda_devices = {t.device for t in tensors if t.device.type == "cuda"}
        self.memory_of_weights = {_memory(t) for t in tensors}
        self.changing: set[int] = set()  # large buffers that forwards write, by id

    def begin(self) -> None:
        """Note what the forwards of a step shall start from."""
        self.rng = torch.get_rng_state()
        self.cuda = {d: torch.cuda.get_rng_state(d) for d in self.cuda_devices}
        self.owners = [
            (module, name, buffer)
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.versions: list[tuple[Tensor, int]] = []
        for buffer in {id(b): b for _, _, b in self.owners}.values():
            if not _writable(buffer) or _memory(buffer) in self.memory_of_weights:
                continue
            if buffer.nbytes <= self.SMALL or id(buffer) in self.changing:
                self.copies.append((buffer, buffer.clone()))
            else:
                self.versions.append((buffer, buffer._version))

    def restore(self) -> None:
        """Put everything back as it was when the step began."""
        torch.set_rng_state(self.rng)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer in self.owners:
            module._buffers[name] = buffer  # a forward may have put another tensor there
        for buffer, copy in self.copies:
            buffer.copy_(copy)

    def learn_changes(self) -> bool:
        """Whether a forward has changed a large buffer for the first time.

        It is copied from now on, as that forward left it. The caller repeats the forward, so that all forwards of the
        step start from one state; such a buffer then saw one forward more than without us.
        """
        changed = [buffer for buffer, version in self.versions if buffer._version != version]
        self.versions = [(buffer, version) for buffer, version in self.versions if buffer._version == version]
        self.changing |= {id(buffer) for buffer in changed}
        self.copies += [(buffer, buffer.clone()) for buffer in changed]
        return bool(changed)

    def release(self) -> None:
        """Drop the copies: a step is over."""
        self.copies, self.versions, self.owners = [], [], []


def _memory(tensor: Tensor) -> int:
    """Address of a tensor's storage; 0 where it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _writable(buffer: Tensor) -> bool:
    """Whether a forward could write it in place: torch refuses that for expanded and for inference tensors."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
    return (
        buffer.layout == torch.strided and not expanded and not buffer.is_inference() and buffer.device.type != "meta"
    )
