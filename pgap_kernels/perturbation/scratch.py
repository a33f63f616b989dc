"""Scratch: W + point is written to one reused buffer right before a layer's forward; only updates write W.

    forward of a module:   buffer <- W + c z(key)   or   W + A C B^T,   the module runs on the buffer
    update:                W <- round_stochastic((1 - d) W - lr rho z)

Keys, coefficients and cores are in tensors at fixed addresses, so that forwards can be compiled, or captured in a CUDA
graph and replayed.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..directions import Direction, Weight
from .arena import Arena, padded_bytes
from .base import Perturbation, Update
from .compiled import is_any_compiled, is_called_compiled, uncompiled
from .hooks import Hooks, ModuleUse, ParamRef, StrayUses, clients_of, tensors_in, uses_of
from .points import LoadedPart, Points
from .stacked import StackedForward, forward_of, runs_of
from .step_context import outside_ambient_state, uninterrupted
from .vectors import Vectors

T = TypeVar("T")


def _nothing() -> None:
    """Undoes a push that filled no parameters."""


class Scratch(Perturbation):
    """Lets modules run on perturbed copies of their parameters.

    Args:
        weights: to perturb; every one is used by a module of the model.
        model: whose forward the closure runs.
        allow_unused: accept forwards that do not call the modules of some weights.
    """

    mode: ClassVar[str] = "scratch"

    def __init__(self, weights: Sequence[Weight], model: nn.Module, *, allow_unused: bool = False) -> None:
        self.model, self.allow_unused = model, allow_unused
        self.hooks: Hooks | None = None
        self.stacked: list[StackedForward] = []
        super().__init__(weights)

    def set_weights(self, weights: Sequence[Weight]) -> None:
        super().set_weights(weights)
        self._unhook()
        self.uses = uses_of(self.model, self.weights)
        self.biased = [use.module for use in self.uses if any(ref.name == "bias" for ref in use.refs)]
        self.vectors = Vectors(self.weights)
        self.arena = Arena(self._capacity())
        self.active = False
        self.searching = False  # the forward is being searched for stray uses
        self.captures = False  # the forward is being captured in a CUDA graph
        self.recompiled = False  # compiled code has been dropped once, as it knew no hooks
        self.rows, self.count = 0, 1  # of a stacked batch: its rows, 0 before a module has seen it, and its points
        self.slicing = ""  # the module that runs on one of its slices after the other now
        self.runs = [range(1)]  # of neighbouring points that are the same
        self.most_runs = 1  # of a forward so far
        self.modules = list(self.model.modules())
        # These of torch leave their fast paths where a search looks on.
        fast = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
        self.has_fast_paths = any(isinstance(module, fast) for module in self.modules)
        # A stack: the uses whose forwards are running, each with what gives the module its parameters back.
        self.frames: list[tuple[int, Callable[[], None]]] = []
        self.lent: Counter[int] = Counter()  # ids of the tensors that stand in for parameters now: how many times
        self.source: set[int] = set()  # address of the parameter that is being read to fill the buffer, if any
        self.calls: list[int] = []  # of each use's module, in the last forward
        self.replays: set[Hashable] = set()  # graph keys of forwards that were captured in a CUDA graph
        self.checked: set[Hashable] = set()  # training flags under which stray uses were looked for
        self.points = Points(len(self.weights))
        self._make_tables()
        self.restore()
        self.hooks = Hooks(self.model, self.uses, self)
        self.forwards = [forward_of(use.module) for use in self.uses]

    def is_current(self) -> bool:
        if self.hooks is None:  # released: a step will say so
            return True
        now = [forward_of(use.module) for use in self.uses]
        return now == self.forwards and self.hooks.come_first() and all(s.is_in_place() for s in self.stacked)

    def __getstate__(self) -> dict[str, Any]:
        # Without operands, and without the captured graphs that read them.
        return {**self.__dict__, "points": copy.copy(self.points), "replays": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy shares no device memory with what it was made from."""
        self.__dict__.update(state)
        with outside_ambient_state():
            self._make_tables()
            self.restore()

    def _make_tables(self) -> None:
        """Allocate the scalars that fills read on the device."""
        devices = {w.tensor.device for w in self.weights}
        self.no_decay = {d: torch.zeros(1, 1, dtype=torch.float32, device=d) for d in devices}

    def _capacity(self) -> dict[torch.device, int]:
        """Bytes of the buffer: the most that a module and those around it need together; usually the largest layer."""
        use_of = {use.name: use for use in self.uses}
        capacity: dict[torch.device, int] = {}
        for use in self.uses:
            around = [use.name[:i] for i, c in enumerate(use.name) if c == "."] + ([""] if use.name else [])
            needed: dict[torch.device, int] = {}
            for name in [*around, use.name]:
                for ref in use_of[name].refs if name in use_of else ():
                    if self._is_early(ref):
                        continue
                    tensor = self.weights[ref.index].tensor
                    needed[tensor.device] = needed.get(tensor.device, 0) + padded_bytes(tensor)
            for device, size in needed.items():
                capacity[device] = max(capacity.get(device, 0), size)
        return capacity

    @property
    def scratch_bytes(self) -> int:
        return sum(self.arena.capacity.values()) + self.vectors.nbytes * self.most_runs

    @property
    def state_bytes(self) -> int:
        return self.points.nbytes

    def workspace(self, elements: int, device: torch.device) -> Tensor:
        # A dry copy has no buffer to lend; where a real one would do, the memory does not count as extra.
        if self.dry and max(self.arena.capacity.values()) >= 4 * elements:
            return torch.empty(elements, dtype=torch.float32, device=device)
        idle = self.arena.borrow(elements, device)
        return super().workspace(elements, device) if idle is None else idle

    def drop_cached(self) -> None:
        self.points.clear()
        self.checked = set()
        self._make_tables()
        self.restore()

    # ---- the points of the next forwards ----------------------------------------------------------------------------

    def begin(self, merge_key: int) -> None:
        super().begin(merge_key)
        # Another optimizer's fading window scales its layers' outputs, but for the biases, which it takes to be the
        # model's: ours are others in a forward.
        for client in clients_of(self.biased):
            if client is not self and client.fades:
                client.merge()

    def perturb_to(self, points: Sequence[Direction]) -> None:
        self.points.show(points)
        self.count, self.runs = len(points), runs_of(points)
        self.most_runs = max(self.most_runs, len(self.runs))
        self.filled = self.points.remembered("filled", self._filled)  # it is read before every layer
        if not self.dry:
            early = {ref.index for refs in self.filled for ref in refs if self._is_early(ref)}
            moved = [self.weights[index] for index in sorted(early)]
            for number, run in enumerate(self.runs):
                self.vectors.fill(number, moved, {i: self.fills_of(i, run.start) for i in early}, self.no_decay)
        if self.count > 1 and not self.stacked and not self.dry:
            self.stacked = [StackedForward(self, use) for use in self.uses]

    def _filled(self) -> list[list[ParamRef]]:
        """Of each use the parameters that are filled at some point."""
        filled = {w.index for w in self.weights if any(self.fills_of(w.index, point) for point in range(self.count))}
        return [[ref for ref in use.refs if ref.index in filled] for use in self.uses]

    @property
    def has_graphs(self) -> bool:
        return bool(self.replays)

    @property
    def graph_key(self) -> Hashable:
        return self.points.key, *self.runs

    def fills_of(self, index: int, point: int) -> list[LoadedPart]:
        """What is added to a weight by filling the buffer."""
        return self.points.added(index, point)

    def refs_to_fill(self, use: ModuleUse) -> list[ParamRef]:
        """The parameters that a module's forward finds replaced by the buffer."""
        return self.filled[use.number]

    def at_points(self, index: int) -> list[Tensor]:
        """The copy of a vector at each point."""
        return [self.vectors.at(index, number) for number, run in enumerate(self.runs) for _ in run]

    def decay_of(self, index: int) -> Tensor:
        """The share of a weight that a fill leaves out, (1, 1): none here, 1 - s in mode folded."""
        return self.no_decay[self.weights[index].tensor.device]

    # ---- a forward --------------------------------------------------------------------------------------------------

    def forward(self, call: Callable[[], T]) -> T:
        self.calls = [1 if self.dry else 0] * len(self.uses)
        self.active, self.captures, self.rows, self.slicing = True, False, 0, ""
        self.must_repeat, self.source = False, set()
        watched = self.watched
        training = tuple([module.training for module in self.modules])
        try:
            if training in self.checked or self.dry or is_any_compiled(self.modules):  # torch cannot trace the search
                result = call()
            else:  # the first forward with these flags: it may take other branches, with stray uses
                # A compiled function around the model runs uncompiled meanwhile.
                self.searching = self.watched = True
                self.must_repeat = self.has_fast_paths
                with StrayUses(self.weights, self._readable, self.arena.is_stale), uncompiled():
                    result = call()
            self.checked.add(training)
        finally:
            self.active = self.searching = False
            self.watched = watched
            with uninterrupted():
                self._unwind()
            for use, times in zip(self.uses, self.calls, strict=True):
                if times:
                    filled = [self.weights[ref.index] for ref in self.refs_to_fill(use)]
                    self.count_passes(filled, times * len(self.runs))
        if self.captures:
            self.replays.add(self.graph_key)
            self.keep_captured()
        if not self.recompiled and self._missed():
            # Perhaps compiled code without hooks has run, of some of these modules or of others of their class: torch
            # does not see that hooks have come.
            torch.compiler.reset()
            self.must_repeat = self.recompiled = True
            return result
        self._check_called()
        return result

    def keep_captured(self) -> None:
        """Keep what a captured forward reads."""
        self.points.keep_captured()

    def _readable(self) -> set[int]:
        """Addresses of the weights that may be read now.

        They are those of running modules that the buffer does not replace, and the one that it is being filled from.
        """
        return self.source | {
            ref.parameter.data_ptr()
            for number, _ in self.frames
            for ref in self.uses[number].refs
            if not any(self.fills_of(ref.index, point) for point in range(self.count))
        }

    def _missed(self) -> list[str]:
        """The weights that move and that no module has used."""
        if all(self.calls) or (not any(self.calls) and self.graph_key in self.replays):  # a replay calls no modules
            return []
        reached = {ref.index for use, times in zip(self.uses, self.calls, strict=True) if times for ref in use.refs}
        return [w.name for w in self.weights if w.index not in reached and self.points.moves(w.index)]

    def _check_called(self) -> None:
        missed = [] if self.allow_unused else self._missed()
        if missed:
            what = f"{missed[0]!r} was" if len(missed) == 1 else f"{missed[0]!r} and {len(missed) - 1} more were"
            raise RuntimeError(
                f"closure: {what} not perturbed, as the forward did not call the module (it may use the weight "
                "without calling it, as MultiheadAttention does with out_proj, or an adapter may be merged or switched "
                "off). Freeze such parameters, choose mode='inplace', or pass allow_unused=True if the forward is "
                "meant not to use them"
            )

    def enter(self, number: int) -> None:
        """Before a module's forward: replace its parameters by perturbed ones."""
        if not self.active:
            return
        use = self.uses[number]
        if torch.compiler.is_compiling():
            if self.count > 1:
                raise RuntimeError(
                    f"members: got {self.count} points in one forward of a compiled model; accepted: one, or models "
                    "without torch.compile"
                )
            self.calls[number] = 1
            for ref in self.refs_to_fill(use):
                # Not from the arena: compiled code plans its own memory.
                out = torch.empty(ref.parameter.shape, dtype=ref.parameter.dtype, device=ref.parameter.device)
                self.fill(ref, out, 0)
                ref.owner._parameters[ref.name] = out  # type: ignore[assignment]
            return
        if self.searching and not any(self.calls):
            # As the next ones will run compiled, and may round differently.
            self.must_repeat = self.must_repeat or is_called_compiled()
        for ref in use.refs:
            if not ref.is_in_place() and not self.lent[id(ref.owner._parameters.get(ref.name))]:
                raise RuntimeError(
                    f"closure: {self.weights[ref.index].name!r} was replaced for this forward (by functional_call or a "
                    "parametrization), so it would not be perturbed; accepted: forwards on the model's own parameters. "
                    "Choose mode='inplace' if the loss depends on the weights all the same"
                )
        self.calls[number] += 1
        if self.on_cuda and torch.cuda.is_current_stream_capturing():
            self.captures = True
        # With several points nothing is filled yet: the module's forward is a StackedForward, which fills for each.
        self._push(number, [] if self.count > 1 else self.refs_to_fill(use), 0)

    def push(self, use: ModuleUse, refs: Sequence[ParamRef], run: int) -> None:
        """Replace parameters of a module by those at the point of one of several runs, until ``pop``."""
        self._push(use.number, refs, run)

    def _push(self, number: int, refs: Sequence[ParamRef], run: int) -> None:
        if not refs:  # most layers in mode "folded"
            self.frames.append((number, _nothing))
            return
        begin = time.perf_counter()
        taken: list[tuple[ParamRef, Tensor, Any]] = []

        def undo() -> None:
            for ref, out, before in reversed(taken):
                ref.owner._parameters[ref.name] = before  # not the parameter if the module runs inside itself
                self.lent[id(out)] -= 1
                if not self._is_early(ref):
                    self.arena.give_back(ref.parameter)

        self.frames.append((number, undo))
        for ref in refs:
            early = self._is_early(ref)
            out = self.vectors.at(ref.index, run) if early else self.arena.take(ref.parameter)
            taken.append((ref, out, ref.owner._parameters[ref.name]))
            self.lent[id(out)] += 1
            ref.owner._parameters[ref.name] = out  # type: ignore[assignment]
            if not early:
                self.source = {ref.parameter.data_ptr()}
                self.fill(ref, out, self.runs[run].start)
        self.source = set()
        self.seconds += time.perf_counter() - begin

    def pop(self) -> None:
        """Undo the last push."""
        _, undo = self.frames.pop()
        undo()

    def _is_early(self, ref: ParamRef) -> bool:
        """Whether a parameter's copy was filled when the point was shown."""
        return ref.index in self.vectors.places

    def _lends(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that will be overwritten."""
        return self.arena.contains(tensor) or self.vectors.contains(tensor)

    def fill(self, ref: ParamRef, out: Tensor, point: int) -> None:
        """out <- W + what is added to it at a point."""
        source, decay = ref.parameter, self.decay_of(ref.index)
        for loaded in self.fills_of(ref.index, point):  # the first part reads W, the others add to what is there
            loaded.operands.fill(loaded.position, source, out, decay)
            source, decay = out, self.no_decay[out.device]  # type: ignore[assignment]
        if source is not out:  # nothing is added
            out.copy_(source)
            if self.fades:
                out.mul_(1 - decay.reshape([1] * out.dim()))
        row = self.weights[ref.index].padding_row
        if row is not None:
            out[row] = ref.parameter[row]

    def leave(self, number: int, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a module's forward: give it its own parameters back. Returns an output that replaces the module's."""
        if not self.active:
            return None
        if torch.compiler.is_compiling():
            for ref in self.uses[number].refs:
                ref.put_back()
            return None
        copy = self.detached_output(output)
        self.pop()
        return copy

    def detached_output(self, output: Any) -> Any:
        """A copy of an output that lies in the buffer, which will be overwritten; None if it does not."""
        if isinstance(output, Tensor):
            return output.clone() if self._lends(output) else None
        if not any(map(self._lends, tensors_in(output))):
            return None
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone() if self._lends(t) else t, output)

    def _unwind(self) -> None:
        """Give every module its parameters back, even if a forward stopped half way."""
        while self.frames:
            self.pop()
        for use in self.uses:  # compiled forwards push nothing, and may have stopped before ``leave``
            for ref in use.refs:
                if not isinstance(ref.owner._parameters.get(ref.name), nn.Parameter):
                    ref.put_back()

    # ---- updates ----------------------------------------------------------------------------------------------------

    def apply(self, update: Update) -> None:
        self.run_all(update.passes(), copy_budget=self.largest)
        self.passes_this_step += 1 + len(update.direction.parts)  # beyond the rounding keys that these have used
        self.restore()

    def release(self, why: str = "the optimizer was detached from its model") -> None:
        super().release(why)
        self._unhook()

    def _unhook(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
        for stacked in self.stacked:
            stacked.remove()
        self.stacked = []
