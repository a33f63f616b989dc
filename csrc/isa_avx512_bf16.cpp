// The kernels for AVX-512 with bfloat16 instructions. setup.py and tests/cpp/Makefile read this file's compiler flags
// here; the last two are for GCC 12, whose AVX-512 headers trigger its own warnings about uninitialised variables.
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
constexpr int kLowrankTileRows = 6, kLowrankPanelVectors = 4, kForwardTileRows = 12;
constexpr bool kLowrankPairs = true;

#include "kernels.inl"

// Whether this CPU's instruction for pairs adds the high product first and then the low one, each rounded as by an
// fma. lowrank relies on it for the bits of a chain of fma, so the CPU at hand is asked.
bool adds_in_order() {
    const auto pair = [](float high, float low) {
        return (float_to_bits(high) & 0xffff0000u) | float_to_bits(low) >> 16;
    };
    const auto sum = [&](float c, float a_high, float b_high, float a_low, float b_low) {
        float lanes[V::N];
        const V::F a = V::as_f(V::setu(pair(a_high, a_low))), b = V::as_f(V::setu(pair(b_high, b_low)));
        V::store(lanes, V::fma_pairs(a, b, V::set(c)));
        return lanes[0];
    };
    return sum(1.0f, -1.0f, 1.0f, 0x1p-15f, 0x1p-15f) == 0x1p-30f &&     // with the low product first it would be 0
           sum(1.0f, 0x1p-12f, 0x1p-12f, 0x1p-12f, 0x1p-12f) == 1.0f &&  // rounded once it would be 1 + 2^-23
           sum(0x1p24f, 1.0f, 1.0f, 0x1.8p0f, 1.0f) == 0x1p24f + 2.0f;   // rounds to nearest even
}

}  // namespace isa_avx512_bf16

const Kernels kernels_avx512_bf16 = isa_avx512_bf16::make_kernels("avx512_bf16");

}  // namespace pgap
