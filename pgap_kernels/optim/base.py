"""What every zeroth-order optimizer shares: weights and ids, seeded keys, forwards, restoring, state."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..noise import CONTRACT_VERSION, Role
from ..perturbation import (
    MODES,
    Autocast,
    Dense,
    Direction,
    ForwardState,
    PerWeight,
    Residual,
    Update,
    Weight,
    buckets,
    build,
    choose,
    uninterrupted,
)

_log = logging.getLogger("pgap_kernels")
_MERGE = (1 << 24) - 1  # number of the stochastic-rounding key of merges between steps
Closure = Callable[[], "Tensor | float"]
Params = nn.Module | Iterable[Any]
_NOTHING_TO_TRAIN = "params: got no trainable parameter (requires_grad); accepted: at least one"


class NonFiniteLossError(RuntimeError):
    """The closure returned NaN or infinity. The weights have been restored to what they were before the step."""


class Cost(NamedTuple):
    """What a method costs beyond its forwards."""

    weight_passes: float  # reads and writes of every weight per step, refreshes spread over their window; a weight
    # that two modules share is read for each of them in the modes scratch and folded
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
        mode: how perturbations reach the forwards (docs/modes.md). "inplace": weights are written, any closure.
            "scratch": layers run on a perturbed copy in one reused buffer. "folded": low-rank directions act on the
            layers' outputs and the weights are written once per window. "auto": an exact mode where the weights are
            16-bit, else by a static table; the attribute ``mode`` says which, ``mode_reason`` why. All but "inplace"
            need a model, whose modules get hooks.
        two_pass: in place, the last pass of a step is also the first of the next; between steps the weights are then
            perturbed, until ``merge`` (a model's forwards and state_dict call it).
        residual: keep a second 16-bit plane beside 16-bit weights, in which no update is lost; else updates of
            16-bit weights round stochastically. Not in place, where the perturbation itself rounds.
        allow_unused: with hooks, accept forwards that never use some weight.
        paired: with hooks, both signs of a direction in one forward. The closure runs the step's minibatch stacked
            twice (``torch.cat([x, x])``) and returns two losses, a tensor of the two halves' own. The layers must keep
            the rows in order, and nothing may be drawn (dropout) or averaged over the batch.

    Attributes:
        steps: number of steps taken.
        skipped: number of steps skipped for a non-finite loss.
        passes: reads and writes of all the weights so far, counted by elements.
        seconds: accumulated wall seconds by "forward", "perturb" and "refresh" (refreshes with their forwards), as the
            host sees them: work queued on a GPU counts where the host waits for it, and what hooks do inside a compiled
            forward counts to the forward.
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
        mode: str = "auto",
        two_pass: bool = False,
        residual: bool = False,
        allow_unused: bool = False,
        paired: bool = False,
    ) -> None:
        self.seed = noise.check_uint("seed", seed, 64)
        self.on_nonfinite = checks.choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.tensor_ids = dict(tensor_ids or {})
        self.model = params if isinstance(params, nn.Module) else model
        self.steps = self.skipped = 0
        self.two_pass, self.residual = bool(two_pass), bool(residual)
        self.allow_unused, self.paired = bool(allow_unused), bool(paired)
        checks.choice("mode", mode, MODES)
        self.seconds = {"forward": 0.0, "perturb": 0.0, "refresh": 0.0}
        self._weights: list[Weight] | None = None
        self._clock: str | None = None
        self._warned_loss = False
        self._ahead: tuple[int, list[Direction]] | None = None
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
        self._enter_mode(mode)

    # ---- the mode ---------------------------------------------------------------------------------------------------

    def subspace_names(self) -> list[str] | None:
        """Names of the weights whose directions are U Z V^T, if the method has such directions."""
        return None

    def _enter_mode(self, mode: str) -> None:
        weights = self.weights()
        choice = choose(mode, weights, self.model, self.subspace_names())
        is_16_bit = any(w.tensor.dtype != torch.float32 for w in weights)
        if self.two_pass and choice.mode != "inplace":
            raise ValueError(f"two_pass: got True with mode={choice.mode!r}; accepted: with mode='inplace'")
        if self.paired and choice.mode == "inplace":
            raise ValueError("paired: got True with mode='inplace'; accepted: with mode 'scratch' or 'folded'")
        if self.residual and (choice.mode == "inplace" or not is_16_bit):
            raise ValueError(
                f"residual: got True with mode={choice.mode!r} and {weights[0].tensor.dtype} weights; accepted: with "
                "16-bit weights that are not perturbed in place"
            )
        if choice.mode == "inplace" and is_16_bit:
            warnings.warn(
                "16-bit weights are perturbed in place: each step rounds them, so they are not restored exactly "
                f"(fp32 weights are, to rounding); {choice.reason if mode == 'auto' else 'other modes are exact'}",
                stacklevel=4,
            )
        before = getattr(self, "perturbation", None)
        options = {"two_pass": self.two_pass, "allow_unused": self.allow_unused, "paired": self.paired}
        self.perturbation = build(choice, weights, self.model, **options)
        self.perturbation.merge_key = noise.derive(self.seed, 0, Role.ROUNDING, _MERGE)
        if self.residual:
            self.perturbation.residual = Residual(weights, before.residual if before else None)
        self.mode_reason = choice.reason
        _log.info("%s runs in mode %s: %s", type(self).__name__, choice.mode, choice.reason)

    @property
    def mode(self) -> str:
        """The mode in use; assign another between steps, after ``merge``."""
        return self.perturbation.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        checks.choice("mode", mode, MODES)
        if self.perturbation.pending:
            raise ValueError(
                f"mode: got {mode!r} while mode {self.mode!r} has updates or perturbations that are not in the "
                "weights; call merge() first"
            )
        before = self.perturbation
        self._enter_mode(mode)
        before.release()
        self.perturbation.passes = before.passes

    @property
    def passes(self) -> float:
        """Reads and writes of all the weights so far, counted by elements."""
        return self.perturbation.passes

    def merge(self) -> None:
        """Write into the weights what a window has gathered, or take off what the two-pass schedule has added.

        Nothing to do in the other modes. ``state_dict`` of the optimizer and of a hooked model do it first.
        """
        with torch.no_grad(), uninterrupted():
            self.perturbation.merge()

    def detach(self) -> None:
        """Merge, and take the hooks off the model: the optimizer has done its work."""
        with torch.no_grad(), uninterrupted():
            self.perturbation.release()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "perturbation"):
            self.merge()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._ahead = None  # planned without the new weights
        try:
            self._check_group(group)
            self._weights = None
            self.weights()
            if hasattr(self, "perturbation"):
                choose(self.mode, self.weights(), self.model, self.subspace_names())
                self.perturbation.adopt(self.weights())
                if self.residual:
                    self.perturbation.residual = Residual(self.weights(), self.perturbation.residual)
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
            for w in bucket:
                checks.matrix_layout(f"params ({w.name!r})", w.tensor)
            checks.disjoint("params", tensors)
        return weights

    # ---- keys, directions and passes --------------------------------------------------------------------------------

    def key(self, role: Role, probe: int = 0, step: int | None = None) -> int:
        """The key of a step's draw of a role; of this step by default."""
        return noise.derive(self.seed, self.steps if step is None else step, role, probe)

    def dense(self, key: int, weights: Sequence[Weight] | None = None) -> list[Dense]:
        """The direction z(key) on the given weights, all by default."""
        return [Dense(bucket, key) for bucket in buckets(self.weights() if weights is None else weights)]

    def directions(self, step: int) -> list[Direction]:
        """The directions of a step, in the order in which it evaluates them."""
        raise NotImplementedError

    def radius(self, weight: Weight) -> float:
        """The smoothing radius at which a step evaluates its directions."""
        return weight.group["eps"]

    def plan(self, step: int) -> list[Direction]:
        """``directions``, made once per step."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self.directions(step))
        return self._ahead[1]

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the wall seconds of the block to ``seconds[what]``; blocks inside another count to the outer one."""
        if self._clock is not None:
            yield
            return
        self._clock = what
        begin, hooks = time.perf_counter(), self.perturbation.seconds
        try:
            yield
        finally:
            inside = self.perturbation.seconds - hooks if what == "forward" else 0.0
            self.seconds[what] += time.perf_counter() - begin - inside
            self.seconds["perturb"] += inside
            self._clock = None

    def stand(self, direction: Direction, amount: PerWeight) -> None:
        """The next forwards are at W + amount * direction; an empty direction is W. Ctrl-C waits meanwhile."""
        with self.timed("perturb"), uninterrupted():
            self.perturbation.stand(direction, amount)

    def land(self, terms: Sequence[tuple[Direction, PerWeight]], closing: bool = False) -> None:
        """The end of a step: W <- (1 - lr wd) W + sum of step * direction; the step then counts as taken.

        All coefficients are worked out and checked before the first write, and if a write fails the weights are as
        before. ``closing``: the next step finds all that was learnt in the weights.
        """
        update = Update(terms, group_decay, closing)
        limit = torch.finfo(torch.float32).max
        for parts, _ in update.by_part():
            for _, coefficient in parts:
                if not all(abs(value) <= limit for value in coefficient):
                    raise NonFiniteLossError(
                        f"the update of step {self.steps} overflows float32 though its losses are finite; the weights "
                        "are restored. Lower lr, raise eps, or pass on_nonfinite='skip'"
                    )
        with self.timed("perturb"), uninterrupted():
            if self.two_pass and not closing:
                update = update._replace(following=(self.plan(self.steps + 1)[0], self.radius))
            self.perturbation.commit(update, self.key(Role.ROUNDING, self.perturbation.written))
            self.steps += 1

    def forward(self, closure: Closure, losses: int = 1) -> Tensor:
        """One forward: the losses as a vector, in the RNG and buffer state of the step's first one."""
        with self.timed("forward"):
            self._forward_state.restore()
            with self._autocast.inside():
                value = self.perturbation.forward(closure)
        if not isinstance(value, (Tensor, int, float)):
            raise TypeError(f"closure: returned {type(value).__name__}; accepted: a scalar tensor or a float")
        loss = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        if loss.numel() != losses or loss.is_complex():
            accepted = "a real scalar loss" if losses == 1 else f"{losses} real losses, of the halves of the batch"
            raise ValueError(f"closure: returned {loss.dtype} of shape {tuple(loss.shape)}; accepted: {accepted}")
        if loss.dtype in (torch.float16, torch.bfloat16) and not self._warned_loss:
            self._warned_loss = True
            warnings.warn(
                f"closure: returned a {loss.dtype} loss, whose rounding is large beside the difference of two losses; "
                "reduce the loss in float32",
                stacklevel=4,
            )
        return loss.reshape(losses)

    def two_sided(self, direction: Direction, closure: Closure, radius: PerWeight | None = None) -> tuple[float, float]:
        """Losses at W + radius * direction and W - radius * direction.

        Raises NonFiniteLossError if one is not finite.
        """
        eps = radius or self.radius
        self.stand(direction, eps)
        if self.paired:
            plus, minus = self.forward(closure, losses=2)
            return self.finite(plus, "W + eps z"), self.finite(minus, "W - eps z")
        plus = self.forward(closure)
        self.stand(direction, lambda w: -eps(w))
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
        self.perturbation.begin(self.key(Role.ROUNDING, _MERGE))
        self._forward_state = ForwardState(self.model, {w.tensor.device for w in self.weights()})
        self._autocast = Autocast({w.tensor.device.type for w in self.weights()})
        try:
            with self._autocast.outside():
                return self.estimate_and_update(closure)
        except BaseException as error:
            with uninterrupted():
                self.perturbation.restore()
            self._forward_state.restore()
            if not isinstance(error, NonFiniteLossError) or self.on_nonfinite == "raise":
                raise
            self.skipped += 1
            self.steps += 1
            return math.nan
        finally:
            torch.clear_autocast_cache()
            del self._forward_state, self._autocast

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
        """As in PyTorch, with an entry "zo": contract version, method, seed, step and the method's state.

        Merges first: the weights of the model at this moment go with it.
        """
        self.merge()
        zo = {
            "contract_version": CONTRACT_VERSION,
            "method": type(self).__name__,
            "seed": self.seed,
            "steps": self.steps,
            "skipped": self.skipped,
            "tensor_ids": {w.name: w.id for w in self.weights()},
            "state": self.method_state(),
            "residual": None if self.perturbation.residual is None else self.perturbation.residual.planes,
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
        if (zo.get("residual") is not None) != self.residual:
            raise ValueError(
                f"residual: got {self.residual}; accepted: {not self.residual}, as in the optimizer whose state_dict "
                "this is"
            )
        self.check_method_state(zo["state"])
        self.merge()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "zo"})
        self._weights = None
        self.seed, self.steps, self.skipped = zo["seed"], zo["steps"], zo["skipped"]
        self._ahead = None
        self.perturbation.begin(self.key(Role.ROUNDING, _MERGE))
        if self.perturbation.residual is not None:
            self.perturbation.residual.load(zo["residual"])
        self.load_method_state(zo["state"])
