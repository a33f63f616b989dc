// Vector types, one per instruction set, all with the same operations.
//
//   F  N floats     U  N 32-bit words     W  N 64-bit words, in an order that narrow() undoes     D  N doubles
//
// Every isa_*.cpp includes this inside its own namespace, and neither this nor the *.inl uses the standard library: of
// an inline function that several translation units share the linker keeps one copy, perhaps the one compiled for
// AVX-512. fma is always explicit (-ffp-contract=off), so that all instruction sets compute the same bits.

static inline float bits_to_float(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }

// Storage types. Arithmetic is float32: loads convert to it, stores round to nearest even.
struct BF16 { uint16_t bits; };
struct FP16 { uint16_t bits; };

static inline float to_float(float x) { return x; }
static inline float to_float(BF16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
static inline float to_float(FP16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // Multiplying by 2^112 moves the exponent from fp16's bias to fp32's and is exact for subnormal values, too.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// To nearest, ties to even; NaN stays NaN.
static inline void round_nearest(float& out, float x) { out = x; }
static inline void round_nearest(BF16& out, float x) {
    const uint32_t b = float_to_bits(x);
    out.bits = (b & 0x7fffffffu) > 0x7f800000u ? uint16_t((b >> 16) | 0x40u)
                                               : uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
static inline void round_nearest(FP16& out, float x) {
    const uint32_t b = float_to_bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
    uint32_t h;
    if (a > 0x7f800000u) h = 0x7e00u;
    else if (a >= 0x477ff000u) h = 0x7c00u;  // 65520 and above round to infinity
    else if (a < 0x38800000u)                // subnormal: adding 0.5 makes the FPU round to a multiple of 2^-24
        h = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
    else h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    out.bits = uint16_t(sign | h);
}

template <int LANES> struct Generic {
    static constexpr int N = LANES;
    struct F { float v[N]; };
    struct U { uint32_t v[N]; };
    struct W { uint64_t v[N]; };
    struct D { double v[N]; };
#define PGAP_EACH for (int i = 0; i < N; ++i)
    static F set(float x) { F r; PGAP_EACH r.v[i] = x; return r; }
    static U setu(uint32_t x) { U r; PGAP_EACH r.v[i] = x; return r; }
    static F load(const float* p) { F r; PGAP_EACH r.v[i] = p[i]; return r; }
    template <class T> static F load(const T* p) { F r; PGAP_EACH r.v[i] = to_float(p[i]); return r; }
    template <class T> static void store(T* p, F a) { PGAP_EACH round_nearest(p[i], a.v[i]); }
    template <class T> static void stream(T* p, F a) { store(p, a); }  // bypasses the caches; p is aligned to a vector
    static void fence() {}                                             // after the last stream()
    static U loadu(const uint32_t* p) { U r; PGAP_EACH r.v[i] = p[i]; return r; }
    static void storeu(uint32_t* p, U a) { PGAP_EACH p[i] = a.v[i]; }
    static void store16(void* p, U a) { PGAP_EACH ((uint16_t*)p)[i] = uint16_t(a.v[i]); }
    static bool within(U a, uint32_t least, uint32_t most) {  // every lane
        bool all = true;
        PGAP_EACH all &= a.v[i] >= least && a.v[i] <= most;
        return all;
    }
    static F add(F a, F b) { F r; PGAP_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
    static F sub(F a, F b) { F r; PGAP_EACH r.v[i] = a.v[i] - b.v[i]; return r; }
    static F mul(F a, F b) { F r; PGAP_EACH r.v[i] = a.v[i] * b.v[i]; return r; }
    static F fma(F a, F b, F c) { F r; PGAP_EACH r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return r; }
    static F fnma(F a, F b, F c) { F r; PGAP_EACH r.v[i] = __builtin_fmaf(-a.v[i], b.v[i], c.v[i]); return r; }
    static F sqrt(F a) { F r; PGAP_EACH r.v[i] = __builtin_sqrtf(a.v[i]); return r; }
    static D load(const double* p) { D r; PGAP_EACH r.v[i] = p[i]; return r; }
    static void store(double* p, D a) { PGAP_EACH p[i] = a.v[i]; }
    static D add_product(F a, F b, D c) {  // the product of two floats is exact in double
        D r; PGAP_EACH r.v[i] = double(a.v[i]) * double(b.v[i]) + c.v[i]; return r;
    }
    static F from_int(U a) { F r; PGAP_EACH r.v[i] = float(int32_t(a.v[i])); return r; }
    static F as_f(U a) { F r; PGAP_EACH r.v[i] = bits_to_float(a.v[i]); return r; }
    static U as_u(F a) { U r; PGAP_EACH r.v[i] = float_to_bits(a.v[i]); return r; }
    static U addu(U a, U b) { U r; PGAP_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
    static U andu(U a, U b) { U r; PGAP_EACH r.v[i] = a.v[i] & b.v[i]; return r; }
    static U oru(U a, U b) { U r; PGAP_EACH r.v[i] = a.v[i] | b.v[i]; return r; }
    static U xoru(U a, U b) { U r; PGAP_EACH r.v[i] = a.v[i] ^ b.v[i]; return r; }
    template <int S> static U shr(U a) { U r; PGAP_EACH r.v[i] = a.v[i] >> S; return r; }
    static U lane_bits(uint32_t word, int first) {  // bit 31 of lane i is bit first + i of word, the others are 0
        U r; PGAP_EACH r.v[i] = (word >> (first + i)) << 31; return r;
    }
    static W counters(uint32_t c) { W r; PGAP_EACH r.v[i] = c + uint32_t(i); return r; }
    static W setw(uint32_t x) { W r; PGAP_EACH r.v[i] = x; return r; }
    static W mulw(W a, W m) { W r; PGAP_EACH r.v[i] = uint64_t(uint32_t(a.v[i])) * uint32_t(m.v[i]); return r; }
    static W high(W a) { W r; PGAP_EACH r.v[i] = a.v[i] >> 32; return r; }
    static W xorw(W a, W b) { W r; PGAP_EACH r.v[i] = a.v[i] ^ b.v[i]; return r; }
    static W xor3(W a, W b, W c) { return xorw(xorw(a, b), c); }
    static U narrow(W a) { U r; PGAP_EACH r.v[i] = uint32_t(a.v[i]); return r; }  // the low halves
    static void prefetch(const void*) {}     // into L1
    static void prefetch_l2(const void*) {}
#undef PGAP_EACH
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Avx2 {
    static constexpr int N = 8;
    using F = __m256;
    using U = __m256i;
    struct W { __m256i even, odd; };  // a word in each 64-bit lane: words 0, 2, 4, 6 and 1, 3, 5, 7
    struct D { __m256d low, high; };
    static F set(float x) { return _mm256_set1_ps(x); }
    static U setu(uint32_t x) { return _mm256_set1_epi32(int(x)); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const BF16* p) {
        return as_f(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }
    static F load(const FP16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static __m128i rounded(BF16*, F a) {
        const U b = as_u(a), odd = andu(shr<16>(b), setu(1));
        U r = shr<16>(addu(addu(b, setu(0x7fff)), odd));
        const U nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        r = _mm256_blendv_epi8(r, oru(shr<16>(b), setu(0x40)), nan);
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
    }
    static __m128i rounded(FP16*, F a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
    template <class T> static void store(T* p, F a) { _mm_storeu_si128((__m128i*)p, rounded(p, a)); }
    static void stream(float* p, F a) { _mm256_stream_ps(p, a); }
    template <class T> static void stream(T* p, F a) { _mm_stream_si128((__m128i*)p, rounded(p, a)); }
    static void fence() { _mm_sfence(); }
    static U loadu(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static void storeu(uint32_t* p, U a) { _mm256_storeu_si256((__m256i*)p, a); }
    static void store16(void* p, U a) {
        const U halves = _mm256_packus_epi32(andu(a, setu(0xffffu)), a);
        _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
    }
    static bool within(U a, uint32_t least, uint32_t most) {
        const U above = _mm256_sub_epi32(a, setu(least)), range = setu(most - least);
        return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(above, range), range)) == -1;
    }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static D load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
    static void store(double* p, D a) { _mm256_storeu_pd(p, a.low), _mm256_storeu_pd(p + 4, a.high); }
    static D wide(F a) {
        return {_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
    }
    static D add_product(F a, F b, D c) {
        const D x = wide(a), y = wide(b);
        return {_mm256_fmadd_pd(x.low, y.low, c.low), _mm256_fmadd_pd(x.high, y.high, c.high)};
    }
    static F from_int(U a) { return _mm256_cvtepi32_ps(a); }
    static F as_f(U a) { return _mm256_castsi256_ps(a); }
    static U as_u(F a) { return _mm256_castps_si256(a); }
    static U addu(U a, U b) { return _mm256_add_epi32(a, b); }
    static U andu(U a, U b) { return _mm256_and_si256(a, b); }
    static U oru(U a, U b) { return _mm256_or_si256(a, b); }
    static U xoru(U a, U b) { return _mm256_xor_si256(a, b); }
    template <int S> static U shr(U a) { return _mm256_srli_epi32(a, S); }
    static U lane_bits(uint32_t word, int first) {
        const U iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_slli_epi32(_mm256_srlv_epi32(setu(word >> first), iota), 31);
    }
    static W counters(uint32_t c) {
        const U even = _mm256_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0), base = _mm256_set1_epi64x(c);
        const U first = _mm256_add_epi32(base, even);
        return {first, _mm256_add_epi32(first, _mm256_set1_epi64x(1))};
    }
    static W setw(uint32_t x) { const U v = _mm256_set1_epi64x(x); return {v, v}; }
    static W mulw(W a, W m) { return {_mm256_mul_epu32(a.even, m.even), _mm256_mul_epu32(a.odd, m.odd)}; }
    static W high(W a) { return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)}; }
    static W xorw(W a, W b) { return {xoru(a.even, b.even), xoru(a.odd, b.odd)}; }
    static W xor3(W a, W b, W c) { return xorw(xorw(a, b), c); }
    static U narrow(W a) { return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xaa); }
    static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
struct Avx512 {
    static constexpr int N = 16;
    using F = __m512;
    using U = __m512i;
    struct W { __m512i even, odd; };
    struct D { __m512d low, high; };
    static F set(float x) { return _mm512_set1_ps(x); }
    static U setu(uint32_t x) { return _mm512_set1_epi32(int(x)); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const BF16* p) {
        return as_f(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    }
    static F load(const FP16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static __m256i rounded(BF16*, F a) {
        const U b = as_u(a), odd = andu(shr<16>(b), setu(1));
        U r = shr<16>(addu(addu(b, setu(0x7fff)), odd));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        r = _mm512_mask_or_epi32(r, nan, shr<16>(b), setu(0x40));
        return _mm512_cvtepi32_epi16(r);
    }
    static __m256i rounded(FP16*, F a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
    template <class T> static void store(T* p, F a) { _mm256_storeu_si256((__m256i*)p, rounded(p, a)); }
    static void stream(float* p, F a) { _mm512_stream_ps(p, a); }
    template <class T> static void stream(T* p, F a) { _mm256_stream_si256((__m256i*)p, rounded(p, a)); }
    static void fence() { _mm_sfence(); }
    static U loadu(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static void storeu(uint32_t* p, U a) { _mm512_storeu_si512(p, a); }
    static void store16(void* p, U a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }  // low halves
    static bool within(U a, uint32_t least, uint32_t most) {
        return _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(a, setu(least)), setu(most - least)) == 0;
    }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static D load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
    static void store(double* p, D a) { _mm512_storeu_pd(p, a.low), _mm512_storeu_pd(p + 8, a.high); }
    static D wide(F a) {
        return {_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))};
    }
    static D add_product(F a, F b, D c) {
        const D x = wide(a), y = wide(b);
        return {_mm512_fmadd_pd(x.low, y.low, c.low), _mm512_fmadd_pd(x.high, y.high, c.high)};
    }
    static F from_int(U a) { return _mm512_cvtepi32_ps(a); }
    static F as_f(U a) { return _mm512_castsi512_ps(a); }
    static U as_u(F a) { return _mm512_castps_si512(a); }
    static U addu(U a, U b) { return _mm512_add_epi32(a, b); }
    static U andu(U a, U b) { return _mm512_and_si512(a, b); }
    static U oru(U a, U b) { return _mm512_or_si512(a, b); }
    static U xoru(U a, U b) { return _mm512_xor_si512(a, b); }
    template <int S> static U shr(U a) { return _mm512_srli_epi32(a, S); }
    static U lane_bits(uint32_t word, int first) {
        return _mm512_maskz_set1_epi32(__mmask16(word >> first), int(0x80000000u));
    }
    static W counters(uint32_t c) {
        const U even = _mm512_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0, 8, 0, 10, 0, 12, 0, 14, 0);
        const U first = _mm512_add_epi32(_mm512_set1_epi64(c), even);
        return {first, _mm512_add_epi32(first, _mm512_set1_epi64(1))};
    }
    static W setw(uint32_t x) { const U v = _mm512_set1_epi64(x); return {v, v}; }
    static W mulw(W a, W m) { return {_mm512_mul_epu32(a.even, m.even), _mm512_mul_epu32(a.odd, m.odd)}; }
    static W high(W a) { return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)}; }
    static W xorw(W a, W b) { return {xoru(a.even, b.even), xoru(a.odd, b.odd)}; }
    static W xor3(W a, W b, W c) {
        return {_mm512_ternarylogic_epi64(a.even, b.even, c.even, 0x96),
                _mm512_ternarylogic_epi64(a.odd, b.odd, c.odd, 0x96)};
    }
    static U narrow(W a) {
        return as_u(_mm512_mask_moveldup_ps(as_f(a.even), __mmask16(0xaaaa), as_f(a.odd)));
    }
    static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
};
#endif

#ifdef __AVX512BF16__
struct Avx512Bf16 : Avx512 {
    // a and b hold two bf16 a lane: fma(low a, low b, fma(high a, high b, c)), see adds_in_order().
    static F fma_pairs(F a, F b, F c) {
        return _mm512_dpbf16_ps(c, (__m512bh)as_u(a), (__m512bh)as_u(b));
    }
    static __m256i rounded(BF16* p, F a) {
        // The instruction flushes subnormal numbers to zero, so a vector that holds one is rounded in integers.
        if (__builtin_expect(_mm512_fpclass_ps_mask(a, 0x20), 0)) return Avx512::rounded(p, a);
        return (__m256i)_mm512_cvtneps_pbh(a);
    }
    using Avx512::store;
    using Avx512::stream;
    static void store(BF16* p, F a) { _mm256_storeu_si256((__m256i*)p, rounded(p, a)); }
    static void stream(BF16* p, F a) { _mm256_stream_si256((__m256i*)p, rounded(p, a)); }
};
#endif

#if defined(PGAP_NEON)
struct Neon {
    static constexpr int N = 4;
    using F = float32x4_t;
    using U = uint32x4_t;
    struct W { uint32x4_t low, top; };  // the halves of 64-bit words
    struct D { float64x2_t low, high; };
    static F set(float x) { return vdupq_n_f32(x); }
    static U setu(uint32_t x) { return vdupq_n_u32(x); }
    static F load(const float* p) { return vld1q_f32(p); }
    static F load(const BF16* p) { return as_f(vshll_n_u16(vld1_u16((const uint16_t*)p), 16)); }
    static F load(const FP16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))); }
    static void store(float* p, F a) { vst1q_f32(p, a); }
    static void store(BF16* p, F a) {
        const U b = as_u(a), odd = andu(shr<16>(b), setu(1)), number = vceqq_f32(a, a);
        const U r = vbslq_u32(number, addu(addu(b, setu(0x7fff)), odd), oru(b, setu(0x400000)));
        vst1_u16((uint16_t*)p, vshrn_n_u32(r, 16));
    }
    static void store(FP16* p, F a) { vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
    template <class T> static void stream(T* p, F a) { store(p, a); }
    static void fence() {}
    static U loadu(const uint32_t* p) { return vld1q_u32(p); }
    static void storeu(uint32_t* p, U a) { vst1q_u32(p, a); }
    static void store16(void* p, U a) { vst1_u16((uint16_t*)p, vmovn_u32(a)); }
    static bool within(U a, uint32_t least, uint32_t most) {
        return vmaxvq_u32(vsubq_u32(a, setu(least))) <= most - least;
    }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
    static F sqrt(F a) { return vsqrtq_f32(a); }
    static D load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
    static void store(double* p, D a) { vst1q_f64(p, a.low), vst1q_f64(p + 2, a.high); }
    static D wide(F a) { return {vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a)}; }
    static D add_product(F a, F b, D c) {
        const D x = wide(a), y = wide(b);
        return {vfmaq_f64(c.low, x.low, y.low), vfmaq_f64(c.high, x.high, y.high)};
    }
    static F from_int(U a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
    static F as_f(U a) { return vreinterpretq_f32_u32(a); }
    static U as_u(F a) { return vreinterpretq_u32_f32(a); }
    static U addu(U a, U b) { return vaddq_u32(a, b); }
    static U andu(U a, U b) { return vandq_u32(a, b); }
    static U oru(U a, U b) { return vorrq_u32(a, b); }
    static U xoru(U a, U b) { return veorq_u32(a, b); }
    template <int S> static U shr(U a) { return vshrq_n_u32(a, S); }
    static U lane_bits(uint32_t word, int first) {
        const int32x4_t to_sign = {31, 30, 29, 28};
        return andu(vshlq_u32(setu(word >> first), to_sign), setu(0x80000000u));
    }
    static W counters(uint32_t c) {
        const U iota = {0, 1, 2, 3};
        return {addu(setu(c), iota), setu(0)};
    }
    static W setw(uint32_t x) { return {setu(x), setu(0)}; }
    static W mulw(W a, W m) {
        const U p01 = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a.low), vget_low_u32(m.low)));
        const U p23 = vreinterpretq_u32_u64(vmull_high_u32(a.low, m.low));
        return {vuzp1q_u32(p01, p23), vuzp2q_u32(p01, p23)};
    }
    static W high(W a) { return {a.top, setu(0)}; }
    static W xorw(W a, W b) { return {xoru(a.low, b.low), xoru(a.top, b.top)}; }
    static W xor3(W a, W b, W c) { return xorw(xorw(a, b), c); }
    static U narrow(W a) { return a.low; }
    static void prefetch(const void* p) { __builtin_prefetch(p); }
    static void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
};
#endif

