// The kernels for AVX-512. setup.py and tests/cpp/Makefile read this file's compiler flags here; the last two are for
// GCC 12, whose AVX-512 headers trigger its own warnings about uninitialised variables.
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
constexpr int kLowrankTileRows = 6, kLowrankPanelVectors = 4, kForwardTileRows = 12;
constexpr bool kLowrankPairs = false;

#include "kernels.inl"

}  // namespace isa_avx512

const Kernels kernels_avx512 = isa_avx512::make_kernels("avx512");

}  // namespace pgap
