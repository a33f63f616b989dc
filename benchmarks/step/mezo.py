"""What ours is timed against beside MeZO's published code: plain forwards, and that code under torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pgap_kernels.finetune.baseline import Baseline


class Forwards:
    """Two forwards of the model as it is: the floor of a two-sided step."""

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "perturb": 0.0, "refresh": 0.0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Both forwards; returns the mean of their losses."""
        begin = time.perf_counter()
        losses = [closure().item(), closure().item()]
        self.seconds["forward"] += time.perf_counter() - begin
        return sum(losses) / 2


class CompiledMeZO(Baseline):
    """MeZO with each pass over a parameter compiled.

    On a CPU the noise is that of the published code, to the bit: drawn by ``torch.normal``, which inductor leaves to
    PyTorch. With ``torch.randn`` all becomes one kernel, which is faster on a GPU and slower on a CPU, as the generator
    that inductor writes there is not vectorised.
    """

    def __init__(self, model: torch.nn.Module, **options: float) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self._add = torch.compile(add_noise, fullgraph=True, dynamic=False)
        with torch.no_grad():
            self._pass(0, 0.0)  # compiles, for every shape

    def _pass(self, zo_seed: int, coefficient: float) -> None:
        torch.manual_seed(zo_seed)
        scale = torch.tensor(coefficient)  # a number would be compiled in
        for parameter in self.parameters.values():
            self._add(parameter, scale)

    def _perturb(self, zo_seed: int, scale: float) -> None:
        self._pass(zo_seed, scale * self.eps)

    def _update(self, zo_seed: int, projected_gradient: float) -> None:
        self._pass(zo_seed, -self.lr * projected_gradient)


def add_noise(w: Tensor, coefficient: Tensor) -> None:
    """W <- W + coefficient * z."""
    if w.is_cuda:
        w.add_(coefficient * torch.randn(w.shape, dtype=w.dtype, device=w.device))
    else:
        w.add_(coefficient * torch.normal(0.0, 1.0, w.shape, dtype=w.dtype, device=w.device))
