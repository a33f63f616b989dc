"""The path that a whole tile takes through compiled code, and how often its loops run.

    path = common_path(code, Work(weights=32, read=512, written=512))
    path.slots, path.mma, path.load_bits, path.store_bits

The path is found on the graph of basic blocks with the back edges of loops taken out. Among all ways from the entry to
an exit it is the one that, in this order of importance,

    1. goes through the most loops that work on weights (each body once);
    2. moves the most bytes by wide global loads and stores, so early exits lose. Wide is the widest access at which the
       path moves all weights;
    3. has the fewest narrower stores (in a kernel that writes no weights, loads): masked tails lose;
    4. does the most floating point in blocks that do it for at least half of a tile's weights: a decay that is behind a
       branch counts, the rare cases of sqrt, cos and sin, which are handled one by one, do not;
    5. has the fewest instructions.

A loop works on weights if it has a wide access, a tensor-core instruction, or floating point as in 4. Not if it goes on
until no lane is left (s_cbranch_execnz: over the addresses that the lanes of a wave have, here one), nor if all that it
writes is narrow: that is the loop of a masked tail, with the loops in it. Every instruction on the path is one issue
slot, predicated ones too. What cannot be followed, or does not agree with what was said of the kernel, is an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tools.compiled.disassembly import Code, Instruction

JUMPS = ("branch", "exit", "return")

# ---- blocks and loops -----------------------------------------------------------------------------------------------


@dataclass
class Block:
    begin: int
    end: int
    successors: list[int] = field(default_factory=list)  # by number of block
    exits: bool = False  # a thread may end here


@dataclass(frozen=True)
class Loop:
    header: int
    latches: frozenset[int]
    body: frozenset[int]


def blocks(code: Code) -> list[Block]:
    """The basic blocks in the order of the code; labels that nothing jumps to (of debuggers) do not divide one."""
    starts = {code.entry, *(code.labels[x.target] for x in code.instructions if x.target in code.labels)}
    starts |= {i + 1 for i, x in enumerate(code.instructions) if x.kind in JUMPS}
    bounds = sorted(s for s in starts if s < len(code.instructions))
    found = [Block(a, b) for a, b in zip(bounds, [*bounds[1:], len(code.instructions)], strict=True)]
    number = {block.begin: i for i, block in enumerate(found)}
    for i, block in enumerate(found):
        last = code.instructions[block.end - 1]
        if last.kind == "branch":
            block.successors.append(number[code.labels[last.target]])
        block.exits = last.kind in ("exit", "return")
        if not (last.kind in JUMPS and last.always) and i + 1 < len(found) and i + 1 not in block.successors:
            block.successors.append(i + 1)
    return found


def _search(start: int, successors: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Depth first: the blocks in postorder, and the edges that lead back to a block still open."""
    order: list[int] = []
    back: list[tuple[int, int]] = []
    state = {start: "open"}
    stack = [(start, iter(successors[start]))]
    while stack:
        node, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            state[node] = "done"
            order.append(node)
            stack.pop()
        elif following not in state:
            state[following] = "open"
            stack.append((following, iter(successors[following])))
        elif state[following] == "open":
            back.append((node, following))
    return order, back


def loops(found: list[Block], start: int) -> list[Loop]:
    """Natural loops in the order of their headers; loops with one header are one."""
    successors = [block.successors for block in found]
    order, back = _search(start, successors)
    before: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in successors[i]:
            before[j].append(i)
    result = []
    for header in sorted({h for _, h in back}):
        latches = {latch for latch, h in back if h == header}
        body, queue = {header}, [x for x in latches if x != header]
        while queue:
            node = queue.pop()
            if node not in body:
                body.add(node)
                queue += before[node]
        result.append(Loop(header, frozenset(latches), frozenset(body)))
    return result


