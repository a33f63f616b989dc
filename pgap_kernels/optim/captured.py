"""Forwards captured in CUDA graphs: a small model's hooks and launches then cost the host nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .base import ZOOptimizer


class CapturedClosure:
    """A closure whose forward is captured in a CUDA graph, one for each kind of forward that comes back, and replayed.

        closure = CapturedClosure(optimizer, lambda: loss_of(model(inputs), labels))
        for batch in batches:
            inputs.copy_(batch.inputs)
            labels.copy_(batch.labels)
            optimizer.step(closure)

    Keep it from step to step, and the tensors that the closure reads where they are: new batches are copied into them.
    A kind of forward runs as it is in the first step that has it, and is captured in the next: a method that perturbs
    other layers in each step (LeZO) would otherwise fill the memory with graphs that are never replayed. A forward in
    which the optimizer looks on (for stray uses of its weights, or for a layer's inputs) runs as it is, too. If weights
    are moved or cast, everything begins anew. A forward that waits for the device cannot be captured, and PyTorch says
    so.

    Args:
        optimizer: whose ``step`` the closure is for.
        closure: returns the loss as a tensor on a CUDA device.

    Raises:
        ValueError: the optimizer has weights that are not on a CUDA device.
    """

    def __init__(self, optimizer: ZOOptimizer, closure: Callable[[], Tensor]) -> None:
        devices = {w.tensor.device for w in optimizer.weights()}
        if other := [device for device in devices if device.type != "cuda"]:
            raise ValueError(f"optimizer: got weights on {other[0]}; accepted: weights on a CUDA device")
        self.optimizer, self.closure = optimizer, closure
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.weights: object = None  # the list that the graphs were captured with
        self.first: dict[Hashable, int] = {}  # the step in which each kind of forward came first

    def __call__(self) -> Tensor:
        perturbation = self.optimizer.perturbation
        if perturbation.weights is not self.weights:
            self.graphs.clear()
            self.first.clear()
            self.weights = perturbation.weights
        model = self.optimizer.model
        training = () if model is None else tuple([module.training for module in model.modules()])
        key = perturbation.graph_key, training
        if perturbation.watched or self.first.setdefault(key, self.optimizer.steps) == self.optimizer.steps:
            return self.closure()
        if key not in self.graphs:
            self.graphs[key] = capture(self.closure)
        graph, loss = self.graphs[key]
        graph.replay()
        return loss


def capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call, after one on another stream: what is compiled or allocated at the first is not in the graph;
    and the tensor that it returned, which every replay overwrites."""
    side, random = torch.cuda.Stream(), torch.cuda.get_rng_state()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_rng_state(random)  # the replay that follows is the forward
    # Copies of weights that autocast has made are of this moment, and freed later: the graph has to make its own.
    torch.clear_autocast_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = call()
    torch.clear_autocast_cache()
    return graph, value
