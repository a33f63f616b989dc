"""Sparse-MeZO (2402.15751): only the small weights move, or a random share of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .. import checks, ops
from ..directions import Direction, Mask, Noise, Weight
from ..noise import Role
from .base import Evaluation, Params, ZOOptimizer
from .checkpoint import keep_memory
from .options import fraction
from .sampling import Sampling


class SparseMeZO(ZOOptimizer):
    """MeZO along masked noise.

        mask="threshold":  D = z 1[|W| <= h],   h the (1 - s)-quantile of |W| of a tensor, taken before the first step
        mask="random":     D = z 1[a share 1 - s, drawn in every step]
        rho = (L(W + eps D) - L(W - eps D)) / (2 eps),   W <- (1 - lr wd) W - lr rho D

    s is the share that is left alone. The mask is that of the unperturbed weights of the step, for both forwards and
    the update: in place it is kept as a bit per element, since it could not be read off perturbed weights. 2q forwards
    for q probes; 2q + 1 weight passes, and in place one for the bits. State: h, a number of a tensor; in place mn/32
    words of bits. The first step sorts one tensor after another.

    Args:
        params, lr, eps, weight_decay: as in ``MeZO``; decay reaches the elements that are left alone, too.
        sparsity: share of each tensor's elements that are left alone, from 0 to below 1.
        mask: which elements move: those of magnitudes below a "threshold", or "random" ones.
        probes, baseline: as in ``MeZO``.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "SparseMeZO"
    takes_residual: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        sparsity: float = 0.75,
        mask: str = "threshold",
        probes: int = 1,
        baseline: str = "antithetic",
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **options)
        self.sparsity = fraction("sparsity", sparsity)
        self.mask = checks.choice("mask", mask, ("threshold", "random"))
        self.sampling = Sampling.checked(probes, self.groups, self.members, baseline, "probes")
        self._masks: list[Mask] = []

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        self._masks = [self._mask_of(weights) for weights in self.buckets()]
        directions, loss = self.estimate(evaluate, self.sampling)
        self.apply_update([(d, self.descent(amount)) for d, amount in directions])
        return loss

    def direction(self, step: int, number: int = 0) -> Direction:
        key = self.key(Role.DENSE, number, step)
        pairs = zip(self.buckets(), self._masks, strict=True)
        return Direction([Noise(ws, {key: [1.0] * len(ws)}, mask=mask) for ws, mask in pairs])

    def _mask_of(self, weights: list[Weight]) -> Mask:
        if self.mask == "random":
            return Mask(share=(self.key(Role.MASK), 1.0 - self.sparsity))
        levels = [self._threshold_of(w) for w in weights]
        if self.mode != "inplace":
            return Mask(threshold=levels)  # every pass reads the unperturbed weights
        self.perturbation.count_passes(weights)
        tensors = [w.tensor for w in weights]
        if self.perturbation.dry:
            bits = [torch.empty(-(-t.numel() // 32), dtype=torch.int32, device="meta") for t in tensors]
        else:
            bits = ops.threshold_bits(tensors, levels)
        for w, own in zip(weights, bits, strict=True):
            keep_memory(self.state[w.tensor], "mask", own)
        return Mask(bits=[self.state[w.tensor]["mask"] for w in weights])

    def _threshold_of(self, weight: Weight) -> float:
        """h: between two magnitudes it is interpolated linearly."""
        state = self.state[weight.tensor]
        if weight.tensor.is_meta or not weight.tensor.numel():  # run dry, to count passes; or without elements
            return 0.0
        if "threshold" not in state:
            magnitudes = weight.tensor.detach().abs().float().flatten()
            state["threshold"] = float(quantile(magnitudes, 1.0 - self.sparsity))
        return state["threshold"]


def quantile(values: torch.Tensor, q: float) -> float:
    """As ``Tensor.quantile``, which takes no more than 2^24 elements."""
    position = q * (values.numel() - 1)
    low = int(position)
    ordered = values.sort().values
    first, second = ordered[low].item(), ordered[min(low + 1, values.numel() - 1)].item()
    return first + (position - low) * (second - first)
