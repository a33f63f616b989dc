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
constexpr bool kPairs = false;
constexpr int kTallRows = 12, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "lowrank.inl"
#include "rules.inl"
#include "forward.inl"
#include "table.inl"

}  // namespace isa_avx512

const Kernels kernels_avx512 = isa_avx512::table("avx512");

}  // namespace pgap
