// The kernels built for avx512. setup.py and tests/cpp/Makefile read its flags here; GCC 12's AVX-512 headers trip its
// own warnings of uninitialised variables.
// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512
// flags: -Wno-uninitialized -Wno-maybe-uninitialized
#include <cstdint>
#include <immintrin.h>
#include "kernels.h"

namespace pgap {
namespace isa_avx512 {

#include "vec.h"
#include "noise.h"

using V = Avx512;
using H = Avx2;
constexpr int kTileRows = 6, kPanelVectors = 4, kPanel = kPanelVectors * V::N;
constexpr int kTallRows = 12, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "rules.inl"
#include "forward.inl"

}  // namespace isa_avx512

const Kernels kernels_avx512 = {"avx512",
                                isa_avx512::kPanel,
                                isa_avx512::kForwardPanel,
                                isa_avx512::dense,
                                isa_avx512::masked,
                                isa_avx512::preconditioned,
                                isa_avx512::affine,
                                isa_avx512::reduce,
                                isa_avx512::low_rank,
                                isa_avx512::forward,
                                isa_avx512::to_float,
                                isa_avx512::round_to,
                                isa_avx512::transform};

}  // namespace pgap
