"""DiZO (2502.03304): MeZO, whose distance from the pretrained weights is rescaled layer by layer every kappa steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from .. import ops
from ..directions import Weight, bucket, line_through
from ..noise import Role
from ..perturbation import version_of
from . import scores
from .base import Evaluation, Params, ZOOptimizer
from .options import at_least_one, patterns, positive


class DiZO(ZOOptimizer):
    """Divergence-driven zeroth-order optimization.

    ``kappa`` MeZO steps without weight decay, then ``iterations`` steps that project, over and over. A projection looks
    for a ratio c of each selected weight, at first 1, with Delta = W - W0 from the anchor and n = |Delta|:

        z ~ N(0, 1) for each weight, clipped to |z| <= tau n / eps_p
        g = (L(W0 + (c + eps_p z / n) Delta) - L(W0 + (c - eps_p z / n) Delta)) / (2 eps_p)
        c <- clip(c - s g z, 1 - tau, 1 + tau);      after the last:  W <- W0 + c Delta

    Each ``step`` call is one of either kind, with a minibatch of its own; the weights stay as they are until the
    projection's last step. 2 forwards and in place 3 weight passes a step. State: W0 of the selected weights, m n
    elements of their dtype, and while projecting Delta, m n floats.

    Args:
        params, lr, eps: as in ``MeZO``.
        select: name patterns of the weights to project (the published code knows only OPT's); each has to match.
        kappa: MeZO steps between projections.
        iterations: J, steps of a projection.
        eps_p: radius of the finite differences of a projection.
        tau: the most by which a projection's scale c may differ from 1.
        s: step size of c.
        **options: of ``ZOOptimizer``.
    """

    method: ClassVar[str] = "DiZO"
    takes_residual: ClassVar[bool] = False  # distances from W0 are those of the stored weights
    elementwise_state: ClassVar[tuple[str, ...]] = ("anchor", "delta")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        select: Sequence[str] = ("*k_proj.weight", "*v_proj.weight"),
        kappa: int = 50,
        iterations: int = 10,
        eps_p: float = 0.1,
        tau: float = 0.2,
        s: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": 0.0}, **options)
        self.select = patterns("select", select, [name for w in self.weights() for name in w.names])
        self.kappa, self.iterations = at_least_one("kappa", kappa), at_least_one("iterations", iterations)
        self.period = self.kappa + self.iterations
        self.eps_p, self.tau, self.s = positive("eps_p", eps_p), positive("tau", tau), positive("s", s)
        self._left: dict[int, tuple] = {}  # the selected weights' contents between a projection's steps

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["weight_decay"] != 0:
            raise ValueError(f"weight_decay: got {group['weight_decay']}; accepted: 0, DiZO has none")

    def selected(self) -> list[Weight]:
        """The weights that are projected."""
        return [w for w in self.weights() if any(map(w.matches, self.select)) and w.tensor.numel()]

    def estimate_and_update(self, evaluate: Evaluation) -> float:
        for w in self.selected():
            anchor = self.state[w.tensor].get("anchor", w.tensor.detach())
            if "anchor" not in self.state[w.tensor] or anchor.dtype != w.tensor.dtype:  # somebody has cast the weight
                self.state[w.tensor]["anchor"] = anchor.to(w.tensor.dtype, copy=True)
        turn = self.steps % self.period - self.kappa
        if turn >= 0:
            return self._project(evaluate, turn)
        for w in self.selected():  # left over if the projection's last step was skipped
            self._forget(self.state[w.tensor])
        z = self.noise(self.key(Role.DENSE))
        plus, minus = evaluate.two_sided(z)
        self.apply_update([(z, self.descent((plus - minus) / 2))])
        return (plus + minus) / 2

    def _project(self, evaluate: Evaluation, turn: int) -> float:
        weights, key = self.selected(), self.key(Role.DATA)
        states = [self.state[w.tensor] for w in weights]
        # Who writes a weight in the middle of a projection begins it anew, from what was written.
        left, self._left = self._left, {}  # a step that fails writes, too
        written = any(left.get(place, found) != found for place, found in _contents(weights).items())
        if turn == 0 or written or any("ratio" not in state for state in states):
            self._measure(weights)
        line = line_through(weights, *([state[name] for state in states] for name in ("anchor", "delta")))
        bounds = [self.tau * state["distance"] / self.eps_p for state in states]
        draws = [ops.draw(1, key, w.id, device="cpu").item() for w in weights]
        z = [min(max(draw, -bound), bound) for draw, bound in zip(draws, bounds, strict=True)]
        moves = [self.eps_p * zi / (state["distance"] + 1e-8) for zi, state in zip(z, states, strict=True)]

        def offsets(by: Sequence[float]) -> dict[int, float]:
            """c + by - 1 of each selected weight: what the line is moved along by."""
            return {w.index: s["ratio"] + b - 1 for w, s, b in zip(weights, states, by, strict=True)}

        plus, minus = evaluate.population([(line, offsets(moves)), (line, offsets([-m for m in moves]))])
        g, last = scores.spsa(plus, minus, self.eps_p), turn == self.iterations - 1
        ratios = [s["ratio"] - self.s * g * zi for s, zi in zip(states, z, strict=True)]
        ratios = [min(max(c, 1 - self.tau), 1 + self.tau) for c in ratios]
        self.apply_update([(line, {w.index: c - 1 for w, c in zip(weights, ratios, strict=True)})] if last else [])
        for state, c in zip(states, ratios, strict=True):
            state["ratio"] = c
            if last:
                self._forget(state)
        self._left = {} if last else _contents(weights)
        return (plus + minus) / 2

    def _measure(self, weights: list[Weight]) -> None:
        """Delta and its norm of each weight; all ratios are 1."""
        for same in bucket(weights):
            anchors = [self.state[w.tensor]["anchor"] for w in same]
            squares = self.to_host(ops.squared_norms([w.tensor for w in same], anchors))
            for w, anchor, square in zip(same, anchors, squares, strict=True):
                state = self.state[w.tensor]
                if "delta" not in state or state["delta"].device != w.tensor.device:
                    state["delta"] = torch.empty_like(w.tensor, dtype=torch.float32, requires_grad=False)
                state["delta"].copy_(w.tensor.detach()).sub_(anchor)
                state |= {"distance": math.sqrt(square), "ratio": 1.0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._left = {}  # the weights of that moment may be loaded later

    def _forget(self, state: dict[str, Any]) -> None:
        """A projection is over. Captured forwards read its Delta, and keep it: the next one goes into its memory."""
        state.pop("ratio", None)
        if not self.perturbation.has_graphs:
            state.pop("delta", None)


def _contents(weights: Sequence[Weight]) -> dict[int, tuple]:
    """What tells whether others have written weights since, or put other memory into them."""
    return {id(w.tensor): (w.tensor.data_ptr(), version_of(w.tensor)) for w in weights}
