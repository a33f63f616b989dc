// All kernels and the table of them, compiled once per instruction set. An isa_*.cpp includes this in its own
// namespace, after it has defined the vector types and the sizes of tiles:
//
//   V, H                    the vector type, and one of half its size (or V again)
//   kLowrankTileRows x kLowrankPanelVectors    a tile of lowrank
//   kForwardTileRows x 2                       a tile of forward
//   kLowrankPairs           whether V has fma_pairs()
//
// Tiles are as large as registers allow: the sums of a tile, the vectors of one factor's row and a broadcast element
// of the other must fit without spilling.

using V2 = Unrolled2<V>;
constexpr int kLowrankPanel = kLowrankPanelVectors * V::N;
constexpr int kForwardPanel = 2 * V::N;

#include "group.inl"
#include "draw.inl"
#include "round.inl"
#include "convert.inl"

#include "dense.inl"
#include "masked.inl"
#include "preconditioned.inl"
#include "anchor.inl"
#include "reduction.inl"
#include "lowrank.inl"
#include "forward.inl"

static constexpr Kernels make_kernels(const char* name) {
    return {.name = name,
            .lowrank_panel = kLowrankPanel,
            .forward_panel = kForwardPanel,
            .pairs = kLowrankPairs,
            .dense = dense,
            .masked = masked,
            .preconditioned = preconditioned,
            .anchor = anchor,
            .reduction = reduction,
            .lowrank = lowrank,
            .forward = forward,
            .to_float = convert_to_float,
            .round_to = round_array,
            .box_muller = box_muller_array};
}
