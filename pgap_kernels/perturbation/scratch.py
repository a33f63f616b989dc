"""Scratch: W + sum a z is written to one reused buffer right before a layer's forward; W itself is never touched.

    forward of a module:   buffer <- W + a z(key)   or   W + U (a Z) V^T,   the module runs on the buffer
    update:                W <- round_stochastic((1 - d) W - lr rho z), the only write

Keys, coefficients and cores lie in tensors that keep their place, so forwards can be compiled, or captured in a CUDA
graph and replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import checks
from ..ops._library import torch_ops
from .arena import Arena, room
from .base import Perturbation, Update, all_or_nothing
from .direction import Dense, Direction, PerWeight, Subspace, Weight
from .hooks import Hooks, Place, StrayUses, Use, tensors_in, uses_of
from .pairs import Halves

T = TypeVar("T")
CLEAN, DENSE, SUBSPACE = "clean", "dense", "subspace"


class Slot:
    """What the next forward sees in place of one weight."""

    def __init__(self, weight: Weight, key: Tensor, plus: Tensor, minus: Tensor) -> None:
        self.weight, self.id = weight, weight.id
        self.key, self.plus, self.minus = key, plus, minus
        self.kind = CLEAN
        self.stands = False  # in a direction of this step, rather than in what a window has gathered
        self.subspace: tuple[Tensor, Tensor, Tensor] | None = None  # U, V and a Z, in the same memory for every step
        self.no_keys = torch.zeros(3, dtype=torch.int64, device=key.device)
        self.none, self.one = torch.zeros_like(plus), torch.ones_like(plus)

    @property
    def tensor(self) -> Tensor:
        """W, wherever its data lies by now."""
        return self.weight.tensor

    def fill(self, out: Tensor, sign: int) -> None:
        """out <- W + sign * what is added to it."""
        if self.kind == DENSE:
            torch_ops.dense_perturb_.out(
                [self.tensor],
                keys=self.key,
                coefficients=self.plus if sign > 0 else self.minus,
                decay=self.none,
                stages=[1],
                tensor_ids=[self.id],
                out=[out],
            )
            return
        assert self.subspace is not None
        left, right, core = self.subspace
        coefficient = self.one if sign > 0 else -self.one
        torch_ops.lowrank_perturb_.out(
            [self.tensor],
            left=[left],
            right=[right],
            core=[core],
            keys=self.no_keys,
            coefficient=coefficient[0],
            decay=self.none[0],
            tensor_ids=[self.id],
            rank=left.shape[1],
            core_kind="full",
            out=[out],
        )


class Scratch(Perturbation):
    """Perturbs what modules run on.

    Args:
        weights: to perturb; every one belongs to a module of the model.
        model: whose forward the closure runs.
        allow_unused: accept forwards that do not call a weight's module.
        paired: a forward runs on a batch stacked twice; its second half sees the opposite direction.
    """

    mode: ClassVar[str] = "scratch"

    def __init__(
        self, weights: Sequence[Weight], model: nn.Module, *, allow_unused: bool = False, paired: bool = False
    ) -> None:
        self.model, self.allow_unused, self.paired = model, allow_unused, paired
        self.hooks: Hooks | None = None
        self.halves: list[Halves] = []
        super().__init__(weights)

    def adopt(self, weights: Sequence[Weight]) -> None:
        super().adopt(weights)
        self.uses = uses_of(self.model, self.weights)
        self.slots = self._slots()
        self.arena = Arena(self._capacity())
        self.active = self.captures = False
        self.rows = 0  # leading dimension of a stacked batch
        self.on_cuda = any(w.tensor.is_cuda for w in self.weights)
        self.frames: list[
            tuple[nn.Module, Callable[[], None]]
        ] = []  # modules that run, and how to clean up behind them
        self.calls: list[int] = []  # of each use in a forward
        self.replays: set[tuple] = set()  # of forwards that were captured in a CUDA graph
        self.verified = False
        self._unhook()
        self.hooks = Hooks(self.uses, self)
        self.halves = [Halves(self, use) for use in self.uses] if self.paired else []

    def _slots(self) -> list[Slot]:
        rows: dict[torch.device, list[int]] = {}
        for number, w in enumerate(self.weights):
            rows.setdefault(w.tensor.device, []).append(number)
        self.tables = []
        slots: dict[int, Slot] = {}
        for device, numbers in rows.items():
            keys = torch.zeros(len(numbers), dtype=torch.int64, device=device)
            plus, minus = torch.zeros(2, len(numbers), 1, 1, dtype=torch.float32, device=device)
            self.tables.append((numbers, keys, plus, minus))
            for i, number in enumerate(numbers):
                slots[number] = Slot(self.weights[number], keys[i : i + 1], plus[i], minus[i])
        return [slots[number] for number in range(len(self.weights))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "slots": [], "tables": [], "replays": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy shares no memory with what it was made from, and its tables and slots do with each other."""
        self.__dict__.update(state)
        self.slots = self._slots()
        self.stand([], lambda _: 0.0)

    def begin(self, merge_key: int) -> None:
        super().begin(merge_key)
        for use in self.uses:
            for place in use.places:
                parameter, slot = use.module._parameters.get(place.name), self.slots[place.weight]
                if parameter is not place.parameter or slot.key.device != parameter.device:
                    raise RuntimeError(
                        f"model: {slot.weight.name!r} is another tensor, or on another device, than when the optimizer "
                        "was made; accepted: the same Parameter objects where they were (load_state_dict without "
                        "assign=True). Make a new optimizer for new parameters"
                    )

    def _capacity(self) -> dict[torch.device, int]:
        """The most that a module and those around it need at one time: mostly the largest layer."""
        own = {use.name: use for use in self.uses}
        capacity: dict[torch.device, int] = {}
        for use in self.uses:
            around = [use.name[:i] for i, c in enumerate(use.name) if c == "."] + ([""] if use.name else [])
            needed: dict[torch.device, int] = {}
            for name in [*around, use.name]:
                for place in own[name].places if name in own else ():
                    tensor = self.slots[place.weight].tensor
                    needed[tensor.device] = needed.get(tensor.device, 0) + room(tensor)
            for device, size in needed.items():
                capacity[device] = max(capacity.get(device, 0), size)
        return capacity

    @property
    def scratch_bytes(self) -> int:
        return sum(self.arena.capacity.values())

    def spare(self, elements: int, device: torch.device) -> Tensor:
        idle = self.arena.idle(elements, device)
        return super().spare(elements, device) if idle is None else idle

    # ---- where the forwards stand -----------------------------------------------------------------------------------

    def stand(self, direction: Direction, amount: PerWeight) -> None:
        number_of = {id(w.tensor): number for number, w in enumerate(self.weights)}
        keys, coefficients = [0] * len(self.weights), [0.0] * len(self.weights)
        for slot in self.slots:
            slot.kind = CLEAN
        for part in direction:
            values = part.amounts(amount)
            slots = [self.slots[number_of[id(t)]] for t in part.tensors]
            if isinstance(part, Subspace):
                self._stand_in_subspace(part, slots, values)
                continue
            assert isinstance(part, Dense)
            bits = checks.key_bits("key", part.key)
            assert isinstance(bits, int)
            for slot, tensor, value in zip(slots, part.tensors, values, strict=True):
                slot.kind = DENSE
                number = number_of[id(tensor)]
                keys[number], coefficients[number] = bits, value
        for numbers, keys_there, plus, minus in self.tables:
            keys_there.copy_(torch.tensor([keys[n] for n in numbers], dtype=torch.int64))
            plus.copy_(torch.tensor([coefficients[n] for n in numbers], dtype=torch.float32).view(-1, 1, 1))
            torch.neg(plus, out=minus)

    def _stand_in_subspace(self, part: Subspace, slots: list[Slot], values: list[float]) -> None:
        for slot, left, right in zip(slots, part.left, part.right, strict=True):
            slot.kind, slot.stands = SUBSPACE, True
            if slot.subspace is None or slot.subspace[0] is not left:
                slot.subspace = (left, right, torch.empty(left.shape[1], left.shape[1], device=left.device))
        cores = [slot.subspace[2] for slot in slots if slot.subspace is not None]
        torch._foreach_copy_(cores, torch._foreach_mul(part.cores, values))

    @property
    def graph_key(self) -> tuple:
        """Forwards with equal keys may replay each other's CUDA graph."""
        return tuple(slot.kind for slot in self.slots)

    # ---- a forward --------------------------------------------------------------------------------------------------

    def forward(self, call: Callable[[], T]) -> T:
        self.calls = [0] * len(self.uses)
        self.active, self.captures, self.rows = True, False, 0
        try:
            if self.verified or self._compiled():
                result, self.verified = call(), True
            else:
                with StrayUses(self.weights, self._readable):
                    result = call()
                self.verified = True
        finally:
            self.active = False
            self._unwind()
            for use, times in zip(self.uses, self.calls, strict=True):
                filled = [self.weights[p.weight] for p in use.places if self.fills(p)] if times else []
                self.count(filled * times * (2 if self.paired else 1))
        if self.captures:
            self.replays.add(self.graph_key)
        self._check_called()
        return result

    def _compiled(self) -> bool:
        """Torch's own tracing and the search for stray uses do not go together."""
        return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in self.model.modules())

    def _readable(self) -> set[int]:
        """Memory of the weights that may be read now: of modules that run, unless they run on the buffer."""
        running = [module for module, _ in self.frames]
        return {
            self.slots[place.weight].tensor.data_ptr()
            for use in self.uses
            if any(module is use.module for module in running)
            for place in use.places
            if not self.fills(place)
        }

    def _check_called(self) -> None:
        if self.allow_unused or all(self.calls):
            return
        if not any(self.calls) and self.graph_key in self.replays:
            return
        reached = {
            place.weight for use, times in zip(self.uses, self.calls, strict=True) if times for place in use.places
        }
        missed = [w.name for n, w in enumerate(self.weights) if n not in reached and self.slots[n].kind != CLEAN]
        if missed:
            what = f"{missed[0]!r} was" if len(missed) == 1 else f"{missed[0]!r} and {len(missed) - 1} others were"
            raise RuntimeError(
                f"closure: {what} not perturbed, as the forward did not call the module (it may use the weight by "
                "another way, like MultiheadAttention its out_proj, or the model was compiled before the optimizer was "
                "made). Freeze such parameters, choose mode='inplace', or pass allow_unused=True if the forward "
                "rightly never uses them"
            )

    def fills(self, place: Place) -> bool:
        """Whether a module's parameter is replaced by the buffer now."""
        return self.slots[place.weight].kind != CLEAN

    def fill(self, place: Place, out: Tensor, sign: int) -> None:
        """out <- what the module runs on in place of its parameter."""
        self.slots[place.weight].fill(out, sign)

    def enter(self, number: int) -> None:
        """Before a module's forward: it gets perturbed parameters."""
        if not self.active:
            return
        use = self.uses[number]
        if torch.compiler.is_compiling():
            if self.paired:
                raise RuntimeError("paired: got True with torch.compile; accepted: models that are not compiled")
            self.calls[number] = 1
            for place in use.places:
                if self.fills(place):
                    like = self.slots[place.weight].tensor
                    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
                    self.fill(place, out, 1)
                    use.module._parameters[place.name] = out  # type: ignore[assignment]
            return
        self.calls[number] += 1
        if self.on_cuda and torch.cuda.is_current_stream_capturing():
            self.captures = True
        # A pair is filled by its halves.
        self.push(use.module, [] if self.paired else [place for place in use.places if self.fills(place)], 1)

    def push(self, module: nn.Module, places: Sequence[Place], sign: int) -> None:
        """A module gets perturbed parameters, until ``pop``."""
        begin = time.perf_counter()
        taken: list[Place] = []

        def undo() -> None:
            for place in reversed(taken):
                module._parameters[place.name] = place.parameter
                self.arena.give_back(place.parameter)

        self.frames.append((module, undo))
        for place in places:
            out = self.arena.take(place.parameter)
            taken.append(place)
            module._parameters[place.name] = out  # type: ignore[assignment]
            self.fill(place, out, sign)
        self.seconds += time.perf_counter() - begin

    def pop(self) -> None:
        """Take back the last ``push``."""
        _, undo = self.frames.pop()
        undo()

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a module's forward: it has its own parameters back."""
        if not self.active:
            return None
        if torch.compiler.is_compiling():
            self._restore(self.uses[number])
            return None
        kept = self.kept(output)
        self.pop()
        return kept

    def kept(self, output: Any) -> Any:
        """The output, if it lies in the buffer as a copy that will not be overwritten; None: as it is."""
        if not any(self.arena.holds(t) for t in tensors_in(output)):
            return None
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone() if self.arena.holds(t) else t, output)

    @staticmethod
    def _restore(use: Use) -> None:
        for place in use.places:
            use.module._parameters[place.name] = place.parameter

    def _unwind(self) -> None:
        """Give every module its parameters back, wherever a forward stopped."""
        while self.frames:
            self.pop()
        for use in self.uses:  # of a compiled forward
            if any(use.module._parameters[place.name] is not place.parameter for place in use.places):
                self._restore(use)

    # ---- updates ----------------------------------------------------------------------------------------------------

    def commit(self, update: Update, rounding_key: int) -> None:
        landings = (self.landing(terms, decay, rounding_key) for terms, decay in update.by_part())
        all_or_nothing([write for writes in landings for write in writes], self.largest)
        self.written += 1
        self.stand([], lambda _: 0.0)

    def restore(self) -> None:
        self.stand([], lambda _: 0.0)

    def release(self) -> None:
        super().release()
        self._unhook()

    def _unhook(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
        for halves in self.halves:
            halves.remove()
        self.halves = []
