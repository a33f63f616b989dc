// out = round(acc)
//
//   acc         in + fma(-decay, in, delta);  in + delta if decay is 0;  delta if there is no `in`
//   nearest     ties to even
//   stochastic  lo, hi: the neighbours of acc in out's type, toward zero and away from it
//               s: the top 16 bits of a random word
//               hi if s 2^-16 < (|acc| - |lo|) / (|hi| - |lo|), else lo
//               float32, and where acc is not finite or overflows: nearest
//
// W is not multiplied by 1 - decay, because that is 1 in float32 for a decay of 1e-8.

template <class X, bool STREAM, class T> static int64_t apply_lanes(T* out, const T* in, const float* delta, int64_t i,
                                                                    int64_t n, float decay) {
    const typename X::F d = X::set(decay);
    for (; i + X::N <= n; i += X::N) {
        typename X::F acc = X::load(delta + i);
        if (in) {
            const typename X::F w = X::load(in + i);
            if (decay != 0.0f) acc = X::fnma(d, w, acc);
            acc = X::add(w, acc);
        }
        if (STREAM) X::stream(out + i, acc);
        else X::store(out + i, acc);
    }
    return i;
}

template <class T> static void apply_nearest(T* out, const T* in, const float* delta, int64_t n, float decay,
                                             bool stream = false) {
    const bool aligned = (uintptr_t)out % (V::N * sizeof(T)) == 0;
    const int64_t done = stream && aligned ? apply_lanes<V, true>(out, in, delta, 0, n, decay)
                                           : apply_lanes<V, false>(out, in, delta, 0, n, decay);
    apply_lanes<Generic<1>, false>(out, in, delta, done, n, decay);
}

static inline void round_stochastic(float& out, float acc, uint32_t) { out = acc; }
static inline void round_stochastic(BF16& out, float acc, uint32_t word) {
    const uint32_t b = float_to_bits(acc);
    if ((b & 0x7fffffffu) > 0x7f7f0000u) return round_nearest(out, acc);
    out.bits = uint16_t((b >> 16) + ((word >> 16) < (b & 0xffffu)));
}
static inline void round_stochastic(FP16& out, float acc, uint32_t word) {
    const uint32_t b = float_to_bits(acc), a = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
    if (a > 0x477fe000u) return round_nearest(out, acc);
    if (a >= 0x38800000u) {
        out.bits = uint16_t(sign | (((a - 0x38000000u) >> 13) + ((word >> 16) < ((a & 0x1fffu) << 3))));
        return;
    }
    const float units = bits_to_float(a) * 0x1p24f;  // of fp16's subnormal step; exact
    const uint32_t lo = uint32_t(units);
    out.bits = uint16_t(sign | (lo + (float(word >> 16) * 0x1p-16f < units - float(lo))));
}

// The same for a vector. False, and nothing is done, if a lane needs a special case: overflow, or fp16's subnormal
// range. For bf16, with f the 16 bits of acc that are cut off, s < f exactly if f + (2^16 - 1 - s) carries into the
// bits that stay; for fp16 the same holds for 13 bits.
static inline bool try_round_stochastic(float* out, V::F acc, V::U) { return V::store(out, acc), true; }
static inline bool try_round_stochastic(BF16* out, V::F acc, V::U words) {
    const V::U b = V::as_u(acc), addend = V::template shr<16>(V::xoru(words, V::setu(~0u)));
    if (!V::within(V::andu(b, V::setu(0x7fffffffu)), 0, 0x7f7f0000u)) return false;
    V::store16(out, V::template shr<16>(V::addu(b, addend)));
    return true;
}
static inline bool try_round_stochastic(FP16* out, V::F acc, V::U words) {
    const V::U b = V::as_u(acc), a = V::andu(b, V::setu(0x7fffffffu));
    if (!V::within(a, 0x38800000u, 0x477fe000u)) return false;
    const V::U addend = V::template shr<19>(V::xoru(words, V::setu(~0u))), sign = V::template shr<16>(V::xoru(a, b));
    V::store16(out, V::oru(sign, V::template shr<13>(V::addu(V::addu(a, V::setu(0u - 0x38000000u)), addend))));
    return true;
}

template <class T> static void apply_stochastic(T* out, const T* in, const float* delta, const uint32_t* words,
                                                int64_t n, float decay) {
    const V::F d = V::set(decay);
    for (int64_t i = 0; i < n; i += V::N) {
        if (i + V::N <= n) {
            V::F acc = V::load(delta + i);
            if (in) {
                const V::F w = V::load(in + i);
                acc = V::add(w, decay != 0.0f ? V::fnma(d, w, acc) : acc);
            }
            if (try_round_stochastic(out + i, acc, V::loadu(words + i))) continue;
        }
        for (int64_t k = i; k < n && k < i + V::N; ++k) {
            float acc = delta[k];
            if (in) {
                const float w = to_float(in[k]);
                acc = w + (decay != 0.0f ? __builtin_fmaf(-decay, w, acc) : acc);
            }
            round_stochastic(out[k], acc, words[k]);
        }
    }
}

// Without words: to nearest.
template <class T> static void apply_delta(T* out, const T* in, const float* delta, const uint32_t* words, int64_t n,
                                           float decay, bool stream = false) {
    if (words) apply_stochastic(out, in, delta, words, n, decay);
    else apply_nearest(out, in, delta, n, decay, stream);
}
