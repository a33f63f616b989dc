// The kernels built for any CPU.
#include <cstdint>

#include "kernels.h"

namespace pgap {
namespace isa_generic {

#include "vec.h"
#include "noise.h"

using V = Generic<8>;
using H = V;
constexpr int kTileRows = 4, kPanelVectors = 2, kPanel = kPanelVectors * V::N;
constexpr bool kPairs = false;
constexpr int kTallRows = 4, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "lowrank.inl"
#include "rules.inl"
#include "forward.inl"
#include "table.inl"

}  // namespace isa_generic

const Kernels kernels_generic = isa_generic::table("generic");

}  // namespace pgap
