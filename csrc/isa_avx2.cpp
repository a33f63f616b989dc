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
constexpr bool kPairs = false;
constexpr int kTallRows = 6, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "lowrank.inl"
#include "rules.inl"
#include "forward.inl"
#include "table.inl"

}  // namespace isa_avx2

const Kernels kernels_avx2 = isa_avx2::table("avx2");

}  // namespace pgap
