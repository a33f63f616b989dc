// The kernels for any CPU: loops over arrays, and fmaf of the C library.
#include <cstdint>
#include "kernels.h"

namespace pgap {
namespace isa_generic {

#include "vec.h"
#include "noise.h"

using V = Generic<8>;
using H = V;
constexpr int kLowrankTileRows = 4, kLowrankPanelVectors = 2, kForwardTileRows = 4;
constexpr bool kLowrankPairs = false;

#include "kernels.inl"

}  // namespace isa_generic

const Kernels kernels_generic = isa_generic::make_kernels("generic");

}  // namespace pgap
