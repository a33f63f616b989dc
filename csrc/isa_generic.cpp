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
constexpr int kTallRows = 4, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "rules.inl"
#include "forward.inl"

}  // namespace isa_generic

const Kernels kernels_generic = {"generic",
                                isa_generic::kPanel,
                                isa_generic::kForwardPanel,
                                isa_generic::dense,
                                isa_generic::masked,
                                isa_generic::preconditioned,
                                isa_generic::affine,
                                isa_generic::reduce,
                                isa_generic::low_rank,
                                isa_generic::forward,
                                isa_generic::to_float,
                                isa_generic::round_to,
                                isa_generic::transform};

}  // namespace pgap