# ---- the path -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one thread of a kernel does."""

    weights: float  # in a tile
    read: int = 0  # bits of weights, in all tiles
    written: int = 0
    loops: tuple[int, ...] = ()  # times that each loop over weights runs, in the order of the code
    fixed: int = 0  # the first of those that cannot be unrolled or peeled; the others run a known number of times


@dataclass(frozen=True)
class CommonPath:
    """Instructions of a path, each with its cost in slots and the numbers of the loops over weights around it."""

    instructions: list[Instruction]
    costs: list[int]
    inside: list[tuple[int, ...]]
    times: tuple[int, ...]  # that each of those loops runs
    load_bits: int  # width of the narrowest access that it takes to read the weights; 0: not read
    store_bits: int

    @property
    def repeats(self) -> list[int]:
        """How often each instruction is issued."""
        return [math.prod(self.times[loop] for loop in inside) for inside in self.inside]

    @property
    def slots(self) -> int:
        return sum(cost * repeat for cost, repeat in zip(self.costs, self.repeats, strict=True))

    @property
    def mma(self) -> int:
        """Tensor-core instructions, those in loops once."""
        return sum(x.mma for x in self.instructions)

    def loaded(self, width: int) -> int:
        """Bits read by loads of that width or more."""
        return sum(x.load * r for x, r in zip(self.instructions, self.repeats, strict=True) if x.load >= width)

    def stored(self, width: int) -> int:
        return sum(x.store * r for x, r in zip(self.instructions, self.repeats, strict=True) if x.store >= width)

    def listing(self) -> str:
        """How often each operation comes, how many come from each line, every instruction; loops are indented."""
        words = (x.text.split() for x in self.instructions)
        operations = Counter((word[1] if word[0].startswith("@") else word[0]).split(".")[0] for word in words)
        sources = Counter(x.places[0] if x.places else "" for x in self.instructions)
        lines = [f"{count:6} {name}" for counts in (operations, sources) for name, count in counts.most_common()]
        for x, around in zip(self.instructions, self.inside, strict=True):
            lines.append(f"{x.places[0] if x.places else '':20}{'    ' * len(around)}{x.text}")
        return "\n".join(lines)


def common_path(code: Code, work: Work) -> CommonPath:
    """See the top of the file."""
    calls: dict[str, int] = {}
    for x in code.instructions:
        if x.kind == "call" and x.target not in calls:
            if x.target not in code.labels:
                raise ValueError(f"cannot follow {x.text!r}")
            calls[x.target] = 1 + _path(code, code.labels[x.target], float("inf"), 0, 0, {}).slots
    loads = _widths([x.load for x in code.instructions], work.read)
    stores = _widths([x.store for x in code.instructions], work.written)
    while True:
        path = _timed(_path(code, code.entry, work.weights, loads[0], stores[0], calls), work)
        if stores[0] and path.stored(stores[0]) < work.written:
            stores.pop(0)
        elif loads[0] and path.loaded(loads[0]) < work.read:
            loads.pop(0)
        else:
            break
    if not work.fixed <= len(path.times) <= len(work.loops):
        raise ValueError(f"the path has {len(path.times)} loops over weights, {len(work.loops)} are expected")
    if any(0 < x.store < path.store_bits for x in path.instructions):
        raise ValueError(f"the path has stores of less than {path.store_bits} bits too")
    return path


def _widths(found: list[int], moved: int) -> list[int]:
    """Widths of accesses to try, the widest first; 0: none is sought."""
    return [*sorted({x for x in found if x}, reverse=True), 0] if moved else [0]


def _timed(path: CommonPath, work: Work) -> CommonPath:
    """The path with the times of its loops; for one unrolled or peeled they follow from what is moved in all."""
    times = [*work.loops, *[1] * len(path.times)][: len(path.times)]
    moved, width, total = CommonPath.loaded, path.load_bits, work.read
    if path.store_bits:
        moved, width, total = CommonPath.stored, path.store_bits, work.written
    for loop in range(work.fixed, min(len(times), len(work.loops))):
        none, once = (replace(path, times=(*times[:loop], n, *times[loop + 1 :])) for n in (0, 1))
        outside, each = moved(none, width), moved(once, width) - moved(none, width)
        if width and each and (total - outside) % each == 0 and 0 < (total - outside) // each < times[loop]:
            times[loop] = (total - outside) // each
    return replace(path, times=tuple(times))


