// The kernels built for avx2. setup.py and tests/cpp/Makefile read its flags here:
// flags: -mavx2 -mfma -mf16c
#include <cstdint>
#include <immintrin.h>
#include "kernels.h"

namespace pgap {
namespace isa_avx2 {

#include "vec.h"
#include "noise.h"

using V = Avx2;
using H = V;
constexpr int kTileRows = 4, kPanelVectors = 3, kPanel = kPanelVectors * V::N;
constexpr int kTallRows = 6, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "rules.inl"
#include "forward.inl"

}  // namespace isa_avx2

const Kernels kernels_avx2 = {"avx2",
                                isa_avx2::kPanel,
                                isa_avx2::kForwardPanel,
                                isa_avx2::dense,
                                isa_avx2::masked,
                                isa_avx2::preconditioned,
                                isa_avx2::affine,
                                isa_avx2::reduce,
                                isa_avx2::low_rank,
                                isa_avx2::forward,
                                isa_avx2::to_float,
                                isa_avx2::round_to,
                                isa_avx2::transform};

}  // namespace pgap
