"""Does the test suite notice faults? One fault at a time goes into a copy of the tree, and the tests for it run there.

For a maintainer who has just thinned out or rewritten tests: what the suite proved before, it should still prove. Every
fault is a slip that somebody could make: a lost decay, a key used twice, an edge off by one. One that survives names a
fact that no chosen test proves any more.

    python tools/mutants.py                          all faults, each with its tests
    python tools/mutants.py --only leftover-point    some of them
    python tools/mutants.py --list                   names, places and tests
    MAKEFLAGS=-j4 python tools/mutants.py            compile C++ faults in parallel

First a control run: without a fault the chosen tests pass. The exit status is 0 if every fault was caught.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".*", "build", "runs", "__pycache__", "*.egg-info")
LIBRARY = "pgap_kernels/_C.abi3.so"
BUILD = "build/mutants"
PATIENCE = 1800  # seconds for the tests of one fault; a fault may make them wait for ever


class Fault(NamedTuple):
    """A slip: ``before``, which its file has exactly once, becomes ``after``.

    Attributes:
        tests: glob patterns of the files that should see it.
        k: pytest's -k within these.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    k: str

    @property
    def is_cpp(self) -> bool:
        """Whether the extension has to be built again."""
        return self.file.startswith("csrc/")

    @property
    def is_interpreted(self) -> bool:
        """Whether its tests need Triton's interpreter, from the start of their process."""
        return self.file.startswith(f"{TRITON}/")


def faults(file: str, tests: Sequence[str], *rows: tuple[str, str, str, str]) -> list[Fault]:
    """Faults of one file: (name, before, after, k) of each."""
    return [Fault(name, file, before, after, tuple(tests), k) for name, before, after, k in rows]


PACKAGE, REFERENCE, TRITON = "pgap_kernels", "pgap_kernels/reference", "pgap_kernels/triton"

PROPERTIES = "tests/test_op_properties.py"
DENSE = ("tests/test_dense.py", PROPERTIES)
MASKED = ("tests/test_masked.py", PROPERTIES)
PRECONDITIONED = ("tests/test_preconditioned.py", PROPERTIES)
ANCHOR = ("tests/test_anchor.py", PROPERTIES)
REDUCTION = ("tests/test_reduction.py",)
LOWRANK = ("tests/test_lowrank.py", PROPERTIES)
FORWARD = ("tests/test_forward.py", PROPERTIES)
DRAW = ("tests/test_draw.py",)
DIRECTIONS = ("tests/test_directions.py",)
METHODS = ("tests/test_modes.py",)
SAMPLING = ("tests/test_sampling.py", "tests/test_populations.py")
STATE = ("tests/test_mode_state.py", "tests/test_optim_state.py")
UNUSUAL = ("tests/faults/test_*.py",)
PADDING = (*DIRECTIONS, "tests/faults/test_padding.py")
BROKEN_OFF = ("tests/test_mode_faults.py", "tests/test_optim_faults.py")
FINETUNE = ("tests/test_finetune.py",)


def interpreted(family: str, *others: str) -> tuple[str, ...]:
    return f"tests/interpreted/test_triton_{family}.py", *others