def _path(code: Code, entry: int, weights: float, load: int, store: int, calls: dict[str, int]) -> CommonPath:
    """The path from an instruction; accesses from those widths on are sought, a call costs what ``calls`` says."""
    found = blocks(code)
    first = next(i for i, block in enumerate(found) if block.begin == entry)

    def inside(i: int) -> list[Instruction]:
        return code.instructions[found[i].begin : found[i].end]

    def moved(i: int) -> int:
        loaded = sum(x.load for x in inside(i) if load and x.load >= load)
        return loaded + sum(x.store for x in inside(i) if store and x.store >= store)

    def narrow(i: int) -> int:
        return sum(0 < x.store < store if store else 0 < x.load < load for x in inside(i))

    every = loops(found, first)
    tails = {i for loop in every if _is_tail(code, [found[i] for i in loop.body], load, store) for i in loop.body}

    def floating(i: int) -> int:
        count = sum(x.arithmetic for x in inside(i))
        return count if 2 * count >= weights and i not in tails else 0

    working = [
        loop
        for loop in every
        if loop.header not in tails
        and not any(code.instructions[found[i].end - 1].text.startswith("s_cbranch_execnz") for i in loop.latches)
        and (
            any(moved(i) or any(x.mma for x in inside(i)) for i in loop.body)
            or 2 * sum(x.arithmetic for i in loop.body for x in inside(i)) >= weights
        )
    ]
    successors = _without_back_edges(found, every)
    latches = {latch for loop in working for latch in loop.latches}
    costs = [[calls.get(x.target, 1) if x.kind == "call" else 1 for x in inside(i)] for i in range(len(found))]
    best: dict[int, tuple[tuple[int, ...], int | None]] = {}
    for i in _search(first, successors)[0]:
        ways = [(best[j][0], j) for j in successors[i] if j in best]
        if found[i].exits:
            ways.append(((0, 0, 0, 0, 0), -1))
        if ways:
            value, following = max(ways)
            own = (i in latches, moved(i), -narrow(i), floating(i), -sum(costs[i]))
            best[i] = tuple(a + b for a, b in zip(own, value, strict=True)), following if following >= 0 else None
    if first not in best:
        raise ValueError("no way from the entry to an exit")
    taken: list[int] = []
    node: int | None = first
    while node is not None:
        taken.append(node)
        node = best[node][1]
    around = {i: tuple(n for n, loop in enumerate(working) if i in loop.body) for i in taken}
    return CommonPath(
        [x for i in taken for x in inside(i)],
        [cost for i in taken for cost in costs[i]],
        [around[i] for i in taken for _ in inside(i)],
        (1,) * len(working),
        load,
        store,
    )


def _is_tail(code: Code, body: list[Block], load: int, store: int) -> bool:
    """Whether a loop writes (in a kernel that writes nothing, reads) weights, but none of them widely."""
    instructions = [x for block in body for x in code.instructions[block.begin : block.end]]
    moved = [x.store for x in instructions if x.store] if store else [x.load for x in instructions if x.load]
    return bool(moved) and max(moved) < (store or load)


def _without_back_edges(found: list[Block], every: list[Loop]) -> list[list[int]]:
    """Successors with every loop left at its end; where only its head leaves it, the end leads where the head does."""
    successors = [list(block.successors) for block in found]
    for loop in every:
        leaves = [j for i in sorted(loop.body) for j in found[i].successors if j not in loop.body]
        for latch in loop.latches:
            successors[latch].remove(loop.header)
            if not successors[latch]:
                successors[latch] = list(leaves)
    return successors
