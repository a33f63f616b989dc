"""What surrounds a step: Ctrl-C waits for passes, every forward starts from the same random numbers and buffers."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..directions import address_range, storage, write_context

_PIECE = 1 << 24  # bytes that a checksum reads at a time


class Ambient:
    """The caller's inference mode and default device: for the closure, not for what the optimizer makes."""

    def __init__(self) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.other_device = torch.get_default_device().type != "cpu"
        self.cpu = torch.device("cpu")

    def leave(self) -> None:
        """Make the host the default device."""
        if self.other_device:
            self.cpu.__enter__()

    def enter(self) -> None:
        """Undo that. Not by setting the caller's device on top: that would slow every torch call."""
        if self.other_device:
            self.cpu.__exit__(None, None, None)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The caller's state, for a forward."""
        self.enter()
        try:
            with torch.inference_mode() if self.inference else contextlib.nullcontext():
                yield
        finally:
            self.leave()


@contextlib.contextmanager
def outside_ambient_state() -> Iterator[Ambient]:
    """Run the optimizer outside of the caller's inference mode, whose tensors could not be written later, and of its
    grad mode and default device."""
    ambient = Ambient()
    with torch.inference_mode(False), torch.no_grad():
        ambient.leave()
        try:
            yield ambient
        finally:
            ambient.enter()


# Those whose handlers may raise: requests to end, time limits, and what schedulers send before they preempt.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_HELD = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, and other signals that Python code handles, while weights are written, until that is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: dict[int, None] = {}
    # SIGINT also where it ends the process. None is a handler of other code than Python: not ours to replace.
    found = {number: signal.getsignal(number) for number in _HELD}
    handlers = {n: h for n, h in found.items() if callable(h) or (n == signal.SIGINT and h is not None)}
    for one in handlers:
        signal.signal(one, lambda number, frame: held.setdefault(number))
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        with contextlib.ExitStack() as each:  # which calls all, even if some raise
            for late in reversed(held):
                each.callback(signal.raise_signal, late)


