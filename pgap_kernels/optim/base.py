"""What every zeroth-order optimizer shares: weights and ids, seeded keys, forwards, restoring, state."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..noise import CONTRACT_VERSION, Role
from ..perturbation import DenseMove, ForwardState, Move, PerWeight, Weight, buckets, uninterrupted

Closure = Callable[[], "Tensor | float"]
Params = nn.Module | Iterable[Any]
_NOTHING_TO_TRAIN = "params: got no trainable parameter (requires_grad); accepted: at least one"


class NonFiniteLossError(RuntimeError):
    """The closure returned NaN or infinity. The weights have been restored to what they were before the step."""


class Cost(NamedTuple):
    """What a method costs beyond its forwards."""

    weight_passes: float  # reads and writes of every weight per step, refreshes spread over their window
    state_bytes: int  # kept between steps
    scratch_bytes: int  # largest transient, up to the O((m + n)(r + 8)) of an SVD


def positive(name: str, value: float, *, zero: bool = False) -> float:
    """Check that a hyper-parameter is finite and > 0 (or >= 0), naming it if not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}; accepted: a finite number")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}: got {value}; accepted: a number {'>= 0' if zero else '> 0'}")
    return value


def at_least_one(name: str, value: int) -> int:
    """Check that a hyper-parameter is an integer >= 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"{name}: got {value!r}; accepted: an integer, 1 or more")
    return value.__index__()


def group_eps(weight: Weight) -> float:
    """The smoothing radius of a weight's param group."""
    return weight.group["eps"]


def group_decay(weight: Weight) -> float:
    """lr * weight_decay of a step; tensors of one dimension (biases, norm scales) do not decay."""
    return weight.group["lr"] * weight.group["weight_decay"] if weight.tensor.dim() > 1 else 0.0


