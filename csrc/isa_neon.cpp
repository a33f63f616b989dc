// The kernels built for neon, which every aarch64 has.
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
constexpr int kTileRows = 6, kPanelVectors = 4, kPanel = kPanelVectors * V::N;
constexpr bool kPairs = false;
constexpr int kTallRows = 12, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "lowrank.inl"
#include "rules.inl"
#include "forward.inl"
#include "table.inl"

}  // namespace isa_neon

const Kernels kernels_neon = isa_neon::table("neon");

}  // namespace pgap