# fmt: off
FAULTS = [
    # ---- keys, checks, ops ------------------------------------------------------------------------------------------
    *faults(f"{PACKAGE}/noise.py", ["tests/test_noise.py"],
        ("high-word-of-the-step-lost", "(step & MASK32, step >> 32, role", "(step & MASK32, 0, role", "derive")),
    *faults(f"{PACKAGE}/checks.py", ["tests/test_checks.py"],
        ("columns-beyond-the-row", "other_columns <= distance <= ld - columns", "other_columns <= distance", "")),
    *faults(f"{PACKAGE}/ops/_library.py", DENSE,
        ("version-not-bumped", "record(**arguments))\n        bump_versions(out)", "record(**arguments))", "version")),
    *faults(f"{PACKAGE}/ops/anchor.py", [*ANCHOR, "tests/test_bad_input.py"],
        ("output-over-an-anchor", 'checks.apart("weights" if targets is None else "out", targets or weights, read)',
         "pass", "written_over")),
    *faults(f"{PACKAGE}/ops/preconditioned.py", PRECONDITIONED,
        ("adam-corrects-v-as-m", '"correction of v", 1 / (1 - beta2*', '"correction of v", 1 / (1 - beta1*', "adam"),
        ("helene-batch-size-lost", "(1 - beta2) * batch)", "(1 - beta2))", "float64")),
    *faults(f"{PACKAGE}/ops/forward.py", FORWARD,
        ("keys-of-one-side", "keys[:, i] = side.keys",
         "keys[:, i] = sides[0].keys", "drawn"),
        ("span-of-drawn-factors-lost", 'span=checks.span("span", span, *rows)', "span=[]", "drawn")),
    *faults(f"{PACKAGE}/losses.py", ["tests/test_losses.py"],
        ("labels-not-shifted", "following = labels[:, 1:]", "following = labels[:, :-1]", ""),
        ("mean-over-padding", "counts.sum(1).clamp(min=1)", "counts.shape[1]", "")),
    *faults(f"{PACKAGE}/subspace.py", ["tests/test_subspace.py"],
        ("singular-vectors-of-two-signs", "(right * sign).contiguous()", "right.contiguous()", "")),
    # ---- reference --------------------------------------------------------------------------------------------------
    *faults(f"{REFERENCE}/noise.py", [*DENSE, *DRAW],
        ("fma-rounds-twice", "torch.where(inexact, torch.where(away, 1, -1), 0)", "torch.zeros_like(bits)", "fma"),
        ("rounding-by-the-low-half", "up = (word >> 16).double()", "up = (word & 0xFFFF).double()", "stochastic")),
    *faults(f"{REFERENCE}/dense.py", DENSE,
        ("rounding-key-of-the-first-stage", "rounding_keys[stage]", "rounding_keys[0]", "stages"),
        ("decay-of-the-first-stage", "delta, d[stage])", "delta, d[0])", "stages")),
    *faults(f"{REFERENCE}/dense.py", MASKED,
        ("mask-begins-anew", "done += count", "pass", "masked and (reference or shards)")),
    *faults(f"{REFERENCE}/preconditioned.py", PRECONDITIONED,
        ("restored-by-the-new-curvature", "b / _sqrt(h)), [new]", "b / _sqrt(new)), [new]", "hizoo")),
    *faults(f"{REFERENCE}/anchor.py", ANCHOR,
        ("anchor-rounds-twice", "fma(c, distance, origin)", "c * distance + origin", "formula")),
    *faults(f"{REFERENCE}/reduction.py", REDUCTION,
        ("sum-of-the-last-run", "totals[t] += x", "totals[t] = x", "exact")),
    *faults(f"{REFERENCE}/lowrank.py", LOWRANK,
        ("left-factor-of-another-shard", "(m, base // row_stride, left", "(m, base % row_stride, left",
         "rank and shards"),
        ("quotient-of-plain-factors", "squares = a * a * arguments", "squares = a * arguments", "quotient"),
        ("sign-of-the-alignment-lost", "torch.cat(signs).double() * delta**0.5", "delta**0.5", "align")),
    *faults(f"{REFERENCE}/forward.py", FORWARD,
        ("slices-share-a-core", "else a.cores[s].T)", "else a.cores[0].T)", "slice"),
        ("drawn-factor-of-a-shard-from-0", "noise(first * a.rank, rows", "noise(0, rows", "drawn")),
    # ---- C++ --------------------------------------------------------------------------------------------------------
    *faults("csrc/vec.h", [*DENSE, *ANCHOR],
        ("ties-away-from-even", "uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)", "uint16_t((b + 0x8000u) >> 16)",
         "ties or dense and special")),
    *faults("csrc/vec.h", DRAW,  # survives where the CPU has no AVX2
        ("avx2-accepts-overflow", "range = setu(most - least);", "range = setu(most);", "instruction")),
    *faults("csrc/noise.h", DRAW,
        ("key-of-the-round-before", "uint32_t(p0) ^ k1[2]", "uint32_t(p0) ^ k1[1]", "cpu")),
    *faults("csrc/draw.inl", DRAW,
        ("signs-of-two-lanes", "x[(first >> 10) & 3]", "x[(first >> 10) & 1]", "cpu")),
    *faults("csrc/group.inl", DRAW,
        ("last-block-not-drawn", "((last - 1) % kBlocks / V2::N + 1)", "(last % kBlocks / V2::N + 1)", "cpu")),
    *faults("csrc/round.inl", [*DENSE, *ANCHOR],
        ("fp16-up-on-equality", "((word >> 16) < ((a &", "((word >> 16) <= ((a &", "equality or definition")),
    *faults("csrc/pieces.h", DENSE,
        ("scalars-of-the-first-tensor", "i : i * columns + c]", "i : i * columns]", "dense and (per_tensor or list)"),
        ("rows-of-a-shard-too-close", "p.base + row * p.row_stride;", "p.base + row * p.cols;", "dense and shards")),
    *faults("csrc/dense.inl", DENSE,
        ("coefficient-used-in-two-stages", "draw += pass.draws_per_stage[stage];", "", "stages"),
        ("single-sign-without-decay", "decay != 0.0f ? V::fnma(d, w, delta) : delta)", "delta)",
         "dense and (reference or signs)")),
    *faults("csrc/masked.inl", MASKED,
        ("mask-of-the-first-row", "p.mask_offset + row * p.cols + column", "row * p.cols + column",
         "masked and (reference or strides)")),
    *faults("csrc/preconditioned.inl", PRECONDITIONED,
        ("second-moment-not-saved", "const float v = r.state1[i] = fused", "const float v = fused", "adam")),
    *faults("csrc/anchor.inl", ANCHOR,
        ("tail-takes-delta-for-w", "x, is_difference, c, done, n", "x, false, c, done, n", "anchor and reference")),
    *faults("csrc/reduction.inl", REDUCTION,
        ("tail-in-one-sum", "for (int k = 0; i < n; ++i, ++k)", "for (int k = 0; i < n; ++i)", "")),
    *faults("csrc/lowrank.inl", LOWRANK,
        ("words-of-the-first-columns", "p.base += row * p.row_stride + first;", "p.base += row * p.row_stride;",
         "rank and stochastic"),
        ("last-panel-without-decay", "kLowrankPanel, columns, pass.decay);", "kLowrankPanel, columns, 0.0f);", "error"),
        ("quotient-without-e", "V::sqrt(V::add(sums[i][v], e))", "V::sqrt(sums[i][v])", "quotient"),
        ("quotient-by-the-first-panel", "pass.below_right + (right - pass.right)", "pass.below_right", "quotient")),
    *faults("csrc/ops_lowrank.cpp", LOWRANK,
        ("divided-by-the-plain-factor", "for (float& x : squares) x *= x;", "", "quotient"),
        ("e-of-the-first-weight", "es[e->numel() == 1 ? 0 : t]", "es[0]", "quotient and list")),
    *faults("csrc/forward.inl", FORWARD,
        ("fifth-token-lost", "if (n <= 4) f(i, n", "if (n <= 5) f(i, n", "forward and (error or neighbours)")),
    *faults("csrc/ops_forward.cpp", FORWARD,
        ("slices-share-an-in-factor", "in_factor = in_count == 1 ? 0 : i,", "in_factor = 0,", "slice and cpu"),
        ("coefficient-of-the-first-slice", "call.coefficients[size_t(i)] : 1.0f", "call.coefficients[0] : 1.0f",
         "slice and cpu")),
    # ---- Triton -----------------------------------------------------------------------------------------------------
    *faults(f"{TRITON}/tiles.py", interpreted("tiles", PROPERTIES),
        ("triton-rows-of-a-shard-too-close", "row * tl.load(entry + ROW_STRIDE)", "row * tl.load(entry + COLUMNS)",
         "shards and not rank and not forward and not reference]"),
        ("triton-one-element-beyond", "v2, TYPE), mask=(c + 2048 >= 0) & (c + 2048 < n))",
         "v2, TYPE), mask=(c + 2048 >= 0) & (c + 2048 <= n))", "around or whole_tiles")),
    *faults(f"{TRITON}/dense.py", interpreted("dense"),
        ("triton-rounding-key-reused", "scalars.rounding_keys + stage)", "scalars.rounding_keys)", "stages")),
    *faults(f"{TRITON}/rounding.py", interpreted("rounding"),
        ("triton-fp16-up-on-equality", "s < ((magnitude & 0x1FFF) << 3)", "s <= ((magnitude & 0x1FFF) << 3)", "")),
    *faults(f"{TRITON}/preconditioned.py", interpreted("preconditioned", PROPERTIES),
        ("triton-curvature-not-saved", 'if RULE != "helene":', 'if RULE == "adam":',
         "rules or helene_refresh and bits")),
    *faults(f"{TRITON}/anchor.py", interpreted("anchor", PROPERTIES),
        ("triton-rounds-by-another-key", "tl.load(rounding_key_ptr))", "tl.load(rounding_key_ptr) + 1)",
         "anchor and stochastic")),
    *faults(f"{TRITON}/reduction.py", interpreted("reduction"),
        ("triton-part-of-the-next-tensor", "mask=i < count, other", "mask=i <= count, other", "")),
    *faults(f"{TRITON}/lowrank.py", interpreted("lowrank_tiles"),
        ("triton-rows-from-0", "FIRST_ROW: base // row_stride,", "FIRST_ROW: 0,", "shards"),
        ("triton-words-from-0", "e = tl.load(entry + BASE) + i *", "e = i *", "shards")),
    *faults(f"{TRITON}/lowrank.py", interpreted("lowrank"),
        ("triton-quotient-of-the-first-matrix", "BELOW: divisors[t],", "BELOW: divisors[0],", "quotient"),
        ("triton-b-not-squared", "        b *= b\n", "        b *= 1.0\n", "quotients_are")),
    *faults(f"{TRITON}/forward.py", interpreted("forward"),
        ("triton-slices-share-a-core", "core_ptr += part * core_stride", "core_ptr += 0", "slice"),
        ("triton-slices-share-an-in-factor", "part * factor_stride\n    f_pointer", "0\n    f_pointer", "slice"),
        ("triton-slices-share-an-out-factor", "part * factor_stride\n    i =", "0\n    i =", "slice"),
        ("triton-draw-of-the-left-side", "keys_ptr=keys[:, side:]", "keys_ptr=keys", "drawn")),
    *faults(f"{TRITON}/guard.py", interpreted("guard"),
        ("triton-fourth-table-unguarded", " | find_nonfinite(table3, count3, BLOCK)", "", "")),
    *faults(f"{TRITON}/table.py", interpreted("host"),
        ("triton-unmasked-rows", "aligned &= row_stride % GROUP.value == 0 and all(", "aligned &= all(", "aligned")),
    *faults(f"{TRITON}/cache.py", interpreted("host"),
        ("triton-constants-of-two-types", "(device, tensor.dtype, tensor.shape, tuple(bits))",
         "(device, tensor.shape, tuple(bits))", "values")),
    # ---- directions -------------------------------------------------------------------------------------------------
    *faults(f"{PACKAGE}/directions/passes.py", DIRECTIONS,
        ("inverse-without-decay", "{w.index: -1.0 / k for", "{w.index: -1.0 for", "inverse"),
        ("padding-row-written", "if all(w.padding_row is None for w in weights):", "if True:", "padding"),
        ("undone-in-the-wrong-order", "for p, copies in reversed(done):", "for p, copies in done:", "undone")),
    *faults(f"{PACKAGE}/directions/noise.py", DIRECTIONS,
        ("shared-draw-counts-once", "add_rows(total[key], row) if key in total else row", "row", "sums")),
    *faults(f"{PACKAGE}/directions/anchored.py", DIRECTIONS,
        ("start-on-the-line-lost", "[1.0 + a + s for a, s", "[1.0 + a for a, s", "anchored")),
    *faults(f"{PACKAGE}/directions/lowrank.py", DIRECTIONS,
        ("factor-of-a-shard-from-0", "spans.append((first * rank, rank))", "spans.append((0, rank))", "shard"),
        ("joined-without-coefficients", "zip(*(part._mixed_left() for part in parts)",
         "zip(*(part.left.materialised(part.weights, 0) for part in parts)", "joined"),
        ("joined-beyond-the-rank", "len(ranks) == len(parts) and sum(ranks) <= limit", "len(ranks) == len(parts)",
         "joined")),
    *faults(f"{PACKAGE}/directions/lowrank.py", PADDING,
        ("fold-moves-the-padding-row", "memory[w.padding_row] = 0.0", "pass", "padding")),
    *faults(f"{PACKAGE}/directions/lowrank.py", METHODS,
        ("coefficient-used-twice", "[Term(None, ones)], left=", "self.terms, left=", "lozo-window")),
    # ---- modes ------------------------------------------------------------------------------------------------------
    *faults(f"{PACKAGE}/perturbation/base.py", DIRECTIONS,
        ("every-part-decays", "[0.0 if w.index in times else self.decay[w.index] for", "[self.decay[w.index] for",
         "one_weight"),
        ("rounding-key-of-the-first-part", "self.rounding_key(max(times.get(i, 0) for i in part.indices))",
         "self.rounding_key(0)", "one_weight")),
    *faults(f"{PACKAGE}/perturbation/inplace.py", METHODS,
        ("leftover-point", "[Pass(part.removal(self.keep_all)) for part in rest] + update.passes(moves)",
         "update.passes(moves)", "dizo-inplace"),
        ("two-pass-forgets-the-point", "self.added = after", "self.added = []", "mezo-two_pass"),
        ("rule-restores-what-decayed", "None if before is None else before.removal(keep)",
         "None if before is None else before.removal(self.keep_all)", "helene-groups-inplace")),
    *faults(f"{PACKAGE}/perturbation/scratch.py", [*PADDING, "tests/test_mode_hooks.py"],
        ("scratch-moves-the-padding-row", "out[row] = ref.parameter[row]", "pass", "padding"),
        ("output-overwritten", "return output.clone() if", "return None if", "given"),
        ("second-part-decays-again", "source, decay = out, self.no_decay[out.device]", "source = out", "two_parts")),
    *faults(f"{PACKAGE}/perturbation/vectors.py", [*PADDING, "tests/test_mode_hooks.py"],
        ("vector-without-a-fill-left-out", "self.at(w.index, run).copy_(w.tensor)", "pass", "side_by_side")),
    *faults(f"{PACKAGE}/perturbation/folded.py", METHODS,
        ("window-loses-decay", "keep[index] *= kept[index]", "pass", "pgap-groups-window"),
        ("window-decays-on", "keep[index] = 1.0", "pass", "pgap-groups-window"),
        ("bias-fades-with-its-weight", "[y + (b * faded).to(y.dtype) for y, b in parts]", "[y for y, b in parts]",
         "pgap-groups-window")),
    *faults(f"{PACKAGE}/perturbation/folds.py", DIRECTIONS,
        ("slices-share-a-stored-factor", "if len({*map(id, stored)}) == 1 else stored", "if stored else stored",
         "side_by_side"),
        ("keys-of-the-first-slice", "[fold.keys for fold in folds]", "[folds[0].keys for _ in folds]", "side_by_side"),
        ("clean-slice-moved", "coefficient=torch.zeros_like(some.coefficient)", "coefficient=some.coefficient",
         "side_by_side")),
    *faults(f"{PACKAGE}/perturbation/residual.py", METHODS,
        ("plane-beside-a-truncated-weight", "top = (bits + 0x8000) >> 16", "top = bits >> 16", "16_bit")),
    *faults(f"{PACKAGE}/perturbation/step_context.py", BROKEN_OFF,
        ("random-numbers-go-on", "torch.set_rng_state(self.rng)", "pass", "rng"),
        ("ctrl-c-lost", "each.callback(signal.raise_signal, late)", "pass", "ctrl_c")),
    *faults(f"{PACKAGE}/perturbation/hooks.py", ["tests/test_mode_hooks.py", "tests/faults/test_aliases.py"],
        ("max-norm-folded", "if forward is nn.Embedding.forward and module.max_norm is None:",
         "if forward is nn.Embedding.forward:", "max_norm or rescales")),
    # ---- optimizers -------------------------------------------------------------------------------------------------
    *faults(f"{PACKAGE}/optim/base.py", BROKEN_OFF,
        ("error-leaves-the-point", "self.perturbation.restore()", "pass", "failing_closure"),
        ("overflow-written", "self._refuse_overflow(direction)", "pass", "overflows")),
    *faults(f"{PACKAGE}/optim/base.py", STATE,
        ("skipped-step-not-counted", "self.skipped += 1\n                self.steps += 1", "self.skipped += 1", "skip"),
        ("state-of-unmerged-weights", 'merge_for(self._perturbation, "state_dict")\n        return checkpoint',
         "pass\n        return checkpoint", "merge")),
    *faults(f"{PACKAGE}/optim/base.py", ["tests/test_optim_weights.py"],
        ("rounding-keys-not-numbered", "self.perturbation.passes_this_step + n)", "n)", "16_bit")),
    *faults(f"{PACKAGE}/optim/evaluation.py", ["tests/faults/test_closures.py"],
        ("loss-kept-by-reference", "value.detach().clone()", "value.detach()", "same_tensor")),
    *faults(f"{PACKAGE}/optim/evaluation.py", UNUSUAL,
        ("slices-checked-one-way", " or not torch.equal(before[:-1], last_moved[:-1])", "", "pairing"),
        ("slices-tried-where-nothing-moves", " if not checked.issuperset(_indices(point))", "", "first_point")),
    *faults(f"{PACKAGE}/perturbation/stacked.py", UNUSUAL,
        ("any-layer-runs-slices-together", "if use.kind is not None else", "if True else", "averages_over")),
    *faults(f"{PACKAGE}/perturbation/scratch.py", SAMPLING,
        ("still-slice-does-not-fade", "out.mul_(1 - decay.reshape([1] * out.dim()))", "pass", "fades_beside"),
        ("a-filling-for-each-slice", "runs_of(points)\n", "[range(i, i + 1) for i in range(len(points))]\n", "share")),
    *faults(f"{PACKAGE}/perturbation/points.py", SAMPLING,
        ("folds-of-freed-memory", "layout, operands.serial, ", "layout, ", "many_slices")),
    *faults(f"{PACKAGE}/optim/evaluation.py", SAMPLING,
        ("rows-of-other-slices", "self.rows.append(loss.reshape(count, -1))",
         "self.rows.append(loss.reshape(-1, count).T)", "")),
    *faults(f"{PACKAGE}/optim/evaluation.py", METHODS,
        ("spare-copies-have-losses", "del losses[len(points) :]", "pass",
         "eggroll-single")),
    *faults(f"{PACKAGE}/optim/evaluation.py", BROKEN_OFF,
        ("infinite-loss-accepted", "if not math.isfinite(value):", "if math.isnan(value):", "finite or closure")),
    *faults(f"{PACKAGE}/optim/checkpoint.py", STATE,
        ("attributes-not-saved", "{name: getattr(optimizer, name) for name in optimizer.saved_attributes}", "{}",
         "continues"),
        ("planes-not-loaded", 'residual.load(zo["residual"])', "pass", "continues or residual"),
        ("moved-stream-accepted", "if ids.get(name, tid) != tid", "if False", "foreign"),
        ("loaded-state-shares-memory", "value.detach().clone()", "value.detach()", "copy or copied")),
    *faults(f"{PACKAGE}/optim/cost.py", METHODS,
        ("cost-of-the-first-period", "        count(1)  # enters a schedule\n", "", "cost and two_pass")),
    *faults(f"{PACKAGE}/optim/model.py", METHODS,
        ("biases-decay", "if w.tensor.dim() > 1 else 0.0", "if w.tensor.dim() > 0 else 0.0", "mezo-3-inplace")),
    *faults(f"{PACKAGE}/optim/cost.py", METHODS,
        ("ends-of-a-window-are-ordinary", "ends + (period - 2) * value", "period * value", "long_window")),
    *faults(f"{PACKAGE}/optim/lowrank.py", METHODS,
        ("scale-without-rank", " / self.rank_of(weight) if", " if", "pgap-inplace")),
    *faults(f"{PACKAGE}/optim/mezo.py", METHODS,
        ("probes-share-a-key", "Role.DENSE, number, step", "Role.DENSE, 0, step", "mezo-3-inplace")),
    *faults(f"{PACKAGE}/optim/sampling.py", METHODS,
        ("probes-not-averaged", "(plus - minus) / (2 * self.directions)", "(plus - minus) / 2", "mezo-3-inplace")),
    *faults(f"{PACKAGE}/optim/sampling.py", SAMPLING,
        ("baseline-among-the-tried", "*tried, base = losses", "base, *tried = losses", ""),
        ("share-of-a-group-lost", "[[loss / size for loss in", "[[loss for loss in", ""),
        ("clean-point-reported", "(self.groups if self.baseline == \"clean\" else 0)", "0", "")),
    *faults(f"{PACKAGE}/optim/signal.py", SAMPLING,
        ("examples-with-themselves", "(products.sum((-2, -1)) - diagonal)", "products.sum((-2, -1))", ""),
        ("clean-point-in-the-covariance", 'f if baseline == "loo" else f[:-1]', "f", ""),
        ("first-signal-goes-along", "self.steps >= self.window and self.first <= 0:", "self.steps >= self.window:",
         "")),
    *faults(f"{PACKAGE}/optim/model.py", SAMPLING,
        ("rates-without-the-signal", "return [lr * factor for lr in", "return [lr for lr in", ""),
        ("decay-without-the-signal", 'self._group_rates(), self.amounts("weight_decay")',
         'self.amounts("lr"), self.amounts("weight_decay")', "")),
    *faults(f"{PACKAGE}/optim/eggroll.py", METHODS,
        ("members-drawn-anew", "step // self.noise_reuse * self.noise_reuse", "step", "eggroll-inplace"),
        ("fitness-not-normalised", "scores.standardised if self.normalise", "scores.centred if self.normalise",
         "eggroll-single")),
    *faults(f"{PACKAGE}/directions/lowrank.py", METHODS,
        ("members-of-the-rank", "1.0 / math.sqrt(rank)", "1.0", "eggroll-jax")),
    *faults(f"{PACKAGE}/optim/agzo.py", ["tests/test_agzo.py", *METHODS],
        ("basis-an-iteration-short", "for _ in range(self.iterations):", "for _ in range(self.iterations - 1):",
         "basis"),
        ("inputs-of-the-last-call",
         "in missing and x.is_floating_point():  # not the indices of a tied embedding\n                missing.remove",
         "in self.lowrank_indices() and x.is_floating_point():\n                missing.discard", "first_call"),
        ("slope-from-zero", "amount = loss - clean", "amount = loss", "agzo-inplace")),
    *faults(f"{PACKAGE}/optim/loren.py", METHODS,
        ("momentum-of-vectors", "if w.tensor.dim() > 1 and beta}", "if beta}", "loren-inplace"),
        ("rank-one-term-decays", "{i: c / decay for i, c in sums.items()}", "sums", "loren-inplace")),
    *faults(f"{PACKAGE}/optim/gradient_subspace.py", SAMPLING,
        ("probes-without-their-rank", "1.0 / (radius[w.index] * math.sqrt(own))", "1.0 / radius[w.index]", "probes")),
    *faults(f"{PACKAGE}/optim/registry.py", ["tests/test_registry.py"],
        ("options-of-the-trunk", " and cls not in _TRUNKS:", ":", "options"),
        ("anything-is-a-method", "if not (isinstance(found, type) and issubclass(found, ZOOptimizer)):", "if False:",
         "another"),
        ("own-names-twice", " - {*_OWN})]", ")]", "another")),
    *faults(f"{PACKAGE}/optim/pgap.py", METHODS,
        ("one-sign-for-all-lost", '[0] * len(weights) if self.xi == "global" else None', "None", "pgap-global")),
    *faults(f"{PACKAGE}/optim/gradient_subspace.py", METHODS,
        ("gradient-of-summed-probes", "2 * radius[w.index] * self.probes", "2 * radius[w.index]", "pgap-inplace")),
    *faults(f"{PACKAGE}/optim/pizo.py", METHODS,
        ("worst-draw-kept", "losses.index(min(losses))", "losses.index(max(losses))", "pizo-greedy-inplace")),
    *faults(f"{PACKAGE}/optim/helene.py", METHODS,
        ("annealed-a-step-ahead", "math.exp(-self.steps /", "math.exp(-(self.steps + 1) /", "helene-inplace")),
    *faults(f"{PACKAGE}/optim/lozo.py", METHODS,
        ("right-factor-from-the-left-key", "self.key(Role.RIGHT)", "self.key(Role.LEFT)", "lozo-inplace")),
    *faults(f"{PACKAGE}/optim/lozo_m.py", METHODS,
        ("momentum-not-projected", 'if "momentum" in state:', "if False:", "lozo-m-inplace"),
        ("momentum-of-biases-lost", 'setdefault("momentum", dense[w.index])', "values()", "lozo-m-inplace")),
    *faults(f"{PACKAGE}/optim/dizo.py", METHODS,
        ("ratio-without-a-lower-bound", "[min(max(c, 1 - self.tau), 1 + self.tau) for c", "[min(c, 1 + self.tau) for c",
         "dizo-far")),
    *faults(f"{PACKAGE}/optim/scores.py", ["tests/test_optim.py"],
        ("leave-none-out", "difference / (len(losses) - 1)", "difference / len(losses)", "scores")),
    # ---- finetune ---------------------------------------------------------------------------------------------------
    *faults(f"{PACKAGE}/finetune/data.py", FINETUNE,
        ("epochs-alike", 'f"batches/{seed}/{epoch}"', 'f"batches/{seed}"', "batches")),
    *faults(f"{PACKAGE}/finetune/scoring.py", FINETUNE,
        ("padding-attended", "(columns >= first).long()", "(columns >= first - 1).long()", "padding"),
        ("last-batch-weighs-more", 'reduction="sum").item()', 'reduction="mean").item() * 2', "loss")),
    *faults(f"{PACKAGE}/finetune/training.py", ["tests/test_finetune.py", "tests/test_finetune_runs.py"],
        ("resumed-without-weights",
         "checkpoint.load_weights(folder, self._weights())\n        self.step, self.best", "self.step, self.best",
         "cut_goes_on"),
        ("resumed-without-schedule", 'self.scheduler.load_state_dict(self._resumed["scheduler"])', "pass",
         "cut_goes_on"),
        ("best-is-the-last", "value < self.best.worth", "value <= 1e9", "best_weights")),
    *faults(f"{PACKAGE}/finetune/padding.py", ["tests/test_finetune_families.py", "tests/test_finetune_models.py"],
        ("padding-never-tried", "([short, *others], 0), ([*others, short], -1)", "([short], 0)", "famil"),
        ("encoders-as-causal", "not _close(alone.float()", "False and not _close(alone.float()", "famil")),
    *faults(f"{PACKAGE}/finetune/interrupts.py", ["tests/test_finetune_runs.py"],
        ("second-signal-raises", "if self._ending or self._pending is not None:", "if self._ending:", "signals"),
        ("signal-between-runs-lost", "self._pending = self._pending or number",
         "self._pending = self._pending or (None if self._ending else number)", "between_two_runs")),
    *faults(f"{PACKAGE}/finetune/training.py", ["tests/test_finetune_models.py"],
        ("fallback-forgotten", '"mode": self.mode,', '"mode": self.config.mode,', "falls_back")),
    *faults(f"{PACKAGE}/finetune/baseline.py", FINETUNE,
        ("baseline-without-restore", "self._perturb(zo_seed, 1)\n            self._update(", "self._update(",
         "baseline")),
    # ---- integrations -----------------------------------------------------------------------------------------------
    *faults(f"{PACKAGE}/integrations/transformers.py", ["tests/test_trainer.py"],
        ("labels-popped-once", "dict(batch), num_items_in_batch=num_items", "batch, num_items_in_batch=num_items",
         "label"),
        ("noise-over-again", "self.zo.steps = max(self.zo.steps, self.state.global_step)", "pass", "model_alone"),
        ("dropout-acts", "model.train(args.zo_dropout)", "model.train()", "loop_by_hand and bert"),
        ("micro-batches-forgotten", "batches, self._batches = self._batches, []",
         "batches, self._batches = self._batches[-1:], []", "loop_by_hand and llama")),
    *faults(f"{PACKAGE}/integrations/arguments.py", ["tests/test_trainer.py"],
        ("options-of-other-methods", "if name not in accepted or name in _OF_THE_TRAINER:", "if False:", "refused")),
    *faults(f"{PACKAGE}/perturbation/readers.py", ["tests/test_peft.py"],
        ("adapters-read-early", "merge_for(client, self.name)", "pass", "readers_of_adapters")),
    *faults(f"{PACKAGE}/perturbation/hooks.py", ["tests/test_peft.py", "tests/faults/test_stray_uses.py"],
        ("dispatched-not-folded", ' and not _is_dispatched(module):', ":", "dispatches"),
        ("read-at-home", "_user(name, modules) if elsewhere is None else elsewhere", "_user(name, modules)",
         "another_module_reads")),
    *faults(f"{PACKAGE}/optim/evaluation.py", ["tests/test_mode_compile.py"],
        ("repeated-once", "while self.perturbation.must_repeat:", "if self.perturbation.must_repeat:",
         "called_before")),
    *faults(f"{PACKAGE}/optim/drawing.py", ["tests/test_step_ahead.py"],
        ("slope-of-a-share", "amount * len(flat) / radius[0]", "amount / radius[0]", "last_says")),
]
# fmt: on


