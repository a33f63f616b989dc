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
constexpr int kTallRows = 12, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "rules.inl"
#include "forward.inl"

}  // namespace isa_neon

const Kernels kernels_neon = {"neon",
                              isa_neon::kPanel,
                              isa_neon::kForwardPanel,
                              isa_neon::dense,
                              isa_neon::masked,
                              isa_neon::preconditioned,
                              isa_neon::affine,
                              isa_neon::reduce,
                              isa_neon::low_rank,
                              isa_neon::forward,
                              isa_neon::to_float,
                              isa_neon::round_to,
                              isa_neon::transform};

}  // namespace pgap