class ZOOptimizer(torch.optim.Optimizer):
    """Base of the zeroth-order optimizers: ``step(closure)`` with forward passes only.

    ``closure()`` takes no argument, runs one forward on the step's minibatch and returns the loss (a scalar tensor or
    float, best reduced in float32). It is called several times a step under ``torch.no_grad()``; every call sees the
    same torch RNG state and, if a model was given, the same module buffers. Whatever happens in it, the weights are
    restored and the exception propagates.

    Args:
        params: a module (its parameters with ``requires_grad``), named parameters, or param groups of either. Plain
            tensors are named by their flat index, with a warning: their noise then depends on their order.
        defaults: of the param groups.
        model: the module whose buffers every forward shall see unchanged; the default is ``params`` if that is one.
        seed: in [0, 2**64); with the step number and the parameter names it determines every draw.
        tensor_ids: overrides of ``noise.tensor_id`` by parameter name.
        on_nonfinite: "raise" ``NonFiniteLossError``, or "skip" the step; the weights are restored either way.

    Attributes:
        steps: number of steps taken.
        skipped: number of steps skipped for a non-finite loss.
        passes: number of weight passes so far.
        seconds: accumulated wall seconds by "forward", "perturb" and "refresh" (refreshes with their forwards), as the
            host sees them: work queued on a GPU counts where the host waits for it.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        seed: int = 0,
        tensor_ids: Mapping[str, int] | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        self.seed = noise.check_uint("seed", seed, 64)
        self.on_nonfinite = checks.choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.tensor_ids = dict(tensor_ids or {})
        self.model = params if isinstance(params, nn.Module) else model
        self.steps = self.skipped = self.passes = self._passes_this_step = 0
        self.seconds = {"forward": 0.0, "perturb": 0.0, "refresh": 0.0}
        self._weights: list[Weight] | None = None
        self._clock: str | None = None
        self._warned_loss = False
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
            if not params:
                raise ValueError(_NOTHING_TO_TRAIN)
        super().__init__(params, defaults)
        if not self.weights():
            raise ValueError(_NOTHING_TO_TRAIN)
        unknown = sorted(set(self.tensor_ids) - {w.name for w in self.weights()})
        if unknown:
            raise ValueError(f"tensor_ids: got {unknown[0]!r}; accepted: names of this optimizer's parameters")
        if any(w.tensor.dtype != torch.float32 for w in self.weights()):
            warnings.warn(
                "16-bit weights are perturbed in place: each step rounds them, so they are not restored exactly "
                "(fp32 weights are, to rounding)",
                stacklevel=3,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._weights = None
            self.weights()
        except Exception:
            self.param_groups.pop()
            self._weights = None
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        positive("lr", group["lr"], zero=True)
        positive("eps", group["eps"])
        positive("weight_decay", group["weight_decay"], zero=True)

    def weights(self) -> list[Weight]:
        """Every trainable tensor once: tied weights under their first name, ids checked to be distinct."""
        if self._weights is None:
            self._weights = self._collect()
        return self._weights

    def _collect(self) -> list[Weight]:
        found: dict[Any, Weight] = {}
        names: dict[int, str] = {}
        index = 0
        for group in self.param_groups:
            given = group.get("param_names")
            if given is None:
                warnings.warn(
                    "params: parameters without names get their flat index as name, so their noise depends on their "
                    "order; pass the model or model.named_parameters()",
                    stacklevel=4,
                )
            for i, tensor in enumerate(group["params"]):
                name = noise.canonical_name(given[i]) if given is not None else str(index)
                index += 1
                place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
                if tensor.numel() and place in found:
                    continue  # tied: same storage under another name
                if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                    continue  # frozen
                tid = self.tensor_ids.get(name, noise.tensor_id(name))
                noise.check_uint(f"tensor_ids[{name!r}]", tid, 32)
                if tid in names:
                    raise ValueError(
                        f"tensor_ids: {names[tid]!r} and {name!r} have the same id {tid:#010x}; give one of them "
                        "another with tensor_ids={name: id}"
                    )
                names[tid] = name
                found[place if tensor.numel() else name] = Weight(name, tensor, tid, group)
        weights = list(found.values())
        for bucket in buckets(weights):
            tensors = checks.tensors(f"params ({bucket[0].name!r})", [w.tensor for w in bucket])
            layouts = [checks.matrix_layout(f"params ({w.name!r})", w.tensor) for w in bucket]
            checks.disjoint("params", tensors, layouts)
        return weights

    # ---- keys, passes and forwards ------------------------------------------------------------------------------

    def key(self, role: Role, probe: int = 0) -> int:
        """The key of this step's draw of a role."""
        return noise.derive(self.seed, self.steps, role, probe)

    def dense_moves(self, key: int, weights: Sequence[Weight] | None = None) -> list[DenseMove]:
        """z(key) on the given weights (all by default), one move per device and dtype."""
        return [DenseMove(bucket, key) for bucket in buckets(self.weights() if weights is None else weights)]

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the wall seconds of the block to ``seconds[what]``; blocks inside another count to the outer one."""
        if self._clock is not None:
            yield
            return
        self._clock = what
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begin
            self._clock = None

    @contextlib.contextmanager
    def weight_pass(self) -> Iterator[int]:
        """One pass over the weights, not interrupted by Ctrl-C; gives its stochastic-rounding key."""
        with self.timed("perturb"), uninterrupted():
            yield self.key(Role.ROUNDING, self._passes_this_step)
        self._passes_this_step += 1
        self.passes += 1

    @contextlib.contextmanager
    def restoring(self, moves: Sequence[Move], eps: PerWeight) -> Iterator[None]:
        """If the block raises, take every move back before the exception propagates."""
        try:
            yield
        except BaseException:
            with uninterrupted():
                for move in moves:
                    move.to(0.0, eps)
            raise

    def move_to(self, moves: Sequence[Move], offset: float, eps: PerWeight) -> None:
        """One pass, unless they stand there: stand at W + offset * eps * direction."""
        if all(move.offset == offset for move in moves):
            return
        with self.weight_pass():
            for move in moves:
                move.to(offset, eps)

    def switch_to(self, moves: Sequence[DenseMove], key: int, eps: PerWeight) -> None:
        """One pass: from one dense direction to W + eps * z(key)."""
        with self.weight_pass():
            for move in moves:
                move.switch(key, eps)

    def land(
        self,
        moves: Sequence[Move],
        step: PerWeight,
        eps: PerWeight,
        **others: Any,
    ) -> None:
        """The step's last pass: restore the weights, add step * direction and decay; the step then counts as taken.

        All coefficients are worked out and checked before the first write.
        """
        landings = [move.landing(step, eps, group_decay, **others) for move in moves]
        limit = torch.finfo(torch.float32).max
        for landing in landings:
            for values in (landing["coefficient"], *(draw[1] for draw in landing.get("others", ()))):
                if not all(abs(value) <= limit for value in values):
                    raise NonFiniteLossError(
                        f"the update of step {self.steps} overflows float32 though its losses are finite; the weights "
                        "are restored. Lower lr, raise eps, or pass on_nonfinite='skip'"
                    )
        offsets = [move.offset for move in moves]
        landed = 0
        with uninterrupted():
            try:
                with self.weight_pass() as rounding_key:
                    for move, landing in zip(moves, landings, strict=True):
                        move.land(landing, rounding_key)
                        landed += 1
            except BaseException:  # say, out of memory in a later group: no weight keeps half a step
                for move, landing, offset in list(zip(moves, landings, offsets, strict=True))[:landed]:
                    move.take_back(landing, offset)
                raise
            self.steps += 1

    def forward(self, closure: Closure) -> Tensor:
        """One forward: the loss as a scalar tensor, in the RNG and buffer state of the step's first one."""
        with self.timed("forward"):
            self._forward_state.restore()
            value = closure()
        if not isinstance(value, (Tensor, int, float)):
            raise TypeError(f"closure: returned {type(value).__name__}; accepted: a scalar tensor or a float")
        loss = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"closure: returned {loss.dtype} of shape {tuple(loss.shape)}; accepted: a real scalar loss"
            )
        if loss.dtype in (torch.float16, torch.bfloat16) and not self._warned_loss:
            self._warned_loss = True
            warnings.warn(
                f"closure: returned a {loss.dtype} loss, whose rounding is large beside the difference of two losses; "
                "reduce the loss in float32",
                stacklevel=4,
            )
        return loss.reshape(())

    def two_sided(self, moves: Sequence[Move], closure: Closure, eps: PerWeight) -> tuple[float, float]:
        """Losses at W + eps * direction and W - eps * direction; the weights stay at the latter.

        Raises NonFiniteLossError if one is not finite. Call inside ``restoring``.
        """
        self.move_to(moves, 1.0, eps)
        plus = self.forward(closure)
        self.move_to(moves, -1.0, eps)
        minus = self.forward(closure)
        return self.finite(plus, "W + eps z"), self.finite(minus, "W - eps z")

    def finite(self, loss: Tensor, where: str) -> float:
        """The loss on the host, if it is finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"loss at {where} is {value} in step {self.steps}; the weights are restored. Lower lr or eps, look at "
                "the batch, or pass on_nonfinite='skip'"
            )
        return value

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """One zeroth-order step.

        Args:
            closure: returns the loss of the step's minibatch; see the class.

        Returns:
            Mean of the losses at the perturbed weights; NaN for a step that was skipped.

        Raises:
            NonFiniteLossError: see ``on_nonfinite``.
            TypeError: no closure was given.
        """
        if not callable(closure):
            raise TypeError(f"closure: got {closure!r}; accepted: a function that returns the loss of a minibatch")
        self._passes_this_step = 0
        self._forward_state = ForwardState(self.model, {w.tensor.device for w in self.weights()})
        try:
            return self.estimate_and_update(closure)
        except NonFiniteLossError:
            self._forward_state.restore()
            if self.on_nonfinite == "raise":
                raise
            self.skipped += 1
            self.steps += 1
            return math.nan
        except BaseException:
            self._forward_state.restore()
            raise
        finally:
            del self._forward_state

    def estimate_and_update(self, closure: Closure) -> float:
        """The method's recipe: directions, losses, and ``land`` at the end. Returns the mean loss."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """What the method declares to cost beyond its forwards."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # "step" is in there once a scheduler has bound its counter to this very object.
        return {k: v for k, v in self.__dict__.items() if k != "step"} | {"_weights": None}

    # ---- state --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Tensors and numbers of the method beyond seed and step, for ``state_dict``."""
        return {}

    def check_method_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if ``load_method_state`` cannot take this state; nothing has been loaded yet."""

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``method_state``."""

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with an entry "zo": contract version, method, seed, step and the method's state."""
        zo = {
            "contract_version": CONTRACT_VERSION,
            "method": type(self).__name__,
            "seed": self.seed,
            "steps": self.steps,
            "skipped": self.skipped,
            "tensor_ids": {w.name: w.id for w in self.weights()},
            "state": self.method_state(),
        }
        return {**super().state_dict(), "zo": zo}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; another contract version or method is refused."""
        zo = state_dict.get("zo")
        if zo is None:
            raise ValueError("state_dict: got one without the entry 'zo'; accepted: the state of a ZOOptimizer")
        if zo["contract_version"] != CONTRACT_VERSION or zo["method"] != type(self).__name__:
            raise ValueError(
                f"state_dict: got {zo['method']} under noise contract {zo['contract_version']}; accepted: "
                f"{type(self).__name__} under {CONTRACT_VERSION}: another stream would not continue the run"
            )
        saved = [group.get("param_names") for group in state_dict["param_groups"]]
        own = [group.get("param_names") for group in self.param_groups]
        if [names and list(map(noise.canonical_name, names)) for names in saved] != [
            names and list(map(noise.canonical_name, names)) for names in own
        ]:
            raise ValueError(
                f"state_dict: got parameters {saved}; accepted: those of this optimizer in their order, {own}"
            )
        ids = {w.name: w.id for w in self.weights()}
        moved = sorted(name for name, tid in zo["tensor_ids"].items() if ids.get(name) != tid)
        if moved:
            name = moved[0]
            raise ValueError(
                f"state_dict: {name!r} had the tensor id {zo['tensor_ids'][name]}; accepted: {ids.get(name)}, as in "
                "this optimizer (tensor_ids=): another stream would not continue the run"
            )
        self.check_method_state(zo["state"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "zo"})
        self._weights = None
        self.seed, self.steps, self.skipped = zo["seed"], zo["steps"], zo["skipped"]
        self.load_method_state(zo["state"])
