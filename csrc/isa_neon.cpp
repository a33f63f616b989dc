// The kernels for NEON, which every aarch64 CPU has.
#include <arm_neon.h>
#include <cstdint>
#include "kernels.h"

namespace pgap {
namespace isa_neon {

#define PGAP_NEON
#include "vec.h"
#include "noise.h"

using V = Neon;
using H = V;
constexpr int kLowrankTileRows = 6, kLowrankPanelVectors = 4, kForwardTileRows = 12;
constexpr bool kLowrankPairs = false;

#include "kernels.inl"

}  // namespace isa_neon

const Kernels kernels_neon = isa_neon::make_kernels("neon");

}  // namespace pgap
