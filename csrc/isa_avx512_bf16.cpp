// The kernels built for avx512_bf16. setup.py and tests/cpp/Makefile read its flags here; GCC 12's AVX-512 headers trip its
// own warnings of uninitialised variables.
// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx2 -mfma -mf16c -mprefer-vector-width=512
// flags: -Wno-uninitialized -Wno-maybe-uninitialized
#include <cstdint>
#include <immintrin.h>
#include "kernels.h"

namespace pgap {
namespace isa_avx512_bf16 {

#include "vec.h"
#include "noise.h"

using V = Avx512Bf16;
using H = Avx2;
constexpr int kTileRows = 6, kPanelVectors = 4, kPanel = kPanelVectors * V::N;
constexpr bool kPairs = true;
constexpr int kTallRows = 12, kForwardPanel = 2 * V::N;  // tokens beside two vectors

#include "kernels.inl"
#include "lowrank.inl"
#include "rules.inl"
#include "forward.inl"
#include "table.inl"

// Whether the CPU adds the two products of a pair one after the other, the high one first, each rounded as an fma is.
bool adds_in_order() {
    const auto sum = [](float c, float a_high, float b_high, float a_low, float b_low) {
        const auto pair = [](float high, float low) { return (float_to_bits(high) & 0xffff0000u) | float_to_bits(low) >> 16; };
        float lanes[V::N];
        const V::F a = V::as_f(V::setu(pair(a_high, a_low))), b = V::as_f(V::setu(pair(b_high, b_low)));
        V::store(lanes, V::fma_pairs(a, b, V::set(c)));
        return lanes[0];
    };
    return sum(1.0f, -1.0f, 1.0f, 0x1p-15f, 0x1p-15f) == 0x1p-30f &&      // not the low one first
           sum(1.0f, 0x1p-12f, 0x1p-12f, 0x1p-12f, 0x1p-12f) == 1.0f &&   // not both before c
           sum(0x1p24f, 1.0f, 1.0f, 0x1.8p0f, 1.0f) == 0x1p24f + 2.0f;    // rounded to nearest even
}

}  // namespace isa_avx512_bf16

const Kernels kernels_avx512_bf16 = isa_avx512_bf16::table("avx512_bf16");

}  // namespace pgap
