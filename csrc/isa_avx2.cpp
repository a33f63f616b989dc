// The kernels for AVX2. setup.py and tests/cpp/Makefile read this file's compiler flags here:
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
constexpr int kLowrankTileRows = 4, kLowrankPanelVectors = 3, kForwardTileRows = 6;
constexpr bool kLowrankPairs = false;

#include "kernels.inl"

}  // namespace isa_avx2

const Kernels kernels_avx2 = isa_avx2::make_kernels("avx2");

}  // namespace pgap
