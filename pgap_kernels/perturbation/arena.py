"""One reused piece of memory per device, handed out and taken back like a stack."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

_ALIGNMENT = 128  # bytes: vector accesses, and no two tensors in one cache line


def padded_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes up."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def in_memory(tensor: Tensor, memory: Tensor) -> bool:
    """Whether a tensor lies in some memory; True inside vmap, where addresses cannot be read."""
    if tensor.device != memory.device or tensor.layout != torch.strided:
        return False
    if is_functorch_wrapped_tensor(tensor):
        return True
    return 0 <= tensor.data_ptr() - memory.data_ptr() < memory.nbytes


class Arena:
    """Memory for the tensors that exist at one time.

    A tensor that does not fit (of a recursive module) gets memory of its own. So does one that an autograd graph may
    keep: closures may differentiate with respect to their inputs (forces, penalties).
    """

    def __init__(self, capacity: Mapping[torch.device, int]) -> None:
        self.capacity = dict(capacity)
        self.memory: dict[torch.device, Tensor] = {}
        self.top = dict.fromkeys(capacity, 0)

    def take(self, like: Tensor) -> Tensor:
        """Uninitialised contiguous memory of a tensor's shape and dtype, to be given back before any taken earlier."""
        device, begin = like.device, self.top[like.device]
        end = begin + padded_bytes(like)
        # ``StrayUses`` would find it stale, as it lies beyond the top until it is handed out.
        with torch._C.DisableTorchFunction():
            taken = self._memory_for(like, begin, end)
        self.top[device] = end  # last: what could not be had is not given back either
        return taken

    def _memory_for(self, like: Tensor, begin: int, end: int) -> Tensor:
        device = like.device
        if end > self.capacity[device] or torch.is_grad_enabled():
            return torch.empty(like.shape, dtype=like.dtype, device=device)
        if device not in self.memory:
            with torch.inference_mode(False):  # the next forward may run in another inference mode
                self.memory[device] = torch.empty(self.capacity[device], dtype=torch.uint8, device=device)
        return self.memory[device][begin : begin + like.nbytes].view(like.dtype).view(like.shape)

    def borrow(self, elements: int, device: torch.device) -> Tensor | None:
        """Its memory as float32, to use until the next ``take``; None if it has less, or none yet."""
        memory = self.memory.get(device)
        if memory is None or memory.numel() < 4 * elements or self.top[device]:
            return None
        return memory[: 4 * elements].view(torch.float32)

    def give_back(self, like: Tensor) -> None:
        """Release what the last ``take`` of such a tensor gave."""
        self.top[like.device] -= padded_bytes(like)

    def contains(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the arena's memory."""
        memory = self.memory.get(tensor.device)
        return memory is not None and in_memory(tensor, memory)

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that has been given back: who reads it reads what is there by now."""
        try:
            if is_functorch_wrapped_tensor(tensor) or not self.contains(tensor):
                return False
            return tensor.data_ptr() - self.memory[tensor.device].data_ptr() >= self.top[tensor.device]
        except RuntimeError:  # it has no storage, as under torch.func.jvp
            return False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "memory": {}}