// Two vectors, each operation on both. Noise is one long chain of dependent operations per vector, longer than a CPU's
// scheduler can look ahead; a second independent chain in between keeps its units busy.
template <class V> struct Unrolled2 {
    static constexpr int N = 2 * V::N;
    struct F { typename V::F a, b; };
    struct U { typename V::U a, b; };
    struct W { typename V::W a, b; };
    static F set(float x) { return {V::set(x), V::set(x)}; }
    static U setu(uint32_t x) { return {V::setu(x), V::setu(x)}; }
    static F load(const float* p) { return {V::load(p), V::load(p + V::N)}; }
    static void store(float* p, F x) { V::store(p, x.a), V::store(p + V::N, x.b); }
    static F add(F x, F y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
    static F mul(F x, F y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
    static F fma(F x, F y, F z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }
    static F fnma(F x, F y, F z) { return {V::fnma(x.a, y.a, z.a), V::fnma(x.b, y.b, z.b)}; }
    static F sqrt(F x) { return {V::sqrt(x.a), V::sqrt(x.b)}; }
    static F from_int(U x) { return {V::from_int(x.a), V::from_int(x.b)}; }
    static F as_f(U x) { return {V::as_f(x.a), V::as_f(x.b)}; }
    static U as_u(F x) { return {V::as_u(x.a), V::as_u(x.b)}; }
    static U addu(U x, U y) { return {V::addu(x.a, y.a), V::addu(x.b, y.b)}; }
    static U andu(U x, U y) { return {V::andu(x.a, y.a), V::andu(x.b, y.b)}; }
    static U oru(U x, U y) { return {V::oru(x.a, y.a), V::oru(x.b, y.b)}; }
    static U xoru(U x, U y) { return {V::xoru(x.a, y.a), V::xoru(x.b, y.b)}; }
    template <int S> static U shr(U x) { return {V::template shr<S>(x.a), V::template shr<S>(x.b)}; }
    static W counters(uint32_t c) { return {V::counters(c), V::counters(c + V::N)}; }
    static W setw(uint32_t x) { return {V::setw(x), V::setw(x)}; }
    static W mulw(W x, W m) { return {V::mulw(x.a, m.a), V::mulw(x.b, m.b)}; }
    static W high(W x) { return {V::high(x.a), V::high(x.b)}; }
    static W xorw(W x, W y) { return {V::xorw(x.a, y.a), V::xorw(x.b, y.b)}; }
    static W xor3(W x, W y, W z) { return {V::xor3(x.a, y.a, z.a), V::xor3(x.b, y.b, z.b)}; }
    static U narrow(W x) { return {V::narrow(x.a), V::narrow(x.b)}; }
};
