"""What surrounds a forward and a pass: Ctrl-C waits, random numbers and buffers are those of the step's start."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import nn


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
        self.dtypes = {t: torch.get_autocast_dtype(t) for t in device_types if torch.is_autocast_enabled(t)}

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
    """RNG states and module buffers, so that every forward of a step starts from the same ones."""

    def __init__(self, model: nn.Module | None, devices: set[torch.device]) -> None:
        self.rng = torch.get_rng_state()
        self.cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        self.places = [
            (module, name, buffer)
            for module in (model.modules() if model is not None else ())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.saved = {id(buffer): buffer.clone() for _, _, buffer in self.places}

    def restore(self) -> None:
        """Put everything back as it was when this object was made."""
        torch.set_rng_state(self.rng)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for module, name, buffer in self.places:
            module._buffers[name] = buffer  # a forward may have put another tensor there
            buffer.copy_(self.saved[id(buffer)])  # always: batch norm changes its statistics behind the version counter
