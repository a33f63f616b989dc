"""What several processes share: losses, to the same bits in each, and the weights they begin with."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from ..optim import ZOOptimizer
from ..perturbation import in_several_processes


def check_shares(optimizer: ZOOptimizer) -> None:
    """Refuse a method whose updates need more of the other processes than their losses.

    Raises:
        ValueError: it does.
    """
    if optimizer.sees_inputs:
        raise ValueError(
            f"{optimizer.method}: got it in {distributed.get_world_size()} processes, of which each would move along "
            "directions from its own batch; accepted: one process, or another method"
        )


def mean_over_ranks(losses: Tensor) -> Tensor:
    """The mean over all processes, float64; the same tensor if there is one process. As an optimizer's reduce_losses.

    Gathered and then summed in the order of the ranks: ``all_reduce`` would sum in the backend's order, which may
    differ from process to process.
    """
    if not in_several_processes():
        return losses
    own = losses.detach().double().contiguous()
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    return torch.stack(gathered).sum(0) / len(gathered)


def broadcast_from_first(tensors: list[Tensor]) -> None:
    """Give every process the first one's values: adapters, for one, begin at each process's own random numbers."""
    for tensor in tensors:
        distributed.broadcast(tensor.data, 0)
