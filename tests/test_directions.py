"""Directions as vectors, passes as values: sums, inverses, shards, padding rows, several points, observers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from naive.common import descend, two_sided
from support.bounds import UNIT
from support.contract import PASS, Contract, build
from support.counted import Counted
from support.helpers import DTYPES, assert_same_bits, clones, weights
from support.methods import METHODS, Row, Step, options_of
from support.models import IDS, TARGET, Layers, Losses, Words, loss_at, snapshot
from support.selection import cycled
from torch import Tensor, nn

from pgap_kernels import noise, ops
from pgap_kernels.directions import (
    Anchored,
    Direction,
    Factor,
    LowRank,
    Mask,
    Noise,
    Pass,
    RulePass,
    Term,
    Weight,
    bucket,
    run_all_or_none,
)
from pgap_kernels.directions.lowrank import concatenated
from pgap_kernels.noise import Role
from pgap_kernels.optim import LowRankOptimizer
from pgap_kernels.optim.helene import HELENE
from pgap_kernels.perturbation import Update, observing

SHAPES = [(7, 5), (6, 9)]
KEYS = [noise.derive(3, step, Role.DENSE) for step in range(4)]
RANK = 2


def make_weights(dtype=torch.float32, shapes=SHAPES) -> list[Weight]:
    return [Weight(i, f"w{i}", t, noise.tensor_id(f"w{i}"), {}) for i, t in enumerate(weights(shapes, dtype))]


def stored(ws: list[Weight], side: int, seed: int, rank: int = RANK) -> Factor:
    return Factor.stored(weights([(w.tensor.shape[side], rank) for w in ws], seed=seed))


def cores(ws: list[Weight], seed: int, shape=(RANK, RANK)) -> list[Tensor]:
    return weights([shape] * len(ws), seed=seed)


def dense(ws, key=KEYS[0], row=(1.0, 1.0), **options) -> Noise:
    return Noise(ws, {key: list(row)}, **options)


def masked(ws) -> Noise:
    return dense(ws, mask=Mask(bits=ops.threshold_bits([w.tensor for w in ws], [0.7] * len(ws))))


def curved(ws) -> Noise:
    return dense(ws, curvature=[t.abs() + 0.5 for t in weights([w.tensor.shape for w in ws], seed=5)])


def low(ws, left=None, right=None, core=None, row=(1.0, 1.0)) -> LowRank:
    left, right = left or stored(ws, 0, 1), right or stored(ws, 1, 2)
    return LowRank(ws, left, right, [Term(core, list(row))])


def drawn(ws) -> LowRank:
    return low(ws, Factor.drawn(KEYS[1], RANK), Factor.drawn(KEYS[2], RANK))


def anchored(ws, row=(0.3, -0.2)) -> Anchored:
    anchors = [(0.2 * w.tensor.float()).to(w.tensor.dtype) for w in ws]
    return Anchored(ws, anchors, [w.tensor.float() - a.float() for w, a in zip(ws, anchors, strict=True)], list(row))


def displacement(direction: Direction) -> list[Tensor]:
    """What it adds, in float64: applied to zeros."""
    total = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for part in direction:
        zeros = [torch.zeros_like(t) for t in part.tensors]
        part.select(range(len(zeros)), zeros).apply(zeros)
        for w, zero in zip(part.weights, zeros, strict=True):
            total[w.index] += zero
    return total


def size_of(part, index: int) -> Tensor:
    """The sum of the absolute values of a part's terms, on one weight."""
    if index not in part.indices:
        return torch.zeros(SHAPES[index])
    if not isinstance(part, LowRank):
        return displacement(Direction([part]))[index].abs()
    left, right = (f.materialised(part.weights, side)[index].abs() for side, f in enumerate((part.left, part.right)))
    middle = torch.zeros(part.rank, part.rank)
    for term in part.terms:
        core = torch.eye(part.rank) if term.cores is None else term.cores[index]
        middle = middle + abs(term.row[index]) * (core.diag() if core.dim() == 1 else core).abs()
    return (left @ middle @ right.T).double()