# ---- finding, copying, building -------------------------------------------------------------------------------------


def misplaced(chosen: Iterable[Fault], tree: Path) -> list[str]:
    """What is wrong with the table: a text that its file does not have exactly once, or a pattern without a file."""
    found = []
    for fault in chosen:
        file = tree / fault.file
        times = file.read_text(encoding="utf-8").count(fault.before) if file.is_file() else 0
        if times != 1:
            found.append(f"{fault.name}: {fault.file} has {times} times {fault.before!r}; accepted: once")
        found += [f"{fault.name}: no file matches {name}" for name in fault.tests if not any(tree.glob(name))]
    return found


def files_of(fault: Fault, tree: Path) -> list[str]:
    """The files of a fault's tests."""
    return sorted({str(file.relative_to(tree)) for pattern in fault.tests for file in tree.glob(pattern)})


def build(tree: Path) -> str | None:
    """Build the extension; the error, if any. By the C++ tests' Makefile, as setup.py compiles every file each time."""
    target = f"{BUILD}/{Path(LIBRARY).name}"
    command = ["make", "-s", "-f", "tests/cpp/Makefile", target, f"OUT={BUILD}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        return done.stderr[-2000:]
    shutil.copy(tree / target, tree / LIBRARY)
    return None


# ---- running tests --------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a fault: "caught" by a test, "survived", or "broken": there was nothing to run."""

    status: str
    by: str
    seconds: float = 0.0


class Tests(NamedTuple):
    """A call of pytest."""

    files: Sequence[str]
    k: str
    interpreted: bool = False

    @classmethod
    def of(cls, fault: Fault, tree: Path) -> Tests:
        """Those of a fault."""
        return cls(files_of(fault, tree), fault.k, fault.is_interpreted)


WHOLE_SUITE = Tests(["tests"], "")


def run(tree: Path, tests: Tests) -> Outcome:
    """Run tests of the copy, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", "-k", tests.k]
    # Slow tests too: whether any sees the fault is the question. Those of this file look for the texts that a fault has
    # changed.
    command += ["-m", "", "--ignore=tests/test_mutants.py", *tests.files]
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "PGAP_", "TRITON_"))}
    # No bytecode: a fault and its repair within one second, of one length, would be taken for the same file.
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if tests.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Outcome("caught", f"no end within {PATIENCE} s")
    if done.returncode < 0:
        return Outcome("caught", f"a crash, signal {-done.returncode}")
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return Outcome("caught", failed[1])
    if done.returncode == 0:
        return Outcome("survived", "")
    return Outcome("broken", f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def control(tree: Path, several: Sequence[Tests]) -> Outcome:
    """Run the tests of all faults without a fault: "survived" is as it should be."""
    for interpreted in (False, True):
        same = [tests for tests in several if tests.interpreted == interpreted]
        files = sorted({file for tests in same for file in tests.files})
        wanted = {f"{Path(f).name} and ({t.k})" if t.k else Path(f).name: None for t in same for f in t.files}
        outcome = run(tree, Tests(files, " or ".join(wanted), interpreted)) if same else Outcome("survived", "")
        if outcome.status != "survived":
            break
    return outcome


# ---- the faults, one by one -----------------------------------------------------------------------------------------


def try_fault(tree: Path, fault: Fault, tests: Tests) -> Outcome:
    """Put a fault in, run tests, take it out."""
    file, library = tree / fault.file, tree / LIBRARY
    sound, begin = file.read_bytes(), time.monotonic()
    kept = library.read_bytes() if fault.is_cpp else b""
    file.write_text(sound.decode().replace(fault.before, fault.after), encoding="utf-8")
    try:
        error = build(tree) if fault.is_cpp else None
        outcome = Outcome("broken", f"does not compile: {error}") if error else run(tree, tests)
    finally:
        file.write_bytes(sound)
        if fault.is_cpp:
            library.write_bytes(kept)
    return outcome._replace(seconds=time.monotonic() - begin)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def left(rest: Sequence[Fault], took: dict[bool, list[float]]) -> str:
    """The time that the rest will take, if it is like what was."""
    guess = {False: 10.0, True: 60.0}
    seconds = sum(mean(took[fault.is_cpp] or [guess[fault.is_cpp]]) for fault in rest)
    return f"{seconds / 60:.0f} min left"


def try_all(chosen: Sequence[Fault], all_tests: bool = False) -> dict[str, Outcome]:
    """The outcome of each fault by name.

    Raises:
        SystemExit: the tree cannot be used: a text is not there, the extension does not build, the control run fails.
    """
    wrong = misplaced(chosen, ROOT)
    if wrong:
        raise SystemExit("\n".join(wrong))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / ROOT.name
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        if any(fault.is_cpp for fault in chosen) or not (tree / LIBRARY).exists():
            say("building the extension ...")
            error = build(tree)
            if error:
                raise SystemExit(f"the extension does not build without a fault:\n{error}")
        tests = [WHOLE_SUITE if all_tests else Tests.of(fault, tree) for fault in chosen]
        say("control run: the tests without a fault ...")
        outcome = run(tree, WHOLE_SUITE) if all_tests else control(tree, tests)
        if outcome.status != "survived":
            raise SystemExit(f"the control run, without a fault, did not pass: {outcome.by}")
        found: dict[str, Outcome] = {}
        took: dict[bool, list[float]] = {False: [], True: []}
        for i, (fault, own) in enumerate(zip(chosen, tests, strict=True)):
            outcome = found[fault.name] = try_fault(tree, fault, own)
            took[fault.is_cpp].append(outcome.seconds)
            result = f"{outcome.status} {outcome.by.splitlines()[0] if outcome.by else ''}".strip()
            say(f"[{i + 1}/{len(chosen)}, {left(chosen[i + 1 :], took)}] {fault.name}: {result}")
        return found


def table(chosen: Sequence[Fault], found: dict[str, Outcome]) -> str:
    """Fault, where it is, what became of it, and seconds, in Markdown."""
    lines = ["| fault | where | caught by | s |", "|---|---|---|---|"]
    for fault in chosen:
        outcome = found[fault.name]
        by = outcome.by if outcome.status == "caught" else f"{outcome.status.upper()} {outcome.by}".strip()
        lines.append(f"| {fault.name} | {fault.file} | {' '.join(by.split())} | {outcome.seconds:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults")
    parser.add_argument("--list", action="store_true", help="what there is; nothing runs")
    parser.add_argument("--all-tests", action="store_true", help="the whole suite for every fault: hours")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    unknown = {*(given.only or ())} - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"--only: got {', '.join(sorted(unknown))}; accepted: names that --list shows")
    chosen = [fault for fault in FAULTS if not given.only or fault.name in given.only]
    if given.list:
        rows = [{"name": f.name, "file": f.file, "tests": files_of(f, ROOT), "k": f.k} for f in chosen]
        text = [f"{r['name']:36} {r['file']:42} {' '.join(r['tests'])} -k {r['k']!r}" for r in rows]
        print(json.dumps(rows, indent=2) if given.json else "\n".join(text))
        return 0
    found = try_all(chosen, given.all_tests)
    rows = [{"name": f.name, "file": f.file, **found[f.name]._asdict()} for f in chosen]
    print(json.dumps(rows, indent=2) if given.json else table(chosen, found))
    missed = [name for name, outcome in found.items() if outcome.status != "caught"]
    say(f"{len(found) - len(missed)} of {len(found)} faults caught" + (f"; not: {', '.join(missed)}" if missed else ""))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
