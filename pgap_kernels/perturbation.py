"""How a direction reaches the forward: weights are written in place, and always find their way back.

A direction is a list of moves. A move is one op call: it adds ``a * direction`` to some weights of one device and
dtype, with decay, in one pass, and knows how far from the clean weights it stands.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops


class Weight(NamedTuple):
    """A trainable tensor with its name, its id in the noise contract and its param group."""

    name: str
    tensor: Tensor
    id: int
    group: dict[str, Any]


PerWeight = Callable[[Weight], float]


def buckets(weights: Sequence[Weight], also: Callable[[Weight], Any] = lambda _: None) -> list[list[Weight]]:
    """Weights that may share an op call: one device, dtype and value of ``also``."""
    found: dict[Any, list[Weight]] = {}
    for weight in weights:
        key = (weight.tensor.device, weight.tensor.dtype, also(weight))
        found.setdefault(key, []).append(weight)
    return list(found.values())


class Move:
    """One op call's share of a direction; ``offset`` is where it stands, in units of each weight's smoothing radius.

    ``scale`` multiplies the direction of each weight; coefficients that reach ``add`` have it in them.
    """

    def __init__(self, weights: list[Weight], scale: list[float] | None = None) -> None:
        self.weights = weights
        self.scale = scale or [1.0] * len(weights)
        self.offset = 0.0

    def add(self, coefficient: list[float], decay: list[float] | float, rounding: dict[str, Any]) -> None:
        """W <- W - d W + a * direction in one pass; a has the scale in it."""
        raise NotImplementedError

    def to(self, offset: float, eps: PerWeight) -> None:
        """Stand at W + offset * eps * direction."""
        if offset != self.offset:
            distance = offset - self.offset
            self.add([distance * eps(w) * s for w, s in zip(self.weights, self.scale, strict=True)], 0.0, {})
            self.offset = offset

    def landing(self, step: PerWeight, eps: PerWeight, decay: PerWeight) -> dict[str, Any]:
        """Coefficient and decay of the pass that restores and updates: W <- (1 - d) W + step * direction."""
        decays = [decay(w) for w in self.weights]
        coefficient = [
            (step(w) - self.offset * (1.0 - d) * eps(w)) * s
            for w, d, s in zip(self.weights, decays, self.scale, strict=True)
        ]
        return {"coefficient": coefficient, "decay": decays}

    def land(self, landing: dict[str, Any], rounding_key: int) -> None:
        """Make the pass that ``landing`` worked out.

        16-bit weights round stochastically: to nearest would lose steps under half an ulp.
        """
        is_16_bit = self.weights[0].tensor.dtype != torch.float32
        self.add(**landing, rounding={"rounding": "stochastic", "rounding_key": rounding_key} if is_16_bit else {})
        self.offset = 0.0

    def take_back(self, landing: dict[str, Any], offset: float) -> None:
        """Undo ``land``: stand again at ``offset``, from which it was made."""
        keep = [1.0 - d for d in landing["decay"]]

        def reverse(values: list[float]) -> list[float]:
            return [-value / k for value, k in zip(values, keep, strict=True)]

        others = {"others": [(key, reverse(a)) for key, a in landing["others"]]} if "others" in landing else {}
        self.add(reverse(landing["coefficient"]), reverse(landing["decay"]), {}, **others)
        self.offset = offset


class DenseMove(Move):
    """Direction z(key): dense normal noise."""

    def __init__(self, weights: list[Weight], key: int) -> None:
        super().__init__(weights)
        self.key = key

    def add(
        self, coefficient: list[float], decay: list[float] | float, rounding: dict[str, Any], others: Sequence = ()
    ) -> None:
        ops.dense_perturb_(
            [w.tensor for w in self.weights],
            [*others, (self.key, coefficient)],
            tensor_ids=[w.id for w in self.weights],
            decay=decay,
            **rounding,
        )

    def switch(self, key: int, eps: PerWeight) -> None:
        """Leave this key's direction and stand at W + eps * z(key), in one pass."""
        leave = (self.key, [-self.offset * eps(w) for w in self.weights])
        self.key, before = key, self.key
        try:
            self.add([eps(w) for w in self.weights], 0.0, {}, [leave])
        except BaseException:
            self.key = before
            raise
        self.offset = 1.0

    def landing(
        self, step: PerWeight, eps: PerWeight, decay: PerWeight, others: Sequence[tuple[int, PerWeight]] = ()
    ) -> dict[str, Any]:
        """As ``Move.landing``, adding step_j * z(key_j) of other keys in the same pass."""
        draws = [(key, [step_j(w) for w in self.weights]) for key, step_j in others]
        return {**super().landing(step, eps, decay), "others": draws}


class SubspaceMove(Move):
    """Direction scale * U Z V^T on matrices of one rank."""

    def __init__(
        self,
        weights: list[Weight],
        left: list[Tensor],
        right: list[Tensor],
        core: ops.AlignedCore | list[Tensor],
        scale: list[float],
    ) -> None:
        super().__init__(weights, scale)
        self.left, self.right, self.core = left, right, core

    def add(self, coefficient: list[float], decay: list[float] | float, rounding: dict[str, Any]) -> None:
        ops.lowrank_perturb_(
            [w.tensor for w in self.weights],
            self.left,
            self.right,
            core=self.core,
            coefficient=coefficient,
            tensor_ids=[w.id for w in self.weights],
            decay=decay,
            **rounding,
        )


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