# ---- a vector -------------------------------------------------------------------------------------------------------

WS = make_weights()
LEFT, RIGHT, CORES = stored(WS, 0, 1), stored(WS, 1, 2), cores(WS, 3)
SUMS = {
    "one key": (dense(WS), dense(WS, row=(2.0, 3.0)), 1),
    "two keys": (dense(WS), dense(WS, KEYS[1]), 1),
    "two distributions": (dense(WS), dense(WS, distribution="rademacher"), 2),
    "a mask": (dense(WS), masked(WS), 2),
    "curvature": (dense(WS), curved(WS), 2),
    "other weights": (dense(WS), dense(WS[:1], row=(1.0,)), 2),
    "the same cores": (low(WS, LEFT, RIGHT, CORES), low(WS, LEFT, RIGHT, CORES, (0.5, -3.0)), 1),
    "two cores": (low(WS, LEFT, RIGHT, CORES), low(WS, LEFT, RIGHT, cores(WS, 4)), 1),
    "a core and a diagonal": (low(WS, LEFT, RIGHT, CORES), low(WS, LEFT, RIGHT, cores(WS, 4, (RANK,))), 1),
    "a core and none": (low(WS, LEFT, RIGHT, CORES), low(WS, LEFT, RIGHT), 1),
    "a shared right factor": (low(WS, LEFT, RIGHT), low(WS, stored(WS, 0, 6), RIGHT, row=(0.5, 2.0)), 1),
    "a shared right factor, drawn lefts": (
        low(WS, Factor.drawn(KEYS[0], RANK), RIGHT), low(WS, Factor.drawn(KEYS[1], RANK), RIGHT), 1),
    "a shared left factor": (low(WS, LEFT, RIGHT), low(WS, LEFT, stored(WS, 1, 6)), 1),
    "a shared drawn factor": (
        low(WS, Factor.drawn(KEYS[0], RANK), RIGHT), low(WS, Factor.drawn(KEYS[0], RANK), stored(WS, 1, 6)), 1),
    "a shared factor and cores": (low(WS, LEFT, RIGHT, CORES), low(WS, stored(WS, 0, 6), RIGHT, CORES), 2),
    "no shared factor": (low(WS, LEFT, RIGHT), low(WS, stored(WS, 0, 6), stored(WS, 1, 7)), 2),
    "two ranks": (low(WS, LEFT, RIGHT), low(WS, stored(WS, 0, 6, 3), stored(WS, 1, 7, 3)), 2),
    "noise and low rank": (dense(WS), low(WS, LEFT, RIGHT), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_as_few_passes_as_can_be(name):
    first, second, parts = SUMS[name]
    amounts = [[0.5, -2.0], {0: 3.0, 1: 0.25}]
    each = [displacement(Direction([part])) for part in (first, second)]
    total = Direction.sum([(Direction([first]), amounts[0]), (Direction([second]), amounts[1])])
    assert len(total.parts) == parts
    for i, moved in enumerate(displacement(total)):
        want = amounts[0][i] * each[0][i] + amounts[1][i] * each[1][i]
        size = sum(abs(amount[i]) * size_of(part, i) for amount, part in zip(amounts, (first, second), strict=True))
        # Terms of r and r products and their sum, a coefficient, its product, and 1 / sqrt(H).
        assert ((moved - want).abs() <= (2 * RANK + 8) * UNIT * size).all()
        assert (want.abs() > 0.1).any() or not size.any()
    for part, before in zip((first, second), each, strict=True):  # nothing was changed
        assert all(torch.equal(a, b) for a, b in zip(displacement(Direction([part])), before, strict=True))


def test_low_rank_parts_are_joined_side_by_side():
    """Up to the rank that a pass takes; their sum is what it was, coefficients, cores and drawn factors and all."""
    first, second = drawn(WS).scaled([0.5, -2.0]), low(WS, LEFT, RIGHT, CORES, (3.0, 0.25))
    third = low(WS, stored(WS, 0, 6, 1), stored(WS, 1, 7, 1), row=(-1.5, 0.75))
    parts = [first, dense(WS), second, low(WS[:1], row=(2.0,)), third, low(WS)]
    joined = concatenated(parts)
    assert [part.indices for part in joined] == [(0, 1), (0, 1), (0,), (0, 1)]
    assert [part.rank for part in joined if isinstance(part, LowRank)] == [5, RANK, RANK]
    assert joined[1:] == [parts[1], parts[3], parts[5]]
    wanted, got = (displacement(Direction(some)) for some in ([first, second, third], joined[:1]))
    for i, (want, moved) in enumerate(zip(wanted, got, strict=True)):
        # Both ways: a term of each part's r and of all five products, its coefficients, and their sum.
        size = sum(size_of(part, i) for part in (first, second, third))
        assert ((moved - want).abs() <= 2 * (2 * RANK + 5 + 8) * UNIT * size).all()
        assert all((size_of(part, i) > 0.1).any() for part in (first, second, third))


def test_anchored_parts_add_up_along_one_line():
    ws = make_weights()
    line = anchored(ws)
    both = Direction.sum([(Direction([line]), [1.0, 2.0]), (Direction([line]), [0.5, 1.0])])
    (part,) = both.parts
    assert part.coefficients() == [[0.3 * 1.5, -0.2 * 3.0]]
    assert len(Direction.sum([(Direction([line]), [1.0, 1.0]), (Direction([anchored(ws)]), [1.0, 1.0])]).parts) == 2


def test_a_mask_and_a_curvature_do_not_go_together():
    with pytest.raises(ValueError, match=r"^mask, curvature: got both"):
        Noise(WS, {}, mask=Mask(share=(KEYS[0], 0.5)), curvature=[w.tensor for w in WS])


def test_a_rank_above_the_layer_is_refused():
    with pytest.raises(ValueError, match=r"^rank: got 6 for 'w0' of shape \(7, 5\)"):
        low(WS, stored(WS, 0, 1, 6), stored(WS, 1, 2, 6))


# ---- passes ---------------------------------------------------------------------------------------------------------

KINDS = {"dense": dense, "masked": masked, "curved": curved, "low rank": low, "drawn": drawn, "anchored": anchored}
PARTS = [pytest.param(make, id=name) for name, make in KINDS.items()]


MOVES = [(name, decay) for decay in (0.0, 0.25) for name in KINDS if (name, decay) != ("anchored", 0.25)]


@pytest.mark.parametrize("kind, decay, dtype", cycled(MOVES, DTYPES))  # a dtype is a unit of the bound
def test_an_inverse_takes_the_weights_back(kind, decay, dtype):
    ws = make_weights(dtype)
    part = KINDS[kind](ws)
    before = clones([w.tensor for w in ws])
    done = Pass(part, [decay] * len(ws) if decay else ())
    inverse = done.inverse()
    done.run()
    moved = clones([w.tensor for w in ws])
    inverse.run()
    unit = torch.finfo(dtype).eps / 2
    for w, old, new in zip(ws, before, moved, strict=True):
        size = (old.double().abs() + new.double().abs()) / (1 - decay)
        # Both passes round the weight, and each term of what they add up to 2 r + 8 times; 16 bits round P and B too.
        assert (
            (w.tensor.double() - old.double()).abs() <= (2 + 2 * (2 * RANK + 8) * (UNIT / unit) + 4) * unit * size
        ).all()
        assert (new.double() - old.double()).norm() > 0.1 * old.double().norm()


def test_a_decay_on_weights_that_move_along_an_anchor_is_refused():
    ws = make_weights()
    with pytest.raises(ValueError, match=r"^weight_decay: got a decay on weights that move along an anchor"):
        Pass(anchored(ws), [0.25] * len(ws)).run()


@pytest.mark.parametrize("make", PARTS)
def test_a_pass_that_moves_nothing_is_empty(make):
    ws = make_weights()
    part = make(ws)
    assert not Pass(part).is_empty() and Pass(part.scaled([0.0, 0.0])).is_empty()
    assert Pass(part, [0.0, 0.1]).is_empty() is False


def rule_pass(ws: list[Weight]) -> RulePass:
    """HELENE's, which has two states."""
    model = nn.ParameterDict({w.name: w.tensor for w in ws})
    method = HELENE(list(model.named_parameters()), lr=0.1, batch_size=4, mode="inplace")
    own = method.weights()
    return RulePass(
        dense(own), rule=method.rule_of(own), state=method.state_of(own), restore=dense(own, row=(0.1, 0.1))
    )


def test_a_rule_pass_is_undone_by_copies():
    """It has no inverse: whatever the budget, its weights and state are copied if another pass follows."""
    first, other = rule_pass(make_weights()), make_weights(shapes=[(40, 40)])
    assert first.inverse() is None and not first.is_empty()
    assert len(first.written) == 2 + 2 * 2
    before = clones([*first.written, other[0].tensor])

    def run(p: Pass) -> None:
        if p is not first:
            raise MemoryError("deliberate")
        p.run()
        assert not any(torch.equal(t, b) for t, b in zip(first.written, before[:-1], strict=True))

    with torch.no_grad(), pytest.raises(MemoryError):
        run_all_or_none([Pass(dense(other, row=(1.0,))), first], run, copy_budget=0)
    for tensor, old in zip([*first.written, other[0].tensor], before, strict=True):
        assert_same_bits(tensor, old)


def test_passes_over_one_weight_are_undone_from_the_last():
    """Each was copied as the one before it had left the weight."""
    (w,) = make_weights(shapes=SHAPES[:1])
    before, done = w.tensor.clone(), []

    def run(p: Pass) -> None:
        if len(done) == 2:
            raise RuntimeError("stopped")
        p.run()
        done.append(p)

    with pytest.raises(RuntimeError, match="stopped"):
        run_all_or_none([Pass(dense([w], key, (1.0,))) for key in KEYS], run, copy_budget=1 << 20)
    assert torch.equal(w.tensor, before)


def test_a_rule_takes_plain_noise_alone():
    own = rule_pass(make_weights())
    for part in (low(own.weights), masked(own.weights), curved(own.weights)):
        with pytest.raises(ValueError, match=r"^rule: got .*HELENE.*; accepted: plain dense noise"):
            replace(own, part=part).run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_anchored_weight_never_drifts(dtype):
    """After fifty moves the weight is what one move would have made it, to the bit, and so is the way back."""
    ws = make_weights(dtype)
    start = anchored(ws, (0.0, 0.0))
    part = start
    for i in range(50):
        target = start.scaled([1.0, 1.0])
        target.row = [math.sin(i), math.cos(i)]
        Pass(target.moved_from(part, [1.0, 1.0])).run()
        part = target
    again = make_weights(dtype)
    once = anchored(again, part.row)
    Pass(once).run()
    for w, v in zip(ws, again, strict=True):
        assert_same_bits(w.tensor, v.tensor)
    Pass(part.removal([1.0, 1.0])).run()
    Pass(once.removal([1.0, 1.0])).run()
    for w, v, anchor, delta in zip(ws, again, start.anchors, start.deltas, strict=True):
        assert_same_bits(w.tensor, v.tensor)
        assert_same_bits(w.tensor, (anchor.float() + delta).to(dtype))


# ---- shards ---------------------------------------------------------------------------------------------------------


def sharded(whole: Weight, rows: slice, columns: slice) -> Weight:
    """A piece of a weight, as a process of many has it."""
    width = whole.tensor.shape[1]
    span = (rows.start * width + columns.start, width)
    return replace(whole, tensor=whole.tensor[rows, columns].clone(memory_format=torch.contiguous_format), span=span)


@pytest.mark.parametrize(
    "rows, columns", [(slice(2, 6), slice(0, 9)), (slice(0, 6), slice(3, 9)), (slice(1, 4), slice(2, 7))]
)
@pytest.mark.parametrize("kind", ["dense", "masked", "curved", "low rank", "drawn"])
def test_a_shard_moves_as_its_slice_of_the_whole(kind, rows, columns):
    (whole,) = make_weights(shapes=[(6, 9)])
    shard = sharded(whole, rows, columns)

    def part(w: Weight):
        cut = (rows, columns) if w is shard else (slice(None), slice(None))
        if kind == "dense":
            return dense([w], row=(0.7,))
        if kind == "masked":
            return dense([w], row=(0.7,), mask=Mask(share=(KEYS[1], 0.4)))
        if kind == "curved":
            return dense([w], row=(0.7,), curvature=[(weights([(6, 9)], seed=5)[0].abs() + 0.5)[cut].contiguous()])
        if kind == "drawn":
            return low([w], Factor.drawn(KEYS[1], RANK), Factor.drawn(KEYS[2], RANK), row=(0.7,))
        left, right = (stored([whole], side, side + 1).tensors[0][cut[side]].contiguous() for side in (0, 1))
        return low([w], Factor.stored([left]), Factor.stored([right]), cores([whole], 4), (0.7,))

    seen = []
    for w in (whole, shard):
        operands = part(w).operands()
        operands.load(part(w))
        out = torch.full_like(w.tensor, math.nan)
        operands.fill(0, w.tensor, out, torch.full((1, 1), 0.25))
        seen.append(out)
        Pass(part(w), [0.25]).run()
    assert_same_bits(shard.tensor, whole.tensor[rows, columns].contiguous())
    assert_same_bits(seen[1], seen[0][rows, columns].contiguous())


@pytest.mark.parametrize("side", [0, 1])
def test_a_drawn_factor_of_a_shard_is_rows_of_the_wholes(side):
    (whole,) = make_weights(shapes=[(6, 9)])
    cut = (slice(2, 5), slice(3, 8))
    drawn_of = Factor.drawn(KEYS[0], RANK).materialised
    assert_same_bits(drawn_of([sharded(whole, *cut)], side)[0], drawn_of([whole], side)[0][cut[side]])


# ---- padding rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PARTS)
def test_a_pass_leaves_the_padding_row_alone(make):
    ws = [replace(w, padding_row=2) for w in make_weights()]
    before = clones([w.tensor for w in ws])
    Pass(make(ws)).run()
    for w, old in zip(ws, before, strict=True):
        assert_same_bits(w.tensor[2], old[2])
        assert not torch.equal(w.tensor[3], old[3])


# ---- several points in one forward, several parts on one weight ------------------------------------------------------


def point_at(model: nn.Module, direction: Direction) -> dict[str, Counted]:
    """W + direction, counted from the parts' own float32 values."""
    at = {name: Counted(p.detach().double()) for name, p in model.named_parameters()}
    for part in direction:
        zeros = [torch.zeros_like(w.tensor) for w in part.weights]
        part.select(range(len(zeros)), zeros).apply(zeros)
        for w, moved in zip(part.weights, zeros, strict=True):
            at[w.name] += Counted(moved.double(), size_on(part, w))
    return {name: w.settled(w.bound(2 * 3 + 2 * PASS)) for name, w in at.items()}


def size_on(part, w: Weight) -> Tensor:
    if not isinstance(part, LowRank):
        return (
            sum(abs(row[part.indices.index(w.index)]) for row in part.coefficients())
            * torch.full_like(w.tensor, 6).double()
        )
    i = part.indices.index(w.index)
    left, right = (f.materialised(part.weights, side)[i].abs() for side, f in enumerate((part.left, part.right)))
    return abs(part.terms[0].row[i]) * (left @ right.T).double()


def lowrank_points(optimizer) -> list[Direction]:
    """Two points of drawn factors, two of stored ones, beside them noise on another matrix and all that are none; W."""
    matrices, radius = optimizer.matrices(), optimizer.radius()
    rest = [w for w in optimizer.weights() if w not in matrices]
    points = []
    for number, (key, matrix) in enumerate(zip(KEYS, matrices, strict=False)):
        parts: list = [Noise(ws, {key: [1.0] * len(ws)}) for ws in bucket([*rest, matrix])]
        for ws in bucket(matrices, also=optimizer.rank_of):
            left, right = (Factor.drawn(key + side, optimizer.rank_of(ws[0])) for side in (0, 1))
            if number >= 2:
                left, right = (Factor.stored(f.materialised(ws, i)) for i, f in enumerate((left, right)))
            parts.append(LowRank(ws, left, right, [Term(None, [1.0] * len(ws))]))
        points.append(Direction(parts).scaled(radius))
    return [*points, Direction()]


LOZO_ROW = next(r for r in METHODS if r.id == "lozo")


@pytest.mark.parametrize("mode", ["scratch", "folded"])
def test_points_are_what_a_forward_sees_alone_and_side_by_side(mode):
    model, optimizer, _ = build(LOZO_ROW, mode, eps=0.1)
    shown, before, points = optimizer.perturbation, snapshot(model), lowrank_points(optimizer)
    values, errors = zip(*(loss_at(point_at(model, point)) for point in points), strict=True)
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 2 * max(errors)

    def losses_at(*together: Direction) -> list[float]:
        shown.perturb_to(together)
        with torch.no_grad():
            logits = shown.forward(lambda: model(torch.cat([IDS] * len(together))))
        return (logits.view(len(together), -1) * TARGET.flatten()).mean(1).tolist()

    for found in ([loss for point in points for loss in losses_at(point)], losses_at(*points)):
        assert all(abs(loss - v) <= e for loss, v, e in zip(found, values, errors, strict=True))
    shown.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_points_in_place_are_written_and_taken_back():
    model, optimizer, _ = build(LOZO_ROW, "inplace", eps=0.1)
    shown, points = optimizer.perturbation, lowrank_points(optimizer)
    wanted = [point_at(model, point) for point in points]
    with pytest.raises(ValueError, match=r"^points: got 5 with mode='inplace'"):
        shown.perturb_to(points)
    off = {name: torch.zeros_like(w.error) for name, w in wanted[0].items()}
    last = wanted[-1]
    for point, want in zip(points, wanted, strict=True):
        shown.perturb_to([point])
        for name, p in model.named_parameters():
            off[name] = off[name] + 2 * (last[name].error + want[name].error)  # two parts, each left and entered
            assert ((p - want[name].value).abs() <= off[name]).all() and off[name].max() < 1e-3 * 0.1
        last = want


class Sum(LowRankOptimizer):
    """Moves matrices along u v^T + z, two passes on one weight: a method that the package does not have."""

    method = "Sum"

    def __init__(self, params, lr, eps, weight_decay=0.0, *, rank, **options) -> None:
        super().__init__(
            params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": rank}, window=1, **options
        )

    def estimate_and_update(self, evaluate) -> float:
        u, v = (self.key(role) for role in (Role.LEFT, Role.RIGHT))
        parts = [
            part
            for ws in self.by_rank()
            for part in self.low_rank(ws, *(Factor.drawn(k, self.rank_of(ws[0])) for k in (u, v)))
        ]
        direction = Direction([*parts, *self.noise(self.key(Role.DENSE))])
        plus, minus = evaluate.two_sided(direction)
        self.apply_update([(direction, self.descent((plus - minus) / 2))])
        return (plus + minus) / 2


def naive_sum(s: Step):
    direction, u, v = s.z(), s.factors(Role.LEFT, 0), s.factors(Role.RIGHT, 1)
    direction |= {n: direction[n] + u[n] @ v[n].T for n in s.matrices()}
    rho = two_sided(s.loss, s.weights, direction, s.rates["eps"])
    return descend(
        s.weights, {n: rho * d for n, d in direction.items()}, s.rates["lr"], s.rates["weight_decay"]
    ), s.state


SUM = Row("sum", Sum, naive_sum, {"lr": 0.005, "eps": 0.02, "seed": 13, "weight_decay": 4.0, "rank": 2})


@pytest.mark.parametrize("mode", SUM.modes)
def test_two_parts_on_one_weight_are_evaluated_and_applied(mode):
    contract = Contract(SUM, mode)
    for _ in range(4):
        contract.step()
    contract.finish()


def test_passes_of_an_update_over_one_weight():
    """The first decays it; each rounds by a key of its own."""
    ws = make_weights(torch.bfloat16)
    update = Update(Direction([dense(ws[:1], row=(1.0,)), low(ws)]), [0.5, 0.25], lambda n: n)
    assert [(p.decay, p.rounding_key) for p in update.passes()] == [([0.5], 0), ([0.0, 0.25], 1)]


def test_a_weight_that_fades_in_a_window_decays_once_under_two_parts():
    row = next(r for r in METHODS if r.id == "lozo")
    _, opt, closure = build(row, "window", weight_decay=4.0)
    opt.step(closure)
    mode = opt.perturbation
    faded = {w.index: w for w in opt.matrices() if mode.keep[w.index] < 1}
    assert faded
    everywhere = [1.0] * len(opt.matrices())
    streams = ("normal", "rademacher")
    mode.perturb_to([Direction([Noise(opt.matrices(), {KEYS[0]: everywhere}, stream) for stream in streams])])
    for ref in (ref for use in mode.uses for ref in use.refs if ref.index in faded):
        w, shown = faded[ref.index], torch.empty_like(ref.parameter)
        mode.fill(ref, shown, 0)
        want = w.tensor.detach().clone()
        for stream, decay in zip(streams, (1 - mode.keep[w.index], 0.0), strict=True):
            ops.dense_perturb_([want], [(KEYS[0], 1.0)], tensor_ids=[w.id], decay=decay, distribution=stream)
        if w.padding_row is None:
            assert_same_bits(shown.detach(), want)


# ---- observers ------------------------------------------------------------------------------------------------------

FOLDS = [name for name in Layers.NAMES if name not in ("norm", "affine")]


@pytest.mark.parametrize(
    "id, mode",
    [("mezo-3", "inplace"), ("mezo-3", "scratch"), ("lozo", "folded"), ("lozo", "window"), ("lozo", "folded-stacked")],
)
@pytest.mark.parametrize("beside", [False, True])
def test_an_observer_sees_every_layers_inputs(id, mode, beside):
    """Whatever the mode does to the outputs, and beside the hooks of another optimizer that trains other weights."""
    row = next(r for r in METHODS if r.id == id)
    model = Words()
    if beside:
        own = [(n, p) for n, p in model.named_parameters() if n.startswith("norm")]
        rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("norm")]
        other = METHODS[0].make(own, model=model, **{**METHODS[0].options, **options_of("scratch")}, allow_unused=True)
        optimizer = row.make(rest, model=model, **{**row.options, **options_of(mode)})
        other.step(lambda: Losses(model)().sum())
    else:
        optimizer = row.make(model, **{**row.options, **options_of(mode)})
    layers, closure, seen = Layers(model, 1), Losses(model, mode.endswith("stacked")), []
    with observing(model, optimizer.weights(), lambda w, x: seen.append((w.name, x.clone()))):
        optimizer.step(closure)
    inputs = [(name, x) for forward in layers.forwards for name, x, _ in forward if name in FOLDS]
    assert len(seen) == len(inputs) == closure.calls * len(FOLDS)
    for (weight, x), (layer, wanted) in zip(seen, inputs, strict=True):
        assert weight == ("embed.weight" if layer == "head" else f"{layer}.weight") and torch.equal(x, wanted)
    optimizer.step(closure)
    assert len(seen) == len(inputs)  # it has gone
    with pytest.raises(ValueError, match=r"^model: got None"), observing(None, [], lambda w, x: None):
        pass