class Autocast:
    """The autocasting that surrounds a step: it is for the forwards, not for what the optimizer computes."""

    def __init__(self, device_types: set[str]) -> None:
        served = [t for t in device_types if torch.amp.is_autocast_available(t)]
        self.dtypes = {t: torch.get_autocast_dtype(t) for t in served if torch.is_autocast_enabled(t)}

    def outside(self) -> contextlib.ExitStack:
        """Switched off, for the step."""
        return _entered(torch.autocast(t, enabled=False) for t in self.dtypes)

    def inside(self) -> contextlib.ExitStack:
        """As it was, for a forward, without the cast weights that it has cached in the previous forward."""
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
    only once a forward was seen to change them: by their version counters and, in the first step with given training
    flags, by checksums, as kernels and ``.data`` bypass the counters. Buffers that share elements with a weight are
    left to the optimizer.
    """

    SMALL = 1 << 20

    def __init__(self, modules: Sequence[nn.Module], weights: Iterable[Tensor]) -> None:
        self.modules = modules
        self.dicts = [module._buffers for module in modules]
        tensors = list(weights)
        own = (t for module in modules for owned in (module._parameters, module._buffers) for t in owned.values())
        devices = {t.device for t in (*tensors, *own) if t is not None}  # frozen layers drop out elements, too
        self.device_types = {device.type for device in devices}
        self.cuda_devices = {device for device in devices if device.type == "cuda"}
        self.weights_in: dict[int, list[tuple[int, int]]] = {}  # extents of the weights in each storage
        for t in tensors:
            self.weights_in.setdefault(storage(t), []).append(address_range(t))
        self.changing: set[int] = set()  # large buffers that forwards write, by id
        self.inspected: set[tuple[bool, ...]] = set()  # training flags under which checksums were compared
        self.ever_new: set[tuple[int, str]] = set()  # buffers that every forward replaces

    def flags(self) -> tuple[bool, ...]:
        """Which modules are in training mode: other flags may lead to other branches of the model."""
        return tuple([module.training for module in self.modules])

    def begin(self) -> None:
        """Note the state that all forwards of a step start from."""
        self.rng = torch.get_rng_state()
        self.cuda = {d: torch.cuda.get_rng_state(d) for d in self.cuda_devices}
        self.tables = [(buffers, dict(buffers)) for buffers in self.dicts if buffers]
        self.count = sum(map(len, self.dicts))
        self.unset = any(b is None for _, before in self.tables for b in before.values())
        self.uninspected = {self.flags()} - self.inspected
        self.replaced: set[tuple[int, str]] = set()  # buffers that a forward of this step has replaced
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.large: list[tuple[Tensor, int | None, int | None]] = []  # with their versions and checksums
        for buffer in {id(b): b for _, before in self.tables for b in before.values() if b is not None}.values():
            self._note(buffer)

    @contextlib.contextmanager
    def other_random_numbers(self) -> Iterator[None]:
        """Forwards start from RNG states some draws further on: those that draw have other losses."""
        rng, cuda = self.rng, self.cuda
        try:
            self.restore()
            torch.rand(8, device="cpu")
            self.rng, self.cuda = torch.get_rng_state(), {}
            for device in cuda:
                torch.rand(8, device=device)
                self.cuda[device] = torch.cuda.get_rng_state(device)
            yield
        finally:
            self.rng, self.cuda = rng, cuda

    def _note(self, buffer: Tensor) -> None:
        if not _writable(buffer) or self._shares_elements(buffer):
            return
        if buffer.nbytes <= self.SMALL or id(buffer) in self.changing:
            self.copies.append((buffer, buffer.clone()))
        else:
            checksum = _checksum(buffer) if self.uninspected else None
            self.large.append((buffer, version_of(buffer), checksum))

    def _shares_elements(self, buffer: Tensor) -> bool:
        begin, end = address_range(buffer)
        return any(begin < stop and start < end for start, stop in self.weights_in.get(storage(buffer), ()))

    def restore(self) -> None:
        """Put everything back as it was when the step began."""
        torch.set_rng_state(self.rng)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for buffers, before in self.tables:
            for name, buffer in before.items():
                if buffers.get(name) is not buffer:
                    buffers[name] = buffer  # a forward has put another tensor there
        if self.copies:
            targets = [buffer for buffer, _ in self.copies]
            with write_context(targets):
                torch._foreach_copy_(targets, [copy for _, copy in self.copies])

    def track_changed_buffers(self) -> bool:
        """Whether a forward has changed a large buffer for the first time, or made or replaced one.

        It is copied from now on, as that forward left it. The caller repeats the forward, so that all forwards of the
        step start from one state; such a buffer has then seen one more forward than it would otherwise.
        """
        changed = {
            id(buffer): buffer
            for buffer, version, checksum in self.large
            if version_of(buffer) != version or (checksum is not None and _checksum(buffer) != checksum)
        }
        self.changing |= {*changed}
        # Checksums are needed only once: the other forwards of the step run the same code.
        self.large = [(buffer, version, None) for buffer, version, _ in self.large if id(buffer) not in changed]
        self.inspected |= self.uninspected
        self.uninspected = set()
        new = [*changed.values(), *self._made(), *self._put_in_place()]
        for buffer in new:
            self._note(buffer)
        return bool(new)

    def _put_in_place(self) -> list[Tensor]:
        """Buffers that a forward has put in the place of others, which its module may remember having done.

        (Rotary embeddings that grow with the sequence note its length beside the buffer.) One that is replaced in every
        forward is put back each time.
        """
        found: list[Tensor] = []
        for buffers, before in self.tables:
            for name, buffer in before.items():
                now, key = buffers.get(name), (id(buffers), name)
                if now is buffer or now is None or buffer is None or key in self.ever_new:
                    continue
                if key in self.replaced:
                    self.ever_new.add(key)
                    continue
                self.replaced.add(key)
                before[name] = now
                found.append(now)
        return found

    def _made(self) -> list[Tensor]:
        """Buffers that there were not when the step began."""
        if not self.unset and self.count == sum(map(len, self.dicts)):
            return []
        known = {id(buffers): before for buffers, before in self.tables}
        self.tables = [(buffers, known.get(id(buffers), {})) for buffers in self.dicts if buffers]
        self.count = sum(map(len, self.dicts))
        made: list[Tensor] = []
        for buffers, before in self.tables:
            here = {name: b for name, b in buffers.items() if b is not None and before.get(name) is None}
            before |= here
            made += here.values()
        return made

    def release(self) -> None:
        """Drop the copies: a step is over."""
        self.copies, self.large, self.tables = [], [], []


def _writable(buffer: Tensor) -> bool:
    """Whether a forward could write it in place: torch refuses that for expanded tensors."""
    if is_lazy(buffer) or buffer.layout != torch.strided or buffer.is_nested or buffer.device.type == "meta":
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def version_of(buffer: Tensor) -> int | None:
    """How often torch has seen it written; tensors made in inference mode have no such counter."""
    return None if buffer.is_inference() else buffer._version


def _checksum(buffer: Tensor) -> int:
    """A sum of its bits, read in pieces so that no temporary of its size is made."""
    if is_traceable_wrapper_subclass(buffer):
        return 0
    rows = buffer.detach().reshape(1) if buffer.dim() == 0 else buffer.detach()
    total = 0
    for piece in rows.split(max(1, _PIECE * len(rows) // max(1, buffer.nbytes))):
        raw = piece.contiguous().view(-1).view(torch.uint8)
        whole = len(raw) // 8 * 8
        words = raw[:whole].view(torch.int64) if raw.data_ptr() % 8 == 0 else raw[:whole].clone().view(torch.int64)
        total += int(words.sum()) + int(raw[whole:].sum())
    return total
